# SPDX-License-Identifier: Apache-2.0
"""Acceptance that changes the text for speed: in use only if it is named.

The token after the accepted drafts is the model's own choice.

b rows    w nodes of a block    v vocabulary
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_lite.decoding import sampling
from t5x_lite.decoding.acceptance.exact import AcceptedPath, VerifyInput, at_parents, deepest_path
from t5x_lite.decoding.acceptance.speculative import speculative_path


@dataclass(frozen=True)
class TopK:
    """Accepts a draft among the k most probable tokens (Stern et al., 2018, 5.1)."""

    k: int

    def __post_init__(self):
        require_range(self.k >= 1, "top-k", "k", "at least 1", self.k)

    def __call__(self, inputs: VerifyInput) -> AcceptedPath:
        drafted = at_draft_tokens(inputs, inputs.logits)[..., None]
        rank = jnp.sum(at_parents(inputs.tree, inputs.logits) > drafted, axis=-1)
        return deepest_path(inputs, (rank < self.k) & (inputs.block >= 0))


@dataclass(frozen=True)
class Distance:
    """Accepts a draft within epsilon ids of the model's choice (Stern et al., 2018, 5.2).

    For vocabularies whose ids are quantities: brightness, bins of a number.
    """

    epsilon: int

    def __post_init__(self):
        require_range(self.epsilon >= 0, "distance", "epsilon", "at least 0", self.epsilon)

    def __call__(self, inputs: VerifyInput) -> AcceptedPath:
        apart = jnp.abs(inputs.block - at_parents(inputs.tree, inputs.chosen))
        return deepest_path(inputs, (apart <= self.epsilon) & (inputs.block >= 0))


@dataclass(frozen=True)
class Typical:
    """Accepts a draft x with p(x) > min(epsilon, delta exp(-H(p))), H the entropy in nats.

    The less certain the model, the more drafts are accepted: typical acceptance (Cai et al., 2024,
    arXiv 2401.10774, 2.3.1).

    p is the distribution after temperature, top-k and top-p; for greedy decoding the model's own.
    """

    epsilon: float = 0.3
    delta: float = 0.09

    def __post_init__(self):
        require_range(0 < self.epsilon < 1, "typical", "epsilon", "in (0, 1)", self.epsilon)
        require_range(self.delta > 0, "typical", "delta", "above 0", self.delta)

    def __call__(self, inputs: VerifyInput) -> AcceptedPath:
        log_p = log_probabilities(inputs)
        entropy = -jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0), axis=-1)
        enough = jnp.minimum(self.epsilon, self.delta * jnp.exp(-entropy))
        probable = jnp.exp(at_draft_tokens(inputs, log_p)) > at_parents(inputs.tree, enough)
        return deepest_path(inputs, probable & (inputs.block >= 0))


@dataclass(frozen=True)
class Lenient:
    """Speculative acceptance with min(1, p(x) / (lenience q(x))) (Leviathan et al., 2023, A.5).

    For greedy decoding it accepts a draft with p(x) >= lenience max(p). Lenience 1 changes no
    distribution.
    """

    lenience: float

    def __post_init__(self):
        require_range(0 < self.lenience <= 1, "lenient", "lenience", "in (0, 1]", self.lenience)

    def __call__(self, inputs: VerifyInput) -> AcceptedPath:
        if inputs.sampling is not None:
            return speculative_path(inputs, self.lenience)
        log_p = log_probabilities(inputs)
        least = at_parents(inputs.tree, jnp.max(log_p, axis=-1)) + jnp.log(self.lenience)
        return deepest_path(inputs, (at_draft_tokens(inputs, log_p) >= least) & (inputs.block >= 0))


@dataclass(frozen=True)
class MinimumBlock:
    """Accepts at least `least` tokens per step, as far as there are drafts; beyond them as Exact.

    Costs more quality than it gains if a step cannot accept one token alone (Stern et al., 2018,
    5.3).
    """

    least: int

    def __post_init__(self):
        require_range(self.least >= 1, "minimum", "block", "at least 1", self.least)

    def __call__(self, inputs: VerifyInput) -> AcceptedPath:
        equal = inputs.block == at_parents(inputs.tree, inputs.chosen)
        forced = (inputs.block >= 0) & (inputs.tree.depth < self.least)
        return deepest_path(inputs, equal | forced)


@dataclass(frozen=True)
class Always:
    """Accepts every draft: the text is the drafter's, and each token after a block the model's."""

    def __call__(self, inputs: VerifyInput) -> AcceptedPath:
        return deepest_path(inputs, inputs.block >= 0)


def at_draft_tokens(inputs: VerifyInput, x: Float[Array, "b w v"]) -> Float[Array, "b w"]:
    """Takes x, at each node's parent, of the node's draft; minus infinity for -1."""
    here = jnp.arange(x.shape[-1]) == inputs.block[..., None]
    return jnp.max(jnp.where(here, at_parents(inputs.tree, x), -jnp.inf), axis=-1)


def log_probabilities(inputs: VerifyInput) -> Float[Array, "b w v"]:
    """Log-probabilities that tokens are sampled from; the model's own for greedy decoding."""
    if inputs.sampling is None:
        return jax.nn.log_softmax(inputs.logits)
    return sampling.log_distribution(inputs.logits, inputs.sampling)


def require_range(inside: bool, rule: str, name: str, range: str, value: float) -> None:
    """Checks a parameter of a rule.

    Args:
      inside: value is in the range.
      rule: name of the rule.
      name: name of the parameter.
      range: the range, for the message.
      value: value of the parameter.

    Raises:
      ValueError: the value is outside of the range.
    """
    if not inside:
        raise ValueError(f"Acceptance {rule}: {name} must be {range}; got {value}")
