# SPDX-License-Identifier: Apache-2.0
"""Selection of continuations in beam search: the best ones, groups that differ, banks of progress.

b rows    k beams    v vocabulary    m continuations of a row    g groups of a request
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.decoding import commit
from t5x_lite.decoding.protocol import StoppingCriteria
from t5x_lite.decoding.steering.processor import count_tokens
from t5x_lite.sharding import spec

NEVER = -jnp.inf


class BeamContinuations(NamedTuple):
    """The m most probable one-token continuations of each row.

    Attributes:
      parent: the live text that is continued.
      token: the token that continues it.
      log_probability: of the continued text.
    """

    parent: Int[Array, "b m"]
    token: Int[Array, "b m"]
    log_probability: Float[Array, "b m"]


class GroupRule(NamedTuple):
    """Rule that keeps groups of beams apart.

    Attributes:
      groups: g; a request has so many rows, one after the other.
      diversity: subtracted for each beam of an earlier group that takes a token.
      count: m.
      stopping: ids that end a text, which no beam takes.
    """

    groups: int
    diversity: Any
    count: int
    stopping: StoppingCriteria


def best_continuations(total: Float[Array, "b k v"], count: int) -> BeamContinuations:
    """Selects the most probable continuations, best first.

    Args:
      total: log-probability of every continued text.
      count: m.
    """
    rows, beams, size = total.shape
    flat = jnp.reshape(total, (rows, beams * size), out_sharding=spec("batch whole"))
    best, place = jax.lax.top_k(flat, min(count, beams * size))
    return BeamContinuations(place // size, place % size, best)


def choose_survivors(
    best: BeamContinuations, stops: Bool[Array, "b m"], beams: int, in_order: bool = False
) -> BeamContinuations:
    """Chooses the k continuations that live on: the most probable ones that do not end a text.

    Args:
      best: the continuations.
      stops: those that end a text.
      beams: k.
      in_order: the first ones instead.
    """
    alive = jnp.where(stops, NEVER, best.log_probability)
    place = jnp.arange(stops.shape[1])
    key = jnp.where(jnp.isneginf(alive), NEVER, -place.astype(alive.dtype)) if in_order else alive
    _, chosen = jax.lax.top_k(key, beams)
    return BeamContinuations(
        parent=take_beams(best.parent, chosen),
        token=take_beams(best.token, chosen),
        log_probability=take_beams(alive, chosen),
    )


def diverse_continuations(
    log_probability: Float[Array, "bg k v"],
    total: Float[Array, "bg k"],
    active: Bool[Array, " bg"],
    rule: GroupRule,
) -> BeamContinuations:
    """Selects the best continuations group by group (Vijayakumar et al., 2018, arXiv 1610.02424).

    The Hamming diversity of transformers' group beam search: a group sees the tokens that live on
    in the groups before it, and what is subtracted stays in the score.

    Args:
      log_probability: of every next token.
      total: log-probability of every live text.
      active: rows that have not ended; the others keep no group from anything.
      rule: the groups.
    """
    rows, size = log_probability.shape[0] // rule.groups, log_probability.shape[-1]

    def split(x: Array) -> Array:
        place = jax.typeof(x).sharding.spec
        shape = (rows, rule.groups, *x.shape[1:])
        return jnp.reshape(x, shape, out_sharding=jax.P(place[0], None, *place[1:]))

    log_probability, total, active = split(log_probability), split(total), split(active)
    taken, parts = jnp.zeros_like(log_probability[:, 0, 0]), []
    for group in range(rule.groups):
        apart = log_probability[:, group] - rule.diversity * taken[:, None]
        best = best_continuations(total[:, group, :, None] + apart, rule.count)
        stops = commit.ends_text(best.token, rule.stopping)
        survivors = choose_survivors(best, stops, total.shape[2])
        exists = jnp.isfinite(survivors.log_probability) & active[:, group, None]
        taken = taken + count_tokens(survivors.token, exists, size)
        parts.append(best)

    def join(*groups: Array) -> Array:
        stacked = jnp.stack(groups, axis=1)
        return jnp.reshape(stacked, (-1, stacked.shape[2]), out_sharding=spec("batch whole"))

    return jax.tree.map(join, *parts)


def banked_continuations(
    total: Float[Array, "b k v"], banks: Int[Array, "b k v"], count: int
) -> BeamContinuations:
    """Selects continuations in turns from banks, the last bank first.

    Dynamic beam allocation (Post and Vilar, 2018, arXiv 1804.06609): beams that have met different
    amounts of a constraint do not compete. Every bank has as many as any other; what one lacks goes
    to the others.

    Args:
      total: log-probability of every continued text.
      banks: bank of each, below k.
      count: m.

    Returns:
      The best of each bank, last bank first; then the second best of each; and so on.
    """
    beams = total.shape[1]
    parts = [
        best_continuations(jnp.where(banks == bank, total, NEVER), count)
        for bank in reversed(range(beams))
    ]
    rounds = jax.tree.map(lambda *x: jnp.stack(x, axis=2).reshape(x[0].shape[0], -1), *parts)
    places = jnp.arange(rounds.token.shape[1])
    key = jnp.where(jnp.isneginf(rounds.log_probability), NEVER, -places.astype(jnp.float32))
    _, first = jax.lax.top_k(key, count)
    return jax.tree.map(lambda x: take_beams(x, first), rounds)


def take_beams(x: Array, chosen: Int[Array, "b m"]) -> Array:
    """Takes the chosen places of each row of x [b n ...]: [b m ...]."""
    return jax.vmap(lambda row, places: row[places])(x, chosen)


def empty_history(length: Int[Array, " b"], steps: int, count: int) -> BeamContinuations | None:
    """Returns a history of so many steps, in which no continuation is; None for 0 steps.

    Args:
      length: a number of each row, whose placement the history has.
      steps: most steps.
      count: m.
    """
    if not steps:
        return None
    zeros = jnp.broadcast_to(length[:, None, None] * 0, (length.shape[0], steps, count))
    return BeamContinuations(zeros, zeros, jnp.where(zeros == 0, NEVER, 0.0))


def record_step(
    history: BeamContinuations | None,
    best: BeamContinuations,
    done: Bool[Array, " b"],
    step: Int[Array, ""],
) -> BeamContinuations:
    """Returns the history with the continuations of a step; none of a row that is done.

    Args:
      history: continuations of the steps before, [b steps m].
      best: the continuations.
      done: rows that have ended.
      step: number of the step.
    """
    alive = jnp.where(done[:, None], NEVER, best.log_probability)
    best = best._replace(log_probability=alive)

    def write(old: Array, new: Array) -> Array:
        # A small vocabulary has fewer continuations than the history has room for.
        empty = NEVER if new.dtype.kind == "f" else 0
        missing = old.shape[2] - new.shape[1]
        new = jnp.pad(new, ((0, 0), (0, missing)), constant_values=empty)
        here = (jnp.arange(old.shape[1]) == step)[:, None]
        return jnp.where(here, new[:, None], old)

    return jax.tree.map(write, history, best)
