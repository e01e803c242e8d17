# SPDX-License-Identifier: Apache-2.0
"""Verification of a block: one forward pass, the logits processors, and the acceptance rule.

b rows    w nodes of a block    D most tokens that one step can add    v vocabulary
d model width
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from t5x_lite import sharding
from t5x_lite.decoding import sampling
from t5x_lite.decoding.acceptance import exact
from t5x_lite.decoding.commit import count_committed
from t5x_lite.decoding.companions.companion import BlockView, combine_logits
from t5x_lite.decoding.protocol import (
    DecodeContext,
    DecodeState,
    Draft,
    Drafter,
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
    view = BlockView(jnp.maximum(block, 0), state.length, context.prompts.length, tree)
    cache = state.cache if draft.cache is None else draft.cache
    middle = getattr(drafter, "middle", None)
    hidden, cache, inner = forward_block(context, view, cache, () if middle is None else (middle,))
    logits = target.logits(hidden)
    combined = combine_logits(context.companion, target, state.companion_state, view, inner, logits)
    steered = process_logits(context, state, tree, block, combined.logits)
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
        middle=None if middle is None else inner[middle],
        details=describe_tokens(context, along, take_path(tree, steered, path), tokens),
        companion_state=combined.state,
        by_model=None if combined.by_model is None else take_path(tree, combined.by_model, path),
        entropy=None if combined.entropy is None else take_path(tree, combined.entropy, path),
    ), cache


def take_path(
    tree: Tree, values: Shaped[Array, "b w ..."], path: Int[Array, "b D"]
) -> Shaped[Array, "b D ..."]:
    """Takes the values of the nodes of a path.

    Args:
      tree: shape of the block; the path of a chain is its nodes.
      values: logits or another value of each node.
      path: the nodes.
    """
    return values if tree.is_chain else jax.vmap(lambda row, nodes: row[nodes])(values, path)


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
    details = TokenDetails(
        log_probability=token_log_probability(logits, tokens),
        top_tokens=ids,
        top_log_probability=best - total[..., None],
        truncated=sampling.truncated_mass(steered, context.sampling),
    )
    return sharding.by_rows(details)


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
      logits: logits after each node.
    """
    if not context.processors.rules:
        return logits
    text = Text(state.tokens, state.length + 1, context.prompts.length)
    paths = draft_paths(tree.paths, tree.depth, block)
    return context.processors.process(state.processor_states, text, paths, logits)


def forward_block(
    context: DecodeContext, view: BlockView, cache: Any, layers: tuple[int, ...] = ()
) -> tuple[Float[Array, "b w d"], Any, dict[int, Float[Array, "b w d"]]]:
    """Runs Target.forward, in as many parts as it takes to see the inputs of some layers.

    Args:
      context: constants of the request; the layers of its companion are among those visited.
      view: the block.
      cache: cache of all layers.
      layers: layers whose input is returned.

    Returns:
      Hidden states and cache, as Target.forward, and the inputs by number of the layer.
    """
    target, companion = context.target, context.companion
    visited = sorted({*layers, *(() if companion is None else companion.layers)})
    if not visited:
        return *target.forward(view.tokens, view.index, cache, view.tree), {}
    layer_range = not_none(target.layer_range)
    x, inner = layer_range(0, visited[0]).embed(view.tokens, view.index), {}
    for first, last in zip([0, *visited], [*visited, target.num_layers], strict=True):
        part = layer_range(first, last)
        x, filled = part.apply_layers(x, view.index, part.take_cache(cache), view.tree)
        cache = part.put_cache(cache, filled)
        inner[last] = x
    return part.final_norm(x), cache, inner


def token_log_probability(
    logits: Float[Array, "b w v"], tokens: Int[Array, "b w"]
) -> Float[Array, "b w"]:
    """Log-probabilities of tokens under the model itself: no temperature, top-k or top-p."""
    here = jnp.arange(logits.shape[-1]) == tokens[..., None]
    return jnp.sum(jnp.where(here, logits, 0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)
