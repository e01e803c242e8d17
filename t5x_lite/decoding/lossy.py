# SPDX-License-Identifier: Apache-2.0
"""Acceptance that changes the text for speed: used only where somebody asks for it by name.

Guesses that hold are written; the token after the last of them is the model's own choice.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_lite.decoding import sampling
from t5x_lite.decoding.acceptance import Accepted, Judged, at_parents, deepest
from t5x_lite.decoding.speculative import speculated


@dataclass(frozen=True)
class TopK:
    """A guess holds where it is among the k most probable tokens (Stern et al., 2018, 5.1)."""

    k: int

    def __post_init__(self):
        require(self.k >= 1, "top-k", "k", "at least 1", self.k)

    def __call__(self, judged: Judged) -> Accepted:
        above = at_parents(judged.tree, judged.logits) > here(judged, judged.logits)[..., None]
        rank = jnp.sum(above, axis=-1)
        return deepest(judged, (rank < self.k) & (judged.block >= 0))


@dataclass(frozen=True)
class Distance:
    """A guess holds within epsilon ids of the model's choice (Stern et al., 2018, 5.2).

    For vocabularies whose ids are quantities: brightness, bins of a number.
    """

    epsilon: int

    def __post_init__(self):
        require(self.epsilon >= 0, "distance", "epsilon", "at least 0", self.epsilon)

    def __call__(self, judged: Judged) -> Accepted:
        apart = jnp.abs(judged.block - at_parents(judged.tree, judged.chosen))
        return deepest(judged, (apart <= self.epsilon) & (judged.block >= 0))


@dataclass(frozen=True)
class Typical:
    """A guess holds where p(x) > min(epsilon, delta exp(-H(p))), H the entropy in nats: the less
    certain the model, the more will do (Cai et al., 2024, arXiv 2401.10774, 2.3.1).

    p is after temperature, top-k and top-p; of a greedy request the model's own.
    """

    epsilon: float = 0.3
    delta: float = 0.09

    def __post_init__(self):
        require(0 < self.epsilon < 1, "typical", "epsilon", "in (0, 1)", self.epsilon)
        require(self.delta > 0, "typical", "delta", "above 0", self.delta)

    def __call__(self, judged: Judged) -> Accepted:
        log_p = own(judged)
        entropy = -jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0), axis=-1)
        enough = jnp.minimum(self.epsilon, self.delta * jnp.exp(-entropy))
        probable = jnp.exp(here(judged, log_p)) > at_parents(judged.tree, enough)
        return deepest(judged, probable & (judged.block >= 0))


@dataclass(frozen=True)
class Lenient:
    """Speculative acceptance with min(1, p(x) / (lenience q(x))); greedily a guess holds where
    p(x) >= lenience max(p) (Leviathan et al., 2023, A.5). 1 changes no law.
    """

    lenience: float

    def __post_init__(self):
        require(0 < self.lenience <= 1, "lenient", "lenience", "in (0, 1]", self.lenience)

    def __call__(self, judged: Judged) -> Accepted:
        if judged.sampling is not None:
            return speculated(judged, self.lenience)
        log_p = own(judged)
        most = at_parents(judged.tree, jnp.max(log_p, axis=-1)) + jnp.log(self.lenience)
        return deepest(judged, (here(judged, log_p) >= most) & (judged.block >= 0))


@dataclass(frozen=True)
class MinimumBlock:
    """At least `least` tokens per call where there are guesses; beyond, as Exact does.

    Costs more than it gains where the text may need one token at a time (Stern et al., 2018, 5.3).
    """

    least: int

    def __post_init__(self):
        require(self.least >= 1, "minimum", "block", "at least 1", self.least)

    def __call__(self, judged: Judged) -> Accepted:
        right = judged.block == at_parents(judged.tree, judged.chosen)
        forced = (judged.block >= 0) & (judged.tree.depth < self.least)
        return deepest(judged, right | forced)


@dataclass(frozen=True)
class Always:
    """Every guess holds: the text is the drafter's, and each token after a block the model's."""

    def __call__(self, judged: Judged) -> Accepted:
        return deepest(judged, judged.block >= 0)


def here(judged: Judged, x: Float[Array, "b w v"]) -> Float[Array, "b w"]:
    """x of each node's guess after the node's parent; of -1, minus infinity."""
    found = jnp.arange(x.shape[-1]) == judged.block[..., None]
    return jnp.max(jnp.where(found, at_parents(judged.tree, x), -jnp.inf), axis=-1)


def own(judged: Judged) -> Float[Array, "b w v"]:
    """The log-probabilities that a sampled token is drawn by; the model's own if none is."""
    if judged.sampling is None:
        return jax.nn.log_softmax(judged.logits)
    return sampling.law(judged.logits, judged.sampling)


def require(fits: bool, rule: str, name: str, range: str, value: float) -> None:
    if not fits:
        raise ValueError(f"Acceptance {rule}: {name} must be {range}; got {value}")
