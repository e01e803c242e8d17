# SPDX-License-Identifier: Apache-2.0
"""The decoding loop: propose, verify a block in one forward pass, accept, commit, observe.

  b rows    w block width    T slots of a row

Slot i of a row holds its token at position i; a prompt comes first. What holds between iterations:
  the cache's slots below length[b] equal a fresh prefill of tokens[b, :length[b]];
  slots from length[b] on are never read before they are overwritten;
  tokens[b, length[b]] is root[b], chosen but not yet in the cache;
  a row that is not done grows by at least one token per iteration;
  what a row writes depends on no other row.
Plain decoding is the loop at width 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.decoding import sampling


class Target(NamedTuple):
    """The model whose text is written, as the loop sees it.

    forward(tokens [b w], index [b], cache) -> (hidden [b w d], cache), the block written into slots
    index[b] and on; logits(hidden) -> float32 [b w v], each row whole on one device.
    """

    forward: Callable
    logits: Callable


class Rules(NamedTuple):
    """When a row stops, and how it draws (None: greedily). limit counts slots, prompt and all.

    eos is one id that ends a text, or several.
    """

    eos: int | Int[Array, " e"]
    limit: Int[Array, " b"]
    sampling: sampling.Sampling | None


class State(NamedTuple):
    """All that changes. memory is the drafter's; log_probability sums over what a row wrote."""

    tokens: Int[Array, "b T"]
    length: Int[Array, " b"]
    root: Int[Array, " b"]
    done: Bool[Array, " b"]
    log_probability: Float[Array, " b"]
    calls: Int[Array, ""]
    cache: Any
    memory: Any


class Verdict(NamedTuple):
    """What the model says of a block: its own choice after each token, and how many are accepted.

    chosen[b, i] follows block[b, i]; the first count[b] of them are what the row goes on with.
    """

    block: Int[Array, "b w"]
    chosen: Int[Array, "b w"]
    log_probability: Float[Array, "b w"]
    hidden: Float[Array, "b w d"]
    count: Int[Array, " b"]


class Drafter(Protocol):
    """Guesses the tokens after the root; whatever it guesses, only the speed depends on it.

    `width` counts the root too. A guess of -1 matches nothing: where there is none. A drafter is a
    frozen dataclass: equal ones share an executable.
    """

    width: int

    def propose(self, memory: Any, state: State) -> Int[Array, "b w-1"]:
        """Guesses for the width - 1 tokens after each row's root."""

    def observe(self, memory: Any, state: State, verdict: Verdict) -> Any:
        """The memory for the next iteration, from the state after the commit and the verdict."""


@dataclass(frozen=True)
class Plain:
    """The drafter that guesses nothing: one token per forward pass."""

    width: int = 1

    def propose(self, memory, state):
        return state.root[:, None][:, :0]

    def observe(self, memory, state, verdict):
        return memory


def run(target: Target, drafter: Drafter, rules: Rules, state: State) -> State:
    """The state when every row is done, on the device from the first token to the last."""

    def iterate(state: State) -> State:
        drafts = drafter.propose(state.memory, state)
        verdict, cache = verify(target, rules, state, drafts)
        verdict = accept(verdict, rules, state)
        state = commit(state._replace(cache=cache), verdict, rules)
        return state._replace(memory=drafter.observe(state.memory, state, verdict))

    return jax.lax.while_loop(lambda state: jnp.any(~state.done), iterate, state)


def verify(
    target: Target, rules: Rules, state: State, drafts: Int[Array, "b w-1"]
) -> tuple[Verdict, Any]:
    """One forward pass over root and drafts: the model's own choice after each of them."""
    block = jnp.concatenate([state.root[:, None], drafts], axis=1)
    # -1 matches nothing, but embeds as some token; its keys and values are overwritten.
    hidden, cache = target.forward(jnp.maximum(block, 0), state.length, state.cache)
    logits = target.logits(hidden)
    positions = state.length[:, None] + 1 + jnp.arange(block.shape[1])
    chosen = sampling.choose(logits, positions, rules.sampling)
    log_probability = token_log_probability(logits, chosen)
    return Verdict(block, chosen, log_probability, hidden, jnp.zeros_like(state.length)), cache


def token_log_probability(
    logits: Float[Array, "b w v"], tokens: Int[Array, "b w"]
) -> Float[Array, "b w"]:
    """The log-probability of tokens under the model itself: no temperature, nothing left out."""
    here = jnp.arange(logits.shape[-1]) == tokens[..., None]
    return jnp.sum(jnp.where(here, logits, 0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)


def accept(verdict: Verdict, rules: Rules, state: State) -> Verdict:
    """verdict with the count of new tokens: as far as drafts agree, to EOS, the limit at most."""
    agree = verdict.block[:, 1:] == verdict.chosen[:, :-1]
    count = 1 + jnp.sum(jnp.cumprod(agree.astype(jnp.int32), axis=1), axis=1)
    stops = ends(verdict.chosen, rules)
    # Without EOS in the block, argmax is 0: then nothing is cut.
    first_stop = jnp.where(jnp.any(stops, axis=1), jnp.argmax(stops, axis=1) + 1, count)
    count = jnp.minimum(count, jnp.minimum(first_stop, rules.limit - 1 - state.length))
    return verdict._replace(count=jnp.where(state.done, 0, count).astype(jnp.int32))


def commit(state: State, verdict: Verdict, rules: Rules) -> State:
    """state with the accepted tokens written; the cache moves nothing, its length says it all."""
    count, width = verdict.count, verdict.chosen.shape[1]
    accepted = jnp.arange(width) < count[:, None]
    last = jnp.arange(width) == count[:, None] - 1
    root = jnp.where(state.done, state.root, jnp.sum(jnp.where(last, verdict.chosen, 0), axis=1))
    length = state.length + count
    gain = jnp.sum(jnp.where(accepted, verdict.log_probability, 0), axis=1)
    return state._replace(
        tokens=write(state.tokens, verdict.chosen, state.length + 1),
        length=length,
        root=root,
        done=state.done | ends(root, rules) | (length + 1 >= rules.limit),
        log_probability=state.log_probability + gain,
        calls=state.calls + 1,
    )


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
