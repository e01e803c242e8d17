# SPDX-License-Identifier: Apache-2.0
"""Appending of accepted tokens to the rows, up to their ends.

b rows    w nodes of a block    D most tokens that one step can add    T slots of a row
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from t5x_lite import sharding
from t5x_lite.decoding.companions.companion import observe_entropy
from t5x_lite.decoding.protocol import (
    DecodeContext,
    DecodeState,
    StoppingCriteria,
    Tree,
    VerifyOutput,
)


def count_committed(
    tokens: Int[Array, "b D"],
    count: Int[Array, " b"],
    stopping: StoppingCriteria,
    state: DecodeState,
) -> Int[Array, " b"]:
    """Cuts the accepted tokens off after EOS or a stop string, and at the limit of the row.

    Args:
      tokens: accepted tokens.
      count: how many of them are accepted.
      stopping: EOS and limits.
      state: state of the loop before the step.

    Returns:
      How many tokens each row takes; 0 where it is done.
    """
    stops = ends_row(tokens, stopping, state)
    # Without EOS in the block, argmax is 0: then nothing is cut.
    first_stop = jnp.where(jnp.any(stops, axis=1), jnp.argmax(stops, axis=1) + 1, count)
    count = jnp.minimum(count, jnp.minimum(first_stop, stopping.limit - 1 - state.length))
    return jnp.where(state.done, 0, count).astype(jnp.int32)


def commit(
    context: DecodeContext, state: DecodeState, tree: Tree, output: VerifyOutput
) -> DecodeState:
    """Appends the accepted tokens to each row.

    The cache of a chain stays as it is: `length` alone says how much of it is valid. The accepted
    nodes of a tree are moved to where a chain would have left them.

    Args:
      context: constants of the request.
      state: state before the step, with the cache that holds the block.
      tree: shape of the block.
      output: what was accepted.

    Returns:
      The state after the step; the drafter's state is unchanged.
    """
    stopping, tokens, count = context.stopping, output.tokens, output.count
    place = jnp.arange(tokens.shape[1])
    last = place == count[:, None] - 1
    root = jnp.where(state.done, state.root, jnp.sum(jnp.where(last, tokens, 0), axis=1))
    length = state.length + count
    ended = jnp.any(last & ends_row(tokens, stopping, state), axis=1)
    gain = jnp.sum(jnp.where(place < count[:, None], output.log_probability, 0), axis=1)
    # The token after node path[i] is the draft of node path[i + 1] if that one was accepted.
    depths = np.arange(tokens.shape[1])
    following = sharding.by_rows(output.path[:, np.minimum(depths + 1, depths[-1])])
    node = jnp.where(place < count[:, None] - 1, following, 0)
    first = state.length + 1
    details = jax.tree.map(
        lambda slots, new: write_block(slots, new, first), state.details, output.details
    )
    cache = state.cache
    if not tree.is_chain:
        cache = compact_cache(cache, state.length, output.path)
    return state._replace(
        tokens=write_block(state.tokens, tokens, first),
        length=length,
        root=root,
        done=state.done | ended | (length + 1 >= stopping.limit),
        log_probability=state.log_probability + gain,
        token_step=write_block(state.token_step, jnp.zeros_like(tokens) + state.steps, first),
        token_node=write_block(state.token_node, node, first),
        steps=state.steps + 1,
        cache=cache,
        processor_states=context.processors.observe(state.processor_states, tokens, count),
        details=details,
        stop_state=stopping.strings and stopping.strings.observe(state.stop_state, tokens, count),
        companion_state=commit_companion(context, state, tree, output),
    )


def commit_companion(
    context: DecodeContext, state: DecodeState, tree: Tree, output: VerifyOutput
) -> Any:
    """Returns the state of the companion after the step; None without one.

    Args:
      context: constants of the request.
      state: state before the step.
      tree: shape of the block.
      output: what was accepted, and the companion's state with the block in its cache.
    """
    companion_state: Any = output.companion_state
    if companion_state is None:
        return None
    if companion_state.cache is not None and not tree.is_chain:
        index = state.length + companion_state.prompt - context.prompts.length
        cache = compact_cache(companion_state.cache, index, output.path)
        companion_state = companion_state._replace(cache=cache)
    if output.by_model is not None:
        taken = output.by_model & (jnp.arange(output.by_model.shape[1]) < output.count[:, None])
        count = companion_state.model_tokens + jnp.sum(taken, axis=1, dtype=jnp.int32)
        companion_state = companion_state._replace(model_tokens=count)
    return observe_entropy(companion_state, output.entropy, output.count)


def compact_cache(cache: Any, index: Int[Array, " b"], path: Int[Array, "b D"]) -> Any:
    """Copies the slots of a path to where a chain would have left them.

    Args:
      cache: stores of every layer.
      index: slot of each row's root.
      path: nodes whose slots, index + path, move to index, index + 1, ...

    Returns:
      The new cache.
    """
    return tuple(store.compact(index, path) for store in cache)


def ends_row(
    tokens: Int[Array, "b D"], stopping: StoppingCriteria, state: DecodeState
) -> Bool[Array, "b D"]:
    """Returns True for each token that is an EOS or completes a stop string.

    Args:
      tokens: tokens after the root.
      stopping: EOS and stop strings.
      state: state of the loop before the step.
    """
    stops = ends_text(tokens, stopping)
    if stopping.strings is None:
        return stops
    return stops | stopping.strings.complete(state.stop_state, tokens)


def ends_text(tokens: Int[Array, "..."], stopping: StoppingCriteria) -> Bool[Array, "..."]:
    """Returns True for each token that is an EOS."""
    return jnp.any(tokens[..., None] == jnp.atleast_1d(stopping.eos), axis=-1)


def write_block(
    tokens: Shaped[Array, "b T ..."], block: Shaped[Array, "b w ..."], index: Int[Array, " b"]
) -> Shaped[Array, "b T ..."]:
    """Writes a block into each row.

    Args:
      tokens: the rows.
      block: what to write.
      index: slot of the first token written.

    Returns:
      The new rows.
    """
    return jax.vmap(jax.lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))(
        tokens, block, index, 0
    )
