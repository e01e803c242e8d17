# SPDX-License-Identifier: Apache-2.0
"""The decoding loop: propose, verify a block in one forward pass, accept, commit, observe.

  b rows    w nodes of a block    D most tokens that one step can add    T slots of a row
  v vocabulary    d model width

Slot i of a row holds its token at position i; a prompt comes first. Invariants between steps:
  slots [0, length[b]) of the cache equal a fresh prefill of tokens[b, :length[b]];
  slots from length[b] on are overwritten before they are read;
  tokens[b, length[b]] is root[b], chosen but not yet in the cache;
  a row that is not done grows by at least one token per step;
  a row's text depends on no other row.
Plain decoding is the loop at width 1.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from t5x_lite import sharding
from t5x_lite.decoding import sampling
from t5x_lite.decoding.acceptance import exact
from t5x_lite.decoding.protocol import (
    DecodeContext,
    DecodeState,
    Draft,
    Drafter,
    StoppingCriteria,
    Target,
    TokenDetails,
    Tree,
    VerifyOutput,
    VerifySpec,
    chain,
)
from t5x_lite.decoding.steering.processor import Text, draft_paths
from t5x_lite.utils.not_none import not_none


@dataclass(frozen=True)
class Plain:
    """Drafter of plain decoding: no drafts, one token per forward pass.

    Attributes:
      tree: the root alone.
      top: 0.
    """

    tree: Tree = chain(1)
    top: int = 0

    def begin(self, context: DecodeContext) -> None:
        """Returns no state."""

    def propose(self, context: DecodeContext, drafter_state: None, state: DecodeState):
        """Returns an empty draft.

        Args:
          context: constants of the request; unused.
          drafter_state: None.
          state: state of the loop.
        """
        return Draft(state.root[:, None][:, :0]), drafter_state

    def observe(
        self, context: DecodeContext, drafter_state: None, state: DecodeState, output: VerifyOutput
    ) -> None:
        """Returns no state.

        Args:
          context: constants of the request; unused.
          drafter_state: None.
          state: state of the loop; unused.
          output: what the model made of the block; unused.
        """


def run_loop(
    context: DecodeContext, drafter: Drafter, accept: exact.Acceptance, state: DecodeState
) -> DecodeState:
    """Decodes until every row is done, or paused; all on the device.

    Args:
      context: constants of the request.
      drafter: proposes the blocks.
      accept: the rule that decides which drafts are accepted.
      state: state to start from.

    Returns:
      The last state.
    """

    def iterate(state: DecodeState) -> DecodeState:
        draft, drafter_state = drafter.propose(context, state.drafter_state, state)
        output, cache = verify(context, drafter, accept, state, draft)
        state = commit(context, state._replace(cache=cache), drafter.tree, output)
        return state._replace(drafter_state=drafter.observe(context, drafter_state, state, output))

    unfinished = functools.partial(should_continue, context.stopping)
    return jax.lax.while_loop(unfinished, iterate, state)


def should_continue(stopping: StoppingCriteria, state: DecodeState) -> Bool[Array, ""]:
    """Returns True while some row is not done and the step of the pause is not reached."""
    left = jnp.any(~state.done)
    return left if stopping.pause is None else left & (state.steps < stopping.pause)


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
    )


def compact_cache(cache: Any, index: Int[Array, " b"], path: Int[Array, "b D"]) -> Any:
    """Copies the slots of a path to where a chain would have left them.

    Args:
      cache: arrays [b, key heads, T, ...] of every layer.
      index: slot of each row's root.
      path: nodes whose slots, index + path, move to index, index + 1, ...

    Returns:
      The new cache.
    """

    def compact_row(x, start, nodes):
        moved = jnp.take(x, start + nodes, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(x, moved, start, axis=1)

    return jax.tree.map(lambda x: jax.vmap(compact_row)(x, index, path), cache)


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
