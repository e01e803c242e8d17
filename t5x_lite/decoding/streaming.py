# SPDX-License-Identifier: Apache-2.0
"""The decoding loop with pauses: returns the text so far; cache and state stay on the device."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int

from t5x_lite import config, model
from t5x_lite.decoding import generation, target
from t5x_lite.decoding.generation import PLAIN, ChoiceRules, DecodeProgram, Drafting, Result
from t5x_lite.decoding.protocol import DecodeContext, DecodeState
from t5x_lite.decoding.request import Request, bucket_length


class DecodeArguments(NamedTuple):
    """Traced arguments of a compiled program, on the mesh.

    Attributes:
      params: weights of the model.
      request: the rows.
      rules: by which the next token is chosen.
      weights: the drafter's own weights.
    """

    params: Any
    request: Request
    rules: ChoiceRules
    weights: Any


def stream(
    cfg: config.Model,
    params: Any,
    request: Request,
    decode: config.Decode,
    drafting: Drafting = PLAIN,
    every: int = 4,
) -> Iterator[Result]:
    """Yields the growing result of `generate`; the last one has the tokens of `generate`.

    Args:
      cfg: config of the model.
      params: weights from `prepare_params`.
      request: the rows.
      decode: limits and sampling.
      drafting: drafter, its weights, and the acceptance rule.
      every: number of forward passes between two results.

    Raises:
      ValueError: decode has beams, or `every` is below 1.
    """
    if decode.beams > 1:
        raise ValueError("Beam search knows its text at the end only: to stream, leave out beams")
    if every < 1:
        raise ValueError(f"A stream yields every 1 or more forward passes; got every={every}")
    program = DecodeProgram(
        cfg=target.with_cpu_dtype(cfg),
        length=bucket_length(decode.max_new_tokens),
        beams=1,
        n_best=1,
        drafter=drafting.drafter,
        accept=drafting.accept,
    )
    placed = generation.shard_rows(request._replace(eos=None))._replace(eos=request.eos)
    arguments = DecodeArguments(
        params, placed, generation.make_rules(request, decode), drafting.weights
    )
    return stream_results(program, arguments, every, decode.max_new_tokens)


def stream_results(
    program: DecodeProgram, arguments: DecodeArguments, every: int, length: int
) -> Iterator[Result]:
    """Runs the loop from pause to pause.

    Args:
      program: static arguments.
      arguments: traced arguments.
      every: number of forward passes between two results.
      length: most new tokens.

    Yields:
      The result so far, as numpy arrays.
    """
    encoded, state = start_stream(program, arguments)
    done = False
    while not done:
        state, result, done = jax.block_until_ready(
            advance_stream(program, arguments, encoded, state, every)
        )
        result, done = jax.device_get((result, done))
        yield generation.trim_result(result, length)


@functools.partial(jax.jit, static_argnums=0)
def start_stream(
    program: DecodeProgram, arguments: DecodeArguments
) -> tuple[model.EncoderMemory, DecodeState]:
    """Encodes the inputs, and returns them with the loop's first state."""
    encoded, request = model.EncoderMemory(), arguments.request
    if request.inputs is not None:
        encoded = target.encode_inputs(
            program.cfg, arguments.params, request.inputs, request.inputs_length
        )
    context = stream_context(program, arguments, encoded)
    cache = target.prefill(program.cfg, arguments.params, encoded, context.prompts, context.slots)
    drafter_state = program.drafter.begin(context)
    return encoded, generation.initial_state(context, cache, context.slots, drafter_state)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def advance_stream(
    program: DecodeProgram,
    arguments: DecodeArguments,
    encoded: model.EncoderMemory,
    state: DecodeState,
    every: Int[Array, ""],
) -> tuple[DecodeState, Result, Bool[Array, ""]]:
    """Decodes up to the next pause.

    Args:
      program: static arguments.
      arguments: traced arguments.
      encoded: the encoded inputs.
      state: state of the loop; donated.
      every: number of forward passes until the pause.

    Returns:
      The new state, the result so far, and whether every row is done.
    """
    context = stream_context(program, arguments, encoded)
    paused = context.stopping._replace(pause=state.steps + every)
    state = generation.run_decoding(program, context._replace(stopping=paused), state)
    result = generation.loop_result(state, context.prompts, program.length, jnp.float32(0))
    result, done = jax.tree.map(lambda x: jax.reshard(x, P()), (result, jnp.all(state.done)))
    return state, result, done


def stream_context(
    program: DecodeProgram, arguments: DecodeArguments, encoded: model.EncoderMemory
) -> DecodeContext:
    """Returns the constants of the request.

    Args:
      program: static arguments.
      arguments: traced arguments.
      encoded: the encoded inputs.
    """
    decoded = target.make_target(program.cfg, arguments.params, encoded)
    return generation.make_context(
        program, decoded, arguments.request, arguments.rules, arguments.weights
    )
