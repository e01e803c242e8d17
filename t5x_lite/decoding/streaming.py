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
from t5x_lite.decoding.beam_ranking import LengthPenalty, make_length_penalty
from t5x_lite.decoding.companions.companion import replace_cache
from t5x_lite.decoding.generation import PLAIN, ChoiceRules, DecodeProgram, Drafting
from t5x_lite.decoding.protocol import DecodeContext, DecodeState, Prompts
from t5x_lite.decoding.request import Request
from t5x_lite.decoding.result import Result, loop_result, trim_result
from t5x_lite.model.computation import with_dtype_of


class DecodeArguments(NamedTuple):
    """Traced arguments of a compiled program, on the mesh.

    Attributes:
      params: weights of the model.
      request: the rows.
      rules: by which the next token is chosen.
      weights: the drafter's own weights.
      penalty: length penalty.
    """

    params: Any
    request: Request
    rules: ChoiceRules
    weights: Any
    penalty: LengthPenalty = LengthPenalty(0.0)


def place_arguments(
    params: Any, request: Request, decode: config.Decode, drafting: Drafting
) -> DecodeArguments:
    """Places the arguments of a program on the mesh.

    Args:
      params: weights from `prepare_params`.
      request: the rows, on the host.
      decode: limits and sampling.
      drafting: its weights are taken.
    """
    return DecodeArguments(
        params=params,
        request=generation.place_request(request),
        rules=generation.make_rules(request, decode),
        weights=drafting.weights,
        penalty=make_length_penalty(decode),
    )


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
    check_stream(decode, every)
    return iterate_stream(DecodeStream(cfg, params, request, decode, drafting), every)


def check_stream(decode: config.Decode, every: int) -> None:
    """Raises ValueError if a text cannot be streamed so.

    Args:
      decode: its beams, n_best and search are checked.
      every: number of forward passes between two results.
    """
    if decode.beams > 1:
        raise ValueError("Beam search knows its text at the end only: to stream, leave out beams")
    if decode.n_best > 1:
        raise ValueError("A stream is one text: leave out n_best")
    if decode.search:
        raise ValueError("A search takes rows back: to stream, leave out search")
    if every < 1:
        raise ValueError(f"A stream yields every 1 or more forward passes; got every={every}")


def iterate_stream(text: "DecodeStream", every: int) -> Iterator[Result]:
    """Yields the results of a stream from pause to pause."""
    done = False
    while not done:
        result, done = text.advance(every)
        yield result


class DecodeStream:
    """Rows that are being written: their state on the device, and the program that goes on.

    Attributes:
      cfg: config of the model.
      request: the rows, on the host.
      decode: limits and sampling.
      program: static arguments of the compiled program.
      arguments: its traced arguments; `weights` may be replaced between two pauses.
      encoded: the encoded inputs; None before the first step.
      state: state of the loop; None before the first step.
    """

    def __init__(
        self,
        cfg: config.Model,
        params: Any,
        request: Request,
        decode: config.Decode,
        drafting: Drafting = PLAIN,
    ):
        self.cfg = with_dtype_of(cfg, params)
        self.request, self.decode = request, decode
        self.program = generation.make_program(self.cfg, decode, drafting)
        self.arguments = place_arguments(params, request, decode, drafting)
        self.encoded: Any = None
        self.state: Any = None

    def start(self) -> None:
        """Encodes the inputs and fills the cache, unless that is done."""
        if self.state is None:
            self.encoded, self.state = start_stream(self.program, self.arguments)

    def advance(self, every: int) -> tuple[Result, bool]:
        """Decodes `every` forward passes, or until every row is done; 0 only compiles.

        Returns:
          The result so far as numpy arrays, and True if every row is done.
        """
        self.start()
        self.state, result, done = jax.block_until_ready(
            advance_stream(self.program, self.arguments, self.encoded, self.state, every)
        )
        result, done = jax.device_get((result, done))
        return trim_result(result, self.decode), bool(done)

    def change_drafter(self, drafting: Drafting) -> None:
        """Goes on with another drafter of the same acceptance rule, after the text so far."""
        self.start()
        self.program = generation.make_program(self.cfg, self.decode, drafting)
        self.arguments = self.arguments._replace(weights=drafting.weights)
        self.state = change_state(self.program, self.arguments, self.encoded, self.state)


@functools.partial(jax.jit, static_argnums=0)
def start_stream(
    program: DecodeProgram, arguments: DecodeArguments
) -> tuple[model.EncoderMemory, DecodeState]:
    """Encodes the inputs, and returns them with the loop's first state."""
    encoded, cache = generation.read_request(program, arguments.params, arguments.request)
    context = stream_context(program, arguments, encoded)
    drafter_state = program.drafter.begin(context)
    state = generation.initial_state(context, cache, context.slots, drafter_state)
    companion_state = generation.begin_companion(
        program, arguments.request, arguments.rules.companion
    )
    state = state._replace(companion_state=companion_state)
    return encoded, generation.begin_drafting(context, program.drafter, state)


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
    result = loop_result(state, context.prompts, program.length, arguments.penalty)
    result, done = jax.tree.map(lambda x: jax.reshard(x, P()), (result, jnp.all(state.done)))
    return state, result, done


@functools.partial(jax.jit, static_argnums=0)
def change_state(
    program: DecodeProgram,
    arguments: DecodeArguments,
    encoded: model.EncoderMemory,
    state: DecodeState,
) -> DecodeState:
    """Prepares the state of one drafter for another one, to which the text so far is the prompt.

    Args:
      program: static arguments, with the new drafter, whose block is not narrower.
      arguments: traced arguments, with its weights.
      encoded: the encoded inputs.
      state: state of the loop with the former drafter.

    Returns:
      The state, with room for the new drafter's blocks.
    """
    context = stream_context(program, arguments, encoded)
    added = context.slots - state.tokens.shape[1]

    def widen(array):
        return jnp.pad(array, ((0, 0), (0, added), *((0, 0),) * (array.ndim - 2)))

    def widen_cache(cache):
        return tuple(store.widen(added) for store in cache)

    stores = model.empty_cache(
        program.cfg, len(state.tokens), context.slots, scan=False, form=program.kv_cache
    )
    pairs = zip(stores, state.cache, strict=True)
    by_slot = {name: getattr(state, name) for name in ("tokens", "token_step", "token_node")}
    by_slot["details"] = state.details
    state = state._replace(**jax.tree.map(widen, by_slot))
    state = state._replace(
        cache=tuple(store.load(old, state.length) for store, old in pairs),
        companion_state=replace_cache(state.companion_state, widen_cache),
    )
    text = context._replace(prompts=Prompts(state.tokens, state.length + 1))
    state = state._replace(drafter_state=program.drafter.begin(text))
    return generation.begin_drafting(context, program.drafter, state)


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
