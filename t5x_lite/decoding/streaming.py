# SPDX-License-Identifier: Apache-2.0
"""The decoding loop with pauses: what is written so far comes out, cache and all stay where they
are."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from t5x_lite import config, model
from t5x_lite.decoding import generation, target
from t5x_lite.decoding.generation import PLAIN, Drafting, Result, Shape
from t5x_lite.decoding.protocol import Setting, State
from t5x_lite.decoding.request import Request, bucket


class Asked(NamedTuple):
    """What `generation.generate` is asked, on the mesh."""

    params: Any
    request: Request
    draws: Any
    weights: Any


def stream(
    cfg: config.Model,
    params: Any,
    request: Request,
    decode: config.Decode,
    drafting: Drafting = PLAIN,
    every: int = 4,
) -> Iterator[Result]:
    """What `generate` gives, in the making: all that is written after every so many calls, and at
    the end. The last Result has the tokens that `generate` would give.

    Raises:
      ValueError: beams are asked for, or every is below 1.
    """
    if decode.beams > 1:
        raise ValueError("Beam search knows its text at the end only: to stream, leave out beams")
    if every < 1:
        raise ValueError(f"A stream pauses after every call, or after several; got every={every}")
    shape = Shape(
        target.precise(cfg), bucket(decode.length), 1, 1, drafting.drafter, drafting.accept
    )
    placed = generation.place(request._replace(eos=None))._replace(eos=request.eos)
    draws = generation.place(generation.draw(request, decode)) if decode.temperature > 0 else None
    return results(shape, Asked(params, placed, draws, drafting.weights), every, decode.length)


def results(shape: Shape, asked: Asked, every: int, length: int) -> Iterator[Result]:
    read, state = begun(shape, asked)
    done = False
    while not done:
        state, result, done = jax.block_until_ready(advanced(shape, asked, read, state, every))
        result, done = jax.device_get((result, done))
        each = {name: getattr(result, name)[:, :, :length] for name in ("tokens", "call", "node")}
        yield result._replace(calls=int(result.calls), **each)


@functools.partial(jax.jit, static_argnums=0)
def begun(shape: Shape, asked: Asked) -> tuple[model.Read, State]:
    """The inputs read, and the loop's first state."""
    read, request = model.Read(), asked.request
    if request.inputs is not None:
        read = target.read(shape.cfg, asked.params, request.inputs, request.inputs_length)
    setting = set_up(shape, asked, read)
    cache = target.prefill(shape.cfg, asked.params, read, setting.prompts, setting.slots)
    memory = shape.drafter.begin(setting)
    return read, generation.started(setting, cache, setting.slots, memory)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def advanced(shape: Shape, asked: Asked, read: model.Read, state: State, every):
    """The state after as many calls more, what is written by then, and whether that is all."""
    setting = set_up(shape, asked, read)
    paused = setting.rules._replace(pause=state.calls + every)
    state = generation.run(shape, setting._replace(rules=paused), state)
    result = generation.written(state, setting.prompts, shape.length, jnp.float32(0))
    whole = jax.tree.map(lambda x: jax.reshard(x, P()), (result, jnp.all(state.done)))
    return state, *whole


def set_up(shape: Shape, asked: Asked, read: model.Read) -> Setting:
    reader = target.of(shape.cfg, asked.params, read)
    return generation.set_up(shape, reader, asked.request, asked.draws, asked.weights)
