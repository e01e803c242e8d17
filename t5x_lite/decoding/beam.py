# SPDX-License-Identifier: Apache-2.0
"""Beam search: the k most probable texts kept per row, finished ones ranked with a length penalty.

A hypothesis is finished when EOS is among the row's k best continuations, and a row is done when it
has k finished ones (as in fairseq and CTranslate2; with one beam this is greedy decoding). Texts
that the limit cuts off count as finished where there are fewer than k.

  b rows    k beams    T slots of a row    v vocabulary    (live rows lie in the cache as b * k)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.decoding import loop
from t5x_lite.decoding.protocol import Rules, Target
from t5x_lite.sharding import spec

NEVER = -jnp.inf


class Search(NamedTuple):
    """How wide, how many texts to hand back, and the exponent of the length penalty."""

    beams: int
    n_best: int
    alpha: Any


class Hypotheses(NamedTuple):
    """k texts per row. score is minus infinity where there is none."""

    tokens: Int[Array, "b k T"]
    lengths: Int[Array, "b k"]
    log_probability: Float[Array, "b k"]
    score: Float[Array, "b k"]


class State(NamedTuple):
    """length [b] counts the slots of the live texts that are in the cache; prompt [b] as well."""

    live: Hypotheses
    finished: Hypotheses
    length: Int[Array, " b"]
    prompt: Int[Array, " b"]
    done: Bool[Array, " b"]
    calls: Int[Array, ""]
    cache: Any


def penalty(lengths: Int[Array, "..."], alpha: float) -> Float[Array, "..."]:
    """What log-probabilities are divided by: ((5 + length) / 6) ** alpha (Wu et al., 2016, 14)."""
    return ((5.0 + lengths) / 6.0) ** alpha


def spread(x: Array, beams: int) -> Array:
    """x [b ...] with each row `beams` times in a row: [b * beams, ...]."""
    place = jax.typeof(x).sharding.spec
    return jnp.repeat(x, beams, axis=0, out_sharding=place)


def start(search: Search, prompts: Any, rules: Rules, cache: Any, slots: int) -> State:
    """The prompts as the first of k live texts; the other k - 1 have probability 0."""
    rows, length = prompts.tokens.shape
    tokens = jnp.pad(prompts.tokens, ((0, 0), (0, slots - length)))
    tokens = jnp.broadcast_to(tokens[:, None], (rows, search.beams, slots))
    counts = jnp.broadcast_to(prompts.length[:, None] * 0, (rows, search.beams))
    none = jnp.where(counts == 0, NEVER, 0.0)
    first = jnp.where(jnp.arange(search.beams) == 0, 0.0, none)
    return State(
        live=Hypotheses(tokens, counts, first, first),
        finished=Hypotheses(tokens, counts, none, none),
        length=prompts.length - 1,
        prompt=prompts.length,
        done=prompts.length >= rules.limit,
        calls=jnp.int32(0),
        cache=cache,
    )


def run(target: Target, search: Search, rules: Rules, state: State) -> State:
    """The state when every row is done."""

    def iterate(state: State) -> State:
        logits, cache = verify(target, search, state)
        best = continuations(search, rules, state, logits)
        return advance(search, rules, state._replace(cache=cache), best)

    return jax.lax.while_loop(lambda state: jnp.any(~state.done), iterate, state)


def verify(target: Target, search: Search, state: State) -> tuple[Float[Array, "b k v"], Any]:
    """The log-probability of every token after every live text."""
    rows = state.length.shape[0]
    index = spread(state.length, search.beams)
    here = jnp.arange(state.live.tokens.shape[2]) == state.length[:, None, None]
    root = jnp.sum(jnp.where(here, state.live.tokens, 0), axis=2)
    root = jnp.reshape(root, (rows * search.beams, 1), out_sharding=spec("batch length"))
    hidden, cache = target.forward(root, index, state.cache)
    logits = jax.nn.log_softmax(target.logits(hidden)[:, 0])
    whole = spec("batch length whole")
    return jnp.reshape(logits, (rows, search.beams, -1), out_sharding=whole), cache


class Continuations(NamedTuple):
    """The m most probable one-token continuations of a row: of which text, and by what."""

    parent: Int[Array, "b m"]
    token: Int[Array, "b m"]
    log_probability: Float[Array, "b m"]


def continuations(
    search: Search, rules: Rules, state: State, logits: Float[Array, "b k v"]
) -> Continuations:
    """The best (1 + e) k, where e ids end a text: at most e k do, so that k are left to live on."""
    rows, beams, size = logits.shape
    count = (1 + jnp.atleast_1d(rules.eos).size) * beams
    total = state.live.log_probability[:, :, None] + logits
    flat = jnp.reshape(total, (rows, beams * size), out_sharding=spec("batch whole"))
    log_probability, place = jax.lax.top_k(flat, min(count, beams * size))
    return Continuations(place // size, place % size, log_probability)


def advance(search: Search, rules: Rules, state: State, best: Continuations) -> State:
    """One token further; rows that are done stay as they are."""
    stops = loop.ends(best.token, rules)
    within = jnp.arange(stops.shape[1]) < search.beams
    ended = extended(
        search,
        state,
        best._replace(log_probability=jnp.where(stops & within, best.log_probability, NEVER)),
    )
    alive = jnp.where(stops, NEVER, best.log_probability)
    alive, chosen = jax.lax.top_k(alive, search.beams)
    survivors = Continuations(pick(best.parent, chosen), pick(best.token, chosen), alive)
    live = extended(search, state, survivors)
    finished = merged(search, state.finished, ended)
    complete = jnp.isfinite(finished.score[:, -1])
    full = state.length + 2 >= rules.limit
    cut_off = merged(search, finished, live)
    finished = choose_rows(full & ~complete, cut_off, finished)
    return State(
        live=choose_rows(state.done, state.live, live),
        finished=choose_rows(state.done, state.finished, finished),
        length=state.length + jnp.where(state.done, 0, 1),
        prompt=state.prompt,
        done=state.done | complete | full,
        calls=state.calls + 1,
        cache=jax.tree.map(lambda x: descend(x, survivors.parent), state.cache),
    )


def extended(search: Search, state: State, best: Continuations) -> Hypotheses:
    """Each continuation as a text of its own, scored with the length penalty."""
    tokens = pick(state.live.tokens, best.parent)
    new = jnp.arange(tokens.shape[2]) == (state.length + 1)[:, None, None]
    tokens = jnp.where(new, best.token[:, :, None], tokens)
    lengths = jnp.broadcast_to((state.length + 2 - state.prompt)[:, None], best.token.shape)
    score = best.log_probability / penalty(lengths, search.alpha)
    return Hypotheses(tokens, lengths, best.log_probability, score)


def merged(search: Search, some: Hypotheses, others: Hypotheses) -> Hypotheses:
    """The k texts of highest score among both, best first."""
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), some, others)
    _, chosen = jax.lax.top_k(both.score, search.beams)
    return jax.tree.map(lambda x: pick(x, chosen), both)


def pick(x: Array, chosen: Int[Array, "b m"]) -> Array:
    """x [b n ...] at the places chosen in each row: [b m ...]."""
    return jax.vmap(lambda row, places: row[places])(x, chosen)


def descend(x: Array, parent: Int[Array, "b k"]) -> Array:
    """Cache rows x [b * k ...] of the parents."""
    rows, beams = parent.shape
    place = jax.typeof(x).sharding.spec
    split = jnp.reshape(
        x, (rows, beams, *x.shape[1:]), out_sharding=jax.P(place[0], None, *place[1:])
    )
    return jnp.reshape(pick(split, parent), x.shape, out_sharding=place)


def choose_rows(where: Bool[Array, " b"], yes: Hypotheses, no: Hypotheses) -> Hypotheses:
    """yes in the rows where it holds, no in the others."""
    widen = lambda x: jnp.expand_dims(where, range(1, x.ndim))
    return jax.tree.map(lambda x, y: jnp.where(widen(x), x, y), yes, no)
