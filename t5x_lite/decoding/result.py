# SPDX-License-Identifier: Apache-2.0
"""Texts of a request: the new tokens of each row, with what is known of each token.

b rows    n texts per row    T slots of a row    L new tokens, at most    k alternatives
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from t5x_lite import config, sharding
from t5x_lite.decoding import beam
from t5x_lite.decoding.beam_ranking import BeamHypotheses, LengthPenalty
from t5x_lite.decoding.beam_selection import take_beams
from t5x_lite.decoding.protocol import DecodeState, Prompts, TokenDetails
from t5x_lite.decoding.request import count_samples


class Result(NamedTuple):
    """Decoded texts, the best one first: jax arrays of a program, numpy arrays once fetched.

    Attributes:
      tokens: [b n L], padded with 0.
      lengths: [b n], EOS counted.
      scores: [b n], log_probability over the length penalty; ranks beams.
      log_probability: [b n], summed over the tokens.
      steps: number of forward passes.
      token_step: [b n L], the forward pass that wrote each token; None after beam search.
      token_node: [b n L], the node of the block whose draft a token was, 0 for the model's own
        choice; None after beam search.
      details: TokenDetails [b n L], [b n L k], if the request asks for them.
      model_tokens: [b n], number of tokens that the model itself decided; None without a companion
        that switches.
    """

    tokens: Any
    lengths: Any
    scores: Any
    log_probability: Any
    steps: Any
    token_step: Any = None
    token_node: Any = None
    details: TokenDetails | None = None
    model_tokens: Any = None


def trim_result(result: Result, decode: config.Decode) -> Result:
    """Cuts the arrays of a result, whose L is a bucket, and collects the samples of each row."""
    samples, length = count_samples(decode), max(decode.max_new_tokens, 1)

    def collect(array):
        # By its size and not -1: without alternatives, an array of them is empty.
        rows = len(array) // samples
        texts = array if samples == 1 else array.reshape(rows, samples, *array.shape[2:])
        return texts[:, :, :length] if texts.ndim > 2 else texts

    steps = int(result.steps)
    return jax.tree.map(collect, result._replace(steps=None))._replace(steps=steps)


def loop_result(
    state: DecodeState, prompts: Prompts, length: int, penalty: LengthPenalty
) -> Result:
    """Returns the text that each row has after its prompt.

    Args:
      state: state of the loop.
      prompts: the prompts.
      length: L.
      penalty: length penalty.
    """
    lengths = state.length + 1 - prompts.length

    def new(slots):
        return slice_new_tokens(slots, prompts.length, lengths, length)[:, None]

    scores = state.log_probability / penalty.divisor(lengths)
    companion = state.companion_state
    return Result(
        tokens=new(state.tokens),
        lengths=lengths[:, None],
        scores=scores[:, None],
        log_probability=state.log_probability[:, None],
        steps=state.steps,
        token_step=new(state.token_step),
        token_node=new(state.token_node),
        details=jax.tree.map(new, state.details),
        model_tokens=None if companion is None else companion.model_tokens[:, None],
    )


def beam_result(state: beam.BeamState, search: beam.BeamSearch, length: int) -> Result:
    """Returns the n best finished texts of each row.

    Args:
      state: last state of the search.
      search: its settings.
      length: L.
    """
    finished, prompt = join_groups(search, state)
    finished = jax.tree.map(lambda x: x[:, : search.n_best], finished)

    def new(tokens, lengths):
        return slice_new_tokens(tokens, prompt, lengths, length)

    return Result(
        tokens=jax.vmap(new, in_axes=1, out_axes=1)(finished.tokens, finished.lengths),
        lengths=finished.lengths,
        scores=finished.score,
        log_probability=finished.log_probability,
        steps=state.steps,
    )


def join_groups(
    search: beam.BeamSearch, state: beam.BeamState
) -> tuple[BeamHypotheses, Int[Array, " b"]]:
    """Returns the finished texts of all groups of a request, best first, and the prompts' lengths.

    Args:
      search: settings.
      state: last state of the search, whose rows are groups.
    """
    if search.groups == 1:
        return state.finished, state.prompt

    def join(x: Array) -> Array:
        place = jax.typeof(x).sharding.spec
        shape = (x.shape[0] // search.groups, search.groups * x.shape[1], *x.shape[2:])
        return jnp.reshape(x, shape, out_sharding=place)

    every = jax.tree.map(join, state.finished)
    _, order = jax.lax.top_k(every.score, every.score.shape[1])
    every = jax.tree.map(lambda x: take_beams(x, order), every)
    return sharding.by_rows((every, join(state.prompt[:, None])[:, 0]))


def slice_new_tokens(
    tokens: Shaped[Array, "b T ..."],
    start: Int[Array, " b"],
    lengths: Int[Array, " b"],
    size: int,
) -> Shaped[Array, "b L ..."]:
    """Takes the slots after the prompts.

    Args:
      tokens: the rows, of tokens or of any other numbers per slot.
      start: first slot after each prompt.
      lengths: how many slots of each row to keep; those after them are set to 0.
      size: L.

    Returns:
      The slots start[b], start[b] + 1, ...
    """

    def take(row, start):
        return jax.lax.dynamic_slice_in_dim(row, start, size)

    tokens = jax.vmap(take)(tokens, start)
    inside = jnp.arange(size) < lengths[:, None]
    return jnp.where(jnp.expand_dims(inside, range(2, tokens.ndim)), tokens, 0)
