# SPDX-License-Identifier: Apache-2.0
"""Rows that fork: texts that are stopped after a segment, judged on the host, dropped or doubled.

A DecodeState is a value, so stopped rows can be taken again in any order and number: one gather
over every array of a row, its cache included. A row goes on as if it had never stopped.

b rows    m rows after a gather    T slots of a row    L new tokens, at most
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int, UInt32

from t5x_lite import config, model, sharding
from t5x_lite.decoding import commit, generation, streaming
from t5x_lite.decoding.generation import PLAIN, DecodeProgram, Drafting
from t5x_lite.decoding.protocol import DecodeState, StoppingCriteria
from t5x_lite.decoding.request import SEED_STEP, Request
from t5x_lite.decoding.result import Result, loop_result
from t5x_lite.decoding.sampling import SamplingParams
from t5x_lite.decoding.steering.stop_strings import StopStrings, StopTable
from t5x_lite.decoding.streaming import DecodeArguments
from t5x_lite.model.computation import with_dtype_of


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["strings", "delimiters"], meta_fields=[]
)
@dataclass(frozen=True)
class SegmentStops:
    """Stops a row with the token that completes a stop string or the segment's delimiter.

    Attributes:
      strings: texts that end a row; None for none.
      delimiters: texts that end a segment; None for none.
    """

    strings: StopStrings | None
    delimiters: StopStrings | None

    def complete(self, state: tuple, tokens: Int[Array, "b D"]) -> Bool[Array, "b D"]:
        """Returns True for each token at which a text is complete."""
        parts = zip((self.strings, self.delimiters), state, strict=True)
        ended = [part.complete(each, tokens) for part, each in parts if part is not None]
        return functools.reduce(jnp.logical_or, ended)

    def observe(self, state: tuple, tokens: Int[Array, "b D"], count: Int[Array, " b"]) -> tuple:
        """Returns the states after more tokens.

        Args:
          state: states before them.
          tokens: tokens that were added.
          count: how many of them.
        """
        parts = zip((self.strings, self.delimiters), state, strict=True)
        return tuple(part and part.observe(each, tokens, count) for part, each in parts)


class Forks(NamedTuple):
    """Rows that have stopped; a value, on the mesh.

    Attributes:
      request: prompt, limit and inputs of each row; its eos is None.
      sampling: how each row is sampled; None if greedily.
      encoded: the encoded inputs.
      state: state of the loop.
      exists: False for rows that only fill up the mesh.
    """

    request: Request
    sampling: SamplingParams | None
    encoded: model.EncoderMemory
    state: DecodeState
    exists: Bool[Array, " b"]


class ForkedTexts(NamedTuple):
    """New tokens of rows that have stopped, on the host.

    Attributes:
      tokens: of each row.
      log_probability: of each row, in nats, summed over its tokens.
      done: rows that have ended: by EOS, a stop string or the limit.
      result: the same with all that is known of each token.
    """

    tokens: list[list[int]]
    log_probability: list[float]
    done: list[bool]
    result: Result


class ForkedDecoder:
    """Decodes one prompt in rows that fork.

    Attributes:
      program: static arguments of the compiled programs.
      arguments: traced arguments.
      delimiters: texts that end a segment; None for none.
      seeds: number of seeds that rows have had; no two have the same one.
      passes: forward passes so far.
      row_passes: the same, times the rows of each.
    """

    def __init__(
        self,
        cfg: config.Model,
        params: Any,
        request: Request,
        decode: config.Decode,
        drafting: Drafting = PLAIN,
        delimiters: StopTable | None = None,
    ):
        self.program = generation.make_program(with_dtype_of(cfg, params), decode, drafting)
        self.arguments = streaming.place_arguments(params, request, decode, drafting)
        arrays: Any = delimiters
        self.delimiters = None if delimiters is None else StopStrings(*arrays)
        self.first_seed, self.seeds, self.passes, self.row_passes = decode.seed, 1, 0, 0

    def begin(self, rows: int) -> Forks:
        """Reads the first prompt of the request, and returns it in so many rows.

        Row n is drawn with the seed of the nth of several samples.
        """
        encoded, state = streaming.start_stream(self.program, self.arguments)
        request, rules = self.arguments.request._replace(eos=None), self.arguments.rules
        exists = jnp.ones_like(state.done)
        return self.fork(Forks(request, rules.sampling, encoded, state, exists), [0] * rows)

    def fork(self, forks: Forks, sources: Sequence[int], keep: bool = True) -> Forks:
        """Takes rows, each any number of times.

        A row goes on with the noise of its seed, and every copy with that of a seed of its own.

        Args:
          forks: the rows.
          sources: number of the row that each new row continues.
          keep: the first row that continues another one has its seed; if False, none has.
        """
        filled = [*sources, *[sources[0]] * (-len(sources) % sharding.batch_shards())]
        # Rows that fill up take no seed: samples are the same on any mesh.
        first = np.arange(len(filled)) >= len(sources)
        first[np.unique(sources, return_index=True)[1]] = keep
        fresh = self.seeds + np.cumsum(~first) - 1
        self.seeds += int((~first).sum())
        seeds = (self.first_seed + fresh.astype(np.uint64) * SEED_STEP).astype(np.uint32)
        exists = np.arange(len(filled)) < len(sources)
        return gather_rows(forks, np.array(filled, np.int32), first, seeds, exists)

    def advance(self, forks: Forks, tokens: int) -> tuple[Forks, ForkedTexts]:
        """Decodes a segment of every row.

        Args:
          forks: the rows.
          tokens: most tokens of the segment; a delimiter ends it too.

        Returns:
          The rows after it, and their texts.
        """
        segment = np.int32(min(tokens, self.program.length))
        forks, outcome = advance_rows(self.program, self.arguments, forks, segment, self.delimiters)
        result, done, exists, passes = jax.device_get(outcome)
        self.passes += int(passes)
        self.row_passes += int(passes) * len(exists)
        result = jax.tree.map(lambda x: x[exists] if np.ndim(x) else x, result)
        lengths = result.lengths[:, 0]
        return forks, ForkedTexts(
            tokens=[
                row[:size].tolist() for row, size in zip(result.tokens[:, 0], lengths, strict=True)
            ],
            log_probability=result.log_probability[:, 0].tolist(),
            done=done[exists].tolist(),
            result=result,
        )


@jax.jit
def gather_rows(
    forks: Forks,
    sources: Int[Array, " m"],
    first: Bool[Array, " m"],
    seeds: UInt32[Array, " m"],
    exists: Bool[Array, " m"],
) -> Forks:
    """Takes rows: every array of a row moves with it.

    Args:
      forks: the rows.
      sources: the row that each new row is.
      first: rows that keep their seed.
      seeds: seeds of the others.
      exists: False for rows that only fill up the mesh, and are done.
    """

    def take(x: Array) -> Array:
        return x.at[sources].get(out_sharding=jax.typeof(x).sharding.spec) if x.ndim else x

    # Of what a row has, only the number of steps is common to all.
    taken = jax.tree.map(take, forks)
    rows = sharding.spec("batch")
    exists, first, seeds = (jax.reshard(x, rows) for x in (exists, first, seeds))
    sampling = taken.sampling
    if sampling is not None:
        sampling = sampling._replace(seed=jnp.where(first, sampling.seed, seeds))
    state = taken.state._replace(done=taken.state.done | ~exists)
    return taken._replace(sampling=sampling, state=state, exists=exists)


@functools.partial(jax.jit, static_argnums=0)
def advance_rows(
    program: DecodeProgram,
    arguments: DecodeArguments,
    forks: Forks,
    tokens: Int[Array, ""],
    delimiters: StopStrings | None,
) -> tuple[Forks, tuple]:
    """Decodes a segment of every row; rows whose segment has ended wait for the others.

    Args:
      program: static arguments.
      arguments: traced arguments.
      forks: the rows.
      tokens: most tokens of the segment.
      delimiters: texts that end it.

    Returns:
      The rows after it; and the result so far, which rows are done, which exist, and the number of
      forward passes of the segment.
    """
    request = forks.request._replace(eos=arguments.request.eos)
    rules = arguments.rules._replace(sampling=forks.sampling)
    arguments = arguments._replace(request=request, rules=rules)
    context = streaming.stream_context(program, arguments, forks.encoded)
    before, stopping = forks.state, context.stopping
    paused = stopping._replace(limit=jnp.minimum(stopping.limit, before.length + 1 + tokens))
    state = before
    if delimiters is not None:
        strings: Any = SegmentStops(stopping.strings, delimiters)
        paused = paused._replace(strings=strings)
        begun = (before.stop_state, delimiters.begin(before.length))
        state = before._replace(stop_state=begun)
    state = generation.run_decoding(program, context._replace(stopping=paused), state)
    if delimiters is not None:
        state = state._replace(stop_state=state.stop_state[0])
    state = state._replace(done=before.done | find_ended(stopping, state))
    result = loop_result(state, context.prompts, program.length, arguments.penalty)
    outcome = (result, state.done, forks.exists, state.steps - before.steps)
    outcome = jax.tree.map(lambda x: jax.reshard(x, P()), outcome)
    return forks._replace(state=state), outcome


def find_ended(stopping: StoppingCriteria, state: DecodeState) -> Bool[Array, " b"]:
    """Returns True for rows whose last token ends the text, not only the segment."""
    ended = commit.ends_text(state.root, stopping) | (state.length + 1 >= stopping.limit)
    if stopping.strings is None:
        return ended
    return ended | (state.stop_state == stopping.strings.last)
