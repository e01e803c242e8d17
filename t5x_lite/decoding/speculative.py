# SPDX-License-Identifier: Apache-2.0
"""Acceptance that draws: the law of the text is the model's, though its ids are not plain's.

p is the model's law after temperature, top-k and top-p, q the law that a guess was drawn from
(`Draft.log_probability`; of a guess without one, all on that guess). Randomness is keyed by the
row's seed and number, by where the block begins and by position: the same call gives the same text.
Whether there is a guess at all (not -1) must not depend on what it would have been.

b rows    w nodes of a block, a chain    v vocabulary
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.decoding import sampling
from t5x_lite.decoding.acceptance import Accepted, Exact, Judged
from t5x_lite.decoding.sampling import Stream


@dataclass(frozen=True)
class Speculative:
    """Guess x holds with probability min(1, p(x) / q(x)); at the first that does not, max(0, p - q)
    is drawn from in its place, and after the last guess p (Leviathan et al., 2023, algorithm 1).

    Greedily it is `Exact`.

    Raises:
      ValueError: the drafter's tree is not a chain.
    """

    def __call__(self, judged: Judged) -> Accepted:
        return speculated(judged)


@dataclass(frozen=True)
class BlockVerification:
    """The same law as Speculative by judging the block as a whole: never fewer tokens on average
    (Sun et al., 2024, arXiv 2403.10444, algorithm 2). Greedily it is `Exact`.

    Raises:
      ValueError: the drafter's tree is not a chain.
    """

    def __call__(self, judged: Judged) -> Accepted:
        if judged.sampling is None:
            return Exact()(judged)
        laws = both(judged)
        reach = reached(laws)
        left = residual(reach[..., None] * laws.model, laws.guess)
        mass = jnp.sum(left, axis=-1)
        # Where both terms are 0, p is q and p(x) / q(x) stays 1: to stop here has probability 0.
        stay = mass / jnp.maximum(mass + 1 - reach, jnp.finfo(jnp.float32).tiny)
        holds = noise(judged, Stream.ACCEPT) < stay
        place = jnp.arange(holds.shape[1])
        count = jnp.max(jnp.where(holds & (place > 0), place, 0), axis=1)
        return closed(judged, count, at(left, count), at(laws.model, count))


class Laws(NamedTuple):
    """The probabilities of every token after every node: p, and q, 0 where nothing was guessed.

    model_here and guess_here are those of the guess itself (after the last node: 0).
    """

    model: Float[Array, "b w v"]
    guess: Float[Array, "b w v"]
    model_here: Float[Array, "b w"]
    guess_here: Float[Array, "b w"]


def both(judged: Judged) -> Laws:
    """p and q of a block."""
    if not judged.tree.is_chain:
        raise ValueError(
            "Speculative acceptance and block verification follow one chain of guesses, and this "
            "drafter's block is a tree: accept exactly, or draft a chain"
        )
    p = jnp.exp(sampling.law(judged.logits, judged.sampling))
    # After the last node nothing was guessed, which is what -1 says too.
    guesses = jnp.concatenate([judged.block[:, 1:], judged.block[:, :1] * 0 - 1], axis=1)
    here = jnp.arange(p.shape[-1]) == guesses[..., None]
    if judged.draft.log_probability is None:
        q = here.astype(p.dtype)
    else:
        q = jnp.pad(jnp.exp(judged.draft.log_probability), ((0, 0), (0, 1), (0, 0)))
        q = jnp.where(guesses[..., None] >= 0, q, 0)
    pick = lambda law: jnp.sum(jnp.where(here, law, 0), axis=-1)
    return Laws(p, q, pick(p), pick(q))


def speculated(judged: Judged, lenience: float = 1.0) -> Accepted:
    """Token by token, q taken `lenience` times: below 1, more guesses hold than p would have."""
    if judged.sampling is None:
        return Exact()(judged)
    laws = both(judged)
    # u < p / q, without the division: a token that p leaves out never holds.
    holds = noise(judged, Stream.ACCEPT) * lenience * laws.guess_here < laws.model_here
    count = leading(holds)
    p, q = at(laws.model, count), at(laws.guess, count)
    return closed(judged, count, residual(p, lenience * q), p)


def leading(holds: Bool[Array, "b w"]) -> Int[Array, " b"]:
    """How many hold before the first that does not."""
    return jnp.sum(jnp.cumprod(holds.astype(jnp.int32), axis=1), axis=1)


def reached(laws: Laws) -> Float[Array, "b w"]:
    """How much of the law of the first i guesses q has not spent on others: 1 at the root.

    p_i of arXiv 2403.10444: min(1, p_(i-1) p(x_i) / q(x_i)).
    """
    ratio = jnp.where(laws.guess_here > 0, laws.model_here / laws.guess_here, 0)
    follow = lambda before, ratio: (jnp.minimum(1.0, before * ratio), before)
    start = jnp.ones_like(ratio[:, 0])
    return jax.lax.scan(follow, start, ratio.T)[1].T


def residual(p: Float[Array, "... v"], q: Float[Array, "... v"]) -> Float[Array, "... v"]:
    """What q leaves of p, not normalised."""
    return jnp.maximum(p - q, 0)


def at(x: Float[Array, "b w v"], node: Int[Array, " b"]) -> Float[Array, "b v"]:
    """x of one node per row."""
    return jax.vmap(lambda row, node: row[node])(x, node)


def noise(judged: Judged, stream: Stream) -> Float[Array, "b w"]:
    """A uniform number for every node, fresh in every call."""
    return sampling.fresh(judged.sampling, stream, judged.positions[:, 0], judged.positions)


def closed(
    judged: Judged, count: Int[Array, " b"], left: Float[Array, "b v"], p: Float[Array, "b v"]
) -> Accepted:
    """The first count[b] guesses, and a token drawn in proportion to left."""
    begin, size = judged.positions[:, 0], left.shape[-1:]
    # Where q differs from p by less than a rounding, nothing is left although a guess fell.
    left = jnp.where(jnp.any(left > 0, axis=-1, keepdims=True), left, p)
    uniform = sampling.fresh(
        judged.sampling, Stream.RESIDUAL, begin, (begin + count)[:, None], size
    )
    drawn = jnp.argmax(jnp.log(left) - jnp.log(-jnp.log(uniform[:, 0])), axis=-1)
    guesses = jnp.concatenate([judged.block[:, 1:], judged.block[:, :1]], axis=1)
    path = jnp.zeros_like(judged.block) + jnp.arange(judged.tree.width)
    tokens = jnp.where(path < count[:, None], guesses, drawn[:, None].astype(jnp.int32))
    return Accepted(path, tokens, count + 1)
