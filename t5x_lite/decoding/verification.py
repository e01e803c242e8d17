# SPDX-License-Identifier: Apache-2.0
"""Verification of a block: one forward pass, the logits processors, and the acceptance rule.

b rows    w nodes of a block    D most tokens that one step can add    v vocabulary
d model width
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite import sharding
from t5x_lite.decoding import sampling
from t5x_lite.decoding.acceptance import exact
from t5x_lite.decoding.commit import count_committed
from t5x_lite.decoding.protocol import (
    DecodeContext,
    DecodeState,
    Draft,
    Drafter,
    Target,
    TokenDetails,
    Tree,
    VerifyOutput,
    VerifySpec,
)
from t5x_lite.decoding.steering.processor import Text, draft_paths
from t5x_lite.utils.not_none import not_none


def verify(
    context: DecodeContext,
    drafter: Drafter | VerifySpec,
    accept: exact.Acceptance,
    state: DecodeState,
    draft: Draft,
) -> tuple[VerifyOutput, Any]:
    """Runs one forward pass over root and drafts, and applies the acceptance rule.

    Args:
      context: constants of the request.
      drafter: gives the shape of the block and which outputs it needs.
      accept: the acceptance rule.
      state: state of the loop before the step.
      draft: the draft tokens.

    Returns:
      The output, and the cache with the block in the slots from length[b] on.
    """
    target, tree = context.target, drafter.tree
    block = jnp.concatenate(sharding.by_rows([state.root[:, None], draft.tokens]), axis=1)
    # -1 matches nothing, but embeds as some token; its keys and values are overwritten.
    tokens = jnp.maximum(block, 0)
    cache = state.cache if draft.cache is None else draft.cache
    middle = getattr(drafter, "middle", None)
    if middle is None:
        hidden, cache = target.forward(tokens, state.length, cache, tree)
    else:
        hidden, cache, middle = forward_in_two(target, middle, tokens, state.length, cache, tree)
    logits = target.logits(hidden)
    steered = process_logits(context, state, tree, block, logits)
    positions = state.length[:, None] + 1 + tree.depth
    chosen = sampling.choose_tokens(steered, positions, context.sampling)
    path, tokens, count = accept(
        exact.VerifyInput(block, steered, chosen, draft, positions, tree, context.sampling)
    )
    along = take_path(tree, logits, path)
    return VerifyOutput(
        block=block,
        chosen=chosen,
        hidden=hidden,
        top=jax.lax.top_k(steered, drafter.top)[1] if drafter.top else None,
        path=path,
        tokens=tokens,
        log_probability=token_log_probability(along, tokens),
        count=count_committed(tokens, count, context.stopping, state),
        middle=middle,
        details=describe_tokens(context, along, take_path(tree, steered, path), tokens),
    ), cache


def take_path(
    tree: Tree, logits: Float[Array, "b w v"], path: Int[Array, "b D"]
) -> Float[Array, "b D v"]:
    """Takes the logits after the nodes of a path.

    Args:
      tree: shape of the block; the path of a chain is its nodes.
      logits: scores after each node.
      path: the nodes.
    """
    return logits if tree.is_chain else jax.vmap(lambda row, nodes: row[nodes])(logits, path)


def describe_tokens(
    context: DecodeContext,
    logits: Float[Array, "b D v"],
    steered: Float[Array, "b D v"],
    tokens: Int[Array, "b D"],
) -> TokenDetails | None:
    """Returns the probabilities of tokens and of their alternatives, if the request asks for them.

    Args:
      context: constants of the request.
      logits: the model's logits at each token.
      steered: the same after the logits processors.
      tokens: the tokens.
    """
    if context.logprobs is None:
        return None
    best, ids = jax.lax.top_k(logits, context.logprobs)
    total = jax.nn.logsumexp(logits, axis=-1)
    return TokenDetails(
        log_probability=token_log_probability(logits, tokens),
        top_tokens=ids,
        top_log_probability=best - total[..., None],
        truncated=sampling.truncated_mass(steered, context.sampling),
    )


def process_logits(
    context: DecodeContext,
    state: DecodeState,
    tree: Tree,
    block: Int[Array, "b w"],
    logits: Float[Array, "b w v"],
) -> Float[Array, "b w v"]:
    """Applies the logits processors of the request.

    Args:
      context: constants of the request.
      state: state of the loop before the step.
      tree: shape of the block.
      block: root and draft tokens.
      logits: the model's logits after each node.
    """
    if not context.processors.rules:
        return logits
    text = Text(state.tokens, state.length + 1, context.prompts.length)
    paths = draft_paths(tree.paths, tree.depth, block)
    return context.processors.process(state.processor_states, text, paths, logits)


def forward_in_two(
    target: Target,
    middle: int,
    tokens: Int[Array, "b w"],
    index: Int[Array, " b"],
    cache: Any,
    tree: Tree,
) -> tuple[Float[Array, "b w d"], Any, Float[Array, "b w d"]]:
    """Runs Target.forward in two parts, to see the input of layer `middle`.

    Args:
      target: the model.
      middle: first layer of the second part.
      tokens: the block.
      index: slot of each row's root.
      cache: cache of all layers.
      tree: shape of the block.

    Returns:
      Hidden states and cache, as Target.forward, and the input of layer `middle`.
    """
    layer_range = not_none(target.layer_range)
    early = layer_range(0, middle)
    late = layer_range(middle, target.num_layers)
    x, part = early.apply_layers(early.embed(tokens, index), index, early.take_cache(cache), tree)
    cache = early.put_cache(cache, part)
    y, part = late.apply_layers(x, index, late.take_cache(cache), tree)
    return late.final_norm(y), late.put_cache(cache, part), x


def token_log_probability(
    logits: Float[Array, "b w v"], tokens: Int[Array, "b w"]
) -> Float[Array, "b w"]:
    """Log-probabilities of tokens under the model itself: no temperature, top-k or top-p."""
    here = jnp.arange(logits.shape[-1]) == tokens[..., None]
    return jnp.sum(jnp.where(here, logits, 0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)
