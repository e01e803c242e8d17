# SPDX-License-Identifier: Apache-2.0
"""Rules that combine the logits of a model with those of its companion.

Both come as log-probabilities. What a rule makes of a node depends on the text before it alone, so
that drafted, streamed and batched texts are those of plain decoding.

  b rows    w nodes of a block    c companions    v vocabulary
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from t5x_lite.config.companions import Combination
from t5x_lite.decoding import sampling
from t5x_lite.utils.not_none import not_none

# Added to the log-probability of tokens that a rule rules out: no share of any sample, but still in
# the model's order, so that a constraint that allows only such tokens is obeyed all the same.
IMPLAUSIBLE = -1e4


class CombinedLogits(NamedTuple):
    """Logits after a rule.

    Attributes:
      logits: of the next token.
      by_model: nodes after which the model itself decided; None for a rule that always mixes.
    """

    logits: Float[Array, "b w v"]
    by_model: Bool[Array, "b w"] | None = None


class BothLogits(NamedTuple):
    """Log-probabilities of the next token, of the model and of its companion.

    Attributes:
      model: the model's.
      others: the companion's: one, or as many as it has layers.
      entropy: mean entropy of the first of `others` over the rule's window; None without one.
    """

    model: Float[Array, "b w v"]
    others: Float[Array, "c b w v"]
    entropy: Float[Array, "b w"] | None = None


class CombinationRule(Protocol):
    """A rule: a registered dataclass whose numbers may change without compiling again."""

    @property
    def window(self) -> int:
        """Number of tokens over which the rule reads the companion's entropy; 0 for none."""

    def combine(self, both: BothLogits) -> CombinedLogits:
        """Returns the logits of the next token."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["model", "other", "least"], meta_fields=[]
)
@dataclass(frozen=True)
class Linear:
    """A weighted sum of both log-probabilities, over the tokens that the model finds plausible.

    Classifier-free guidance by s (Sanchez et al., 2023, arXiv 2306.17806, eq. 7) is s and 1 - s;
    contrastive decoding is 1 and -1 (Li et al., 2022, arXiv 2210.15097), or 1 + b and -b (O'Brien
    and Lewis, 2023, arXiv 2309.09117); instructive decoding is 1 and -e (Kim et al., 2023, arXiv
    2311.00233).

    Attributes:
      model: weight of the model.
      other: weight of the companion.
      least: least probability, as a share of the model's highest; 0 takes every token.
      window: 0, as no entropy is read.
    """

    model: Float[Array, ""]
    other: Float[Array, ""]
    least: Float[Array, ""]
    window: ClassVar[int] = 0

    def combine(self, both: BothLogits) -> CombinedLogits:
        """Returns the weighted sum."""
        summed = self.model * both.model + self.other * both.others[0]
        return CombinedLogits(keep_plausible(summed, both.model, self.least))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["least"], meta_fields=[])
@dataclass(frozen=True)
class LayerContrast:
    """DoLa: the log-probability less that of the layer which differs most (Chuang et al., 2023,
    arXiv 2309.03883, eq. 2 to 4).

    The divergence from the mean m of the two distributions is the one that the authors' code and
    transformers compute, of m from each. The layer is chosen for each token by itself.

    Attributes:
      least: least probability, as a share of the model's highest.
    """

    least: Float[Array, ""]
    window: ClassVar[int] = 0

    def combine(self, both: BothLogits) -> CombinedLogits:
        """Returns the contrast with one layer for each node."""
        mean = jnp.logaddexp(both.model, both.others) - np.log(2)
        terms = jnp.exp(mean) * (2 * mean - both.model - both.others)
        layer = take_best(jnp.sum(terms, axis=-1), both.others)
        return CombinedLogits(keep_plausible(both.model - layer, both.model, self.least))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "mass"], meta_fields=[])
@dataclass(frozen=True)
class LayerCorrection:
    """DeCo: adds the layer that is surest of one of the likely tokens, by how sure it is (Wang et
    al., 2024, arXiv 2410.11779).

    Attributes:
      weight: of the layer's logits.
      mass: probability of the likely tokens, as few as have it; no others are written.
      window: 0, as no entropy is read.
    """

    weight: Float[Array, ""]
    mass: Float[Array, ""]
    window: ClassVar[int] = 0

    def combine(self, both: BothLogits) -> CombinedLogits:
        """Returns the corrected log-probabilities."""
        model = both.model
        likely = sampling.top_mass(model, jnp.exp(model), self.mass[None, None, None])
        surest = jnp.max(jnp.where(likely, both.others, -jnp.inf), axis=-1)
        layer = take_best(surest, both.others)
        sure = jnp.exp(jnp.max(surest, axis=0))[..., None]
        return CombinedLogits(
            jnp.where(likely, model + self.weight * sure * layer, model + IMPLAUSIBLE)
        )


@functools.partial(jax.tree_util.register_dataclass, data_fields=["least"], meta_fields=["window"])
@dataclass(frozen=True)
class Switch:
    """The companion's logits where it is sure, the model's where it is not (Simonds, 2025, entropy
    adaptive decoding, arXiv 2502.06833).

    The entropy is always the companion's, so that it is a function of the text.

    Attributes:
      least: mean entropy from which on the model decides, in nats.
      window: number of tokens of the mean, the next one included.
    """

    least: Float[Array, ""]
    window: int = 1

    def combine(self, both: BothLogits) -> CombinedLogits:
        """Returns one of the two."""
        by_model = not_none(both.entropy) >= self.least
        logits = jnp.where(by_model[..., None], both.model, both.others[0])
        return CombinedLogits(logits, by_model)


def keep_plausible(
    combined: Float[Array, "b w v"], model: Float[Array, "b w v"], least: Float[Array, ""]
) -> Float[Array, "b w v"]:
    """Puts the tokens that are too improbable below all others (Li et al., 2022, eq. 2).

    Args:
      combined: logits after a rule.
      model: log-probabilities of the model.
      least: least probability, as a share of the model's highest.
    """
    plausible = model >= jnp.max(model, axis=-1, keepdims=True) + jnp.log(least)
    return jnp.where(plausible, combined, model + IMPLAUSIBLE)


def take_best(
    values: Float[Array, "c b w"], others: Float[Array, "c b w v"]
) -> Float[Array, "b w v"]:
    """Takes the companion of the highest value for each node, the first of equal ones.

    Args:
      values: of each companion.
      others: log-probabilities of the companions.
    """
    best = jnp.argmax(values, axis=0)
    here = jnp.arange(len(others))[:, None, None] == best
    return jnp.sum(jnp.where(here[..., None], others, 0), axis=0)


def make_rule(combination: Combination) -> CombinationRule:
    """Returns the rule of a name and its numbers."""
    one: Any = np.asarray(1, np.float32)
    none: Any = np.asarray(0, np.float32)
    numbers: Any = tuple(np.asarray(each, np.float32) for each in combination.numbers)
    if combination.rule == "guidance":
        (scale,) = numbers
        return Linear(scale, one - scale, none)
    if combination.rule == "contrast":
        least, beta = numbers
        return Linear(one + beta, -beta, least) if beta else Linear(one, -one, least)
    if combination.rule == "instructive":
        (epsilon,) = numbers
        return Linear(one, -epsilon, none)
    if combination.rule == "switch":
        least, window = numbers
        return Switch(least, int(window))
    layered: Any = {"dola": LayerContrast, "deco": LayerCorrection}
    return layered[combination.rule](*numbers)
