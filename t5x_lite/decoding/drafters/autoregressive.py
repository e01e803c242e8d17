# SPDX-License-Identifier: Apache-2.0
"""Drafting one token after the other: what drafters that are models share.

b rows    d model width    v vocabulary
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite.decoding import sampling
from t5x_lite.decoding.protocol import DecodeContext, DecodeState, Draft, LayerRange, Tree

# step(tokens [b], number, cache) -> (logits [b v] of the next token, cache)
DraftStep = Callable[[Int[Array, " b"], Any, Any], tuple[Float[Array, "b v"], Any]]


class Proposer(NamedTuple):
    """An autoregressive model that drafts a chain.

    Attributes:
      count: number of drafts.
      step: computes the logits after a token; `number` counts the drafts from 0.
      first: computes those after the root, if not `step`.
      stochastic: sample the drafts with noise of their own, and return their distributions, for
        speculative acceptance. Otherwise drafts are chosen with the noise of the model's own
        choice, so that exact acceptance agrees with them as often as the two models agree.
    """

    count: int
    step: DraftStep
    first: DraftStep | None = None
    stochastic: bool = False


def propose_chain(
    context: DecodeContext, state: DecodeState, proposer: Proposer, cache: Any
) -> tuple[Draft, Any]:
    """Drafts a chain after the root.

    Args:
      context: constants of the request.
      state: state of the loop.
      proposer: the model.
      cache: its cache, passed from step to step.

    Returns:
      The draft and the cache.
    """

    def draft_next(carry, number, step=proposer.step):
        token, cache = carry
        logits, cache = step(token, number, cache)
        token, log_probability = draft_token(context, state, logits, number, proposer.stochastic)
        return (token, cache), (token, log_probability)

    carry, head, begin = (state.root, cache), None, 0
    if proposer.first is not None:
        carry, head = draft_next(carry, 0, proposer.first)
        head, begin = jax.tree.map(lambda x: x[None], head), 1
    (_, cache), drafts = jax.lax.scan(draft_next, carry, jnp.arange(begin, proposer.count))
    if head is not None:
        drafts = jax.tree.map(lambda *parts: jnp.concatenate(parts), head, drafts)
    tokens, log_probability = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), drafts)
    return Draft(tokens, log_probability), cache


def draft_token(
    context: DecodeContext,
    state: DecodeState,
    logits: Float[Array, "b v"],
    number: Any,
    stochastic: bool,
) -> tuple[Int[Array, " b"], Float[Array, "b v"] | None]:
    """Chooses or samples one draft token.

    Args:
      context: constants of the request.
      state: state of the loop.
      logits: the drafter's logits.
      number: number of the draft after the root, from 0.
      stochastic: sample it, and return its distribution.

    Returns:
      The tokens, and their log-distribution or None.
    """
    begin, params = state.length + 1, context.sampling
    position = begin + number
    if not stochastic:
        return sampling.choose_tokens(logits[:, None], position[:, None], params)[:, 0], None
    log_probability = sampling.log_distribution(logits[:, None], params)[:, 0]
    if params is None:
        return jnp.argmax(log_probability, axis=-1).astype(jnp.int32), log_probability
    return sampling.sample_draft(log_probability, begin, position, params), log_probability


def check_layer_number(layers: int, name: str, layer: int) -> None:
    """Checks the layer at which a drafter divides the decoder.

    Args:
      layers: number of the decoder's layers.
      name: name of the drafter's field.
      layer: its value.

    Raises:
      ValueError: the decoder has too few layers, or one part would be empty.
    """
    if not 1 <= layer < layers:
        raise ValueError(
            f"{name} is {layer}, but the decoder has {layers} layers: it must be in 1..{layers - 1}"
        )


def propose_with_layers(
    context: DecodeContext,
    state: DecodeState,
    layers: LayerRange,
    embed: Callable[[Int[Array, " b"], Int[Array, " b"]], Float[Array, "b 1 d"]],
    tree: Tree,
    stochastic: bool,
) -> Draft:
    """Drafts a chain with some of the target's own layers, its final norm and its output head.

    Their keys and values go into the target's own cache, after the root, where the block that
    verifies the drafts overwrites them.

    Args:
      context: constants of the request.
      state: state of the loop.
      layers: the layers.
      embed: (tokens, index) -> their input.
      tree: the chain.
      stochastic: sample the drafts, and return their distributions.

    Returns:
      The draft, with the cache.
    """

    def step(token, number, cache):
        index = state.length + number
        x, cache = layers.apply_layers(embed(token, index), index, cache)
        return context.target.logits(layers.final_norm(x))[:, 0], cache

    proposer = Proposer(tree.width - 1, step, stochastic=stochastic)
    draft, cache = propose_chain(context, state, proposer, layers.take_cache(state.cache))
    return draft._replace(cache=layers.put_cache(state.cache, cache))
