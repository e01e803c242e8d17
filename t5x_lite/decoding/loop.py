# SPDX-License-Identifier: Apache-2.0
"""The decoding loop: propose, verify a block in one forward pass, accept, commit, observe.

  b rows    w nodes of a block    D most tokens that one call can add    T slots of a row

Slot i of a row holds its token at position i; a prompt comes first. What holds between iterations:
  the cache's slots below length[b] equal a fresh prefill of tokens[b, :length[b]];
  slots from length[b] on are never read before they are overwritten;
  tokens[b, length[b]] is root[b], chosen but not yet in the cache;
  a row that is not done grows by at least one token per iteration;
  what a row writes depends on no other row.
Plain decoding is the loop at width 1.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from t5x_lite import sharding
from t5x_lite.decoding import acceptance, sampling
from t5x_lite.decoding.protocol import (
    Draft,
    Drafter,
    Rules,
    Setting,
    State,
    Target,
    Tree,
    Verdict,
    chain,
)


@dataclass(frozen=True)
class Plain:
    """The drafter that guesses nothing: one token per forward pass."""

    tree: Tree = chain(1)
    top: int = 0

    def begin(self, setting):
        return None

    def propose(self, setting, memory, state):
        return Draft(state.root[:, None][:, :0]), memory

    def observe(self, setting, memory, state, verdict):
        return memory


def run(setting: Setting, drafter: Drafter, accept: acceptance.Acceptance, state: State) -> State:
    """The state when every row is done, on the device from the first token to the last."""

    def iterate(state: State) -> State:
        draft, memory = drafter.propose(setting, state.memory, state)
        verdict, cache = verify(setting, drafter, accept, state, draft)
        state = commit(state._replace(cache=cache), drafter.tree, verdict, setting.rules)
        return state._replace(memory=drafter.observe(setting, memory, state, verdict))

    going = functools.partial(goes_on, setting.rules)
    return jax.lax.while_loop(going, iterate, state)


def goes_on(rules: Rules, state: State) -> Bool[Array, ""]:
    """Whether some row is not done, and no pause is wanted yet."""
    left = jnp.any(~state.done)
    return left if rules.pause is None else left & (state.calls < rules.pause)


def verify(
    setting: Setting, drafter: Drafter, accept: acceptance.Acceptance, state: State, draft: Draft
) -> tuple[Verdict, Any]:
    """One forward pass over root and drafts, and how far the row goes on with them."""
    target, rules, tree = setting.target, setting.rules, drafter.tree
    block = jnp.concatenate(sharding.by_rows([state.root[:, None], draft.tokens]), axis=1)
    # -1 matches nothing, but embeds as some token; its keys and values are overwritten.
    cache = state.cache if draft.cache is None else draft.cache
    middle = getattr(drafter, "middle", None)
    given = (jnp.maximum(block, 0), state.length, cache, tree)
    if middle is None:
        hidden, cache = target.forward(*given)
    else:
        hidden, cache, middle = in_two(target, middle, *given)
    logits, beside = said(setting, drafter, hidden)
    positions = state.length[:, None] + 1 + tree.depth
    chosen = sampling.choose(logits, positions, rules.sampling)
    judged = acceptance.Judged(block, logits, chosen, draft, positions, tree, rules.sampling)
    path, tokens, count = accept(judged)
    along = logits if tree.is_chain else jax.vmap(lambda row, nodes: row[nodes])(logits, path)
    return Verdict(
        block=block,
        chosen=chosen,
        hidden=hidden,
        top=jax.lax.top_k(logits, drafter.top)[1] if drafter.top else None,
        path=path,
        tokens=tokens,
        log_probability=token_log_probability(along, tokens),
        count=cut(tokens, count, rules, state),
        middle=middle,
        beside=beside,
    ), cache


def said(
    setting: Setting, drafter: Drafter, hidden: Float[Array, "b w d"]
) -> tuple[Float[Array, "b w v"], Float[Array, "b m v"] | None]:
    """The logits of the block, and of what the drafter reads beside it in the same product."""
    beside = getattr(drafter, "beside", None)
    if beside is None:
        return setting.target.logits(hidden), None
    width = hidden.shape[1]
    logits = setting.target.logits(jnp.concatenate([hidden, beside(setting, hidden)], axis=1))
    return logits[:, :width], logits[:, width:]


def in_two(target: Target, middle: int, tokens, index, cache, tree: Tree):
    """What Target.forward gives, and the states that layer `middle` was given."""
    early, late = target.part(0, middle), target.part(middle, target.layers)
    x, own = early.through(early.begin(tokens, index), index, early.of(cache), tree)
    cache = early.joined(cache, own)
    y, own = late.through(x, index, late.of(cache), tree)
    return late.finish(y), late.joined(cache, own), x


def token_log_probability(
    logits: Float[Array, "b w v"], tokens: Int[Array, "b w"]
) -> Float[Array, "b w"]:
    """The log-probability of tokens under the model itself: no temperature, nothing left out."""
    here = jnp.arange(logits.shape[-1]) == tokens[..., None]
    return jnp.sum(jnp.where(here, logits, 0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)


def cut(
    tokens: Int[Array, "b D"], count: Int[Array, " b"], rules: Rules, state: State
) -> Int[Array, " b"]:
    """How many of the accepted tokens a row takes: to EOS, and to its limit, at most."""
    stops = ends(tokens, rules)
    # Without EOS in the block, argmax is 0: then nothing is cut.
    first_stop = jnp.where(jnp.any(stops, axis=1), jnp.argmax(stops, axis=1) + 1, count)
    count = jnp.minimum(count, jnp.minimum(first_stop, rules.limit - 1 - state.length))
    return jnp.where(state.done, 0, count).astype(jnp.int32)


def commit(state: State, tree: Tree, verdict: Verdict, rules: Rules) -> State:
    """state with the accepted tokens written.

    After a chain nothing moves in the cache, its length says it all; the accepted nodes of a tree
    are moved to where a chain would have left them.
    """
    tokens, count = verdict.tokens, verdict.count
    place = jnp.arange(tokens.shape[1])
    last = place == count[:, None] - 1
    root = jnp.where(state.done, state.root, jnp.sum(jnp.where(last, tokens, 0), axis=1))
    length = state.length + count
    gain = jnp.sum(jnp.where(place < count[:, None], verdict.log_probability, 0), axis=1)
    # The token after node path[i] is node path[i + 1]'s guess where that one was accepted.
    depths = np.arange(tokens.shape[1])
    following = sharding.by_rows(verdict.path[:, np.minimum(depths + 1, depths[-1])])
    node = jnp.where(place < count[:, None] - 1, following, 0)
    first = state.length + 1
    return state._replace(
        tokens=write(state.tokens, tokens, first),
        length=length,
        root=root,
        done=state.done | ends(root, rules) | (length + 1 >= rules.limit),
        log_probability=state.log_probability + gain,
        call=write(state.call, jnp.zeros_like(tokens) + state.calls, first),
        node=write(state.node, node, first),
        calls=state.calls + 1,
        cache=state.cache if tree.is_chain else gathered(state.cache, state.length, verdict.path),
    )


def gathered(cache: Any, index: Int[Array, " b"], path: Int[Array, "b D"]) -> Any:
    """cache with the slots index + path of every layer copied to index, index + 1, ..."""

    def row(x, start, nodes):
        moved = jnp.take(x, start + nodes, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(x, moved, start, axis=1)

    return jax.tree.map(lambda x: jax.vmap(row)(x, index, path), cache)


def ends(tokens: Int[Array, "..."], rules: Rules) -> Bool[Array, "..."]:
    """Which tokens end a text."""
    return jnp.any(tokens[..., None] == jnp.atleast_1d(rules.eos), axis=-1)


def write(
    tokens: Int[Array, "b T"], block: Int[Array, "b w"], index: Int[Array, " b"]
) -> Int[Array, "b T"]:
    """tokens with block written from index[b] on in each row b."""
    return jax.vmap(jax.lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))(
        tokens, block, index, 0
    )
