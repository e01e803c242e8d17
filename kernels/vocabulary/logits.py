# SPDX-License-Identifier: Apache-2.0
"""Logits over a vocabulary from hidden states, and statistics of a row's logits without them.

A vocabulary may be split over mesh axes: then every device holds its rows of the table in the order
of `jax.lax.axis_index`, and the statistics of its part are merged by collectives. Axes: r rows
(tokens), d width of the model, v ids of the vocabulary.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.kernels.tile_math import apply_softcap


@dataclass(frozen=True)
class CrossEntropyConfig:
    """Static configuration of logits and their losses.

    Logits are softcap * tanh((scale * hidden . table + bias) / softcap), in float32; without a
    softcap, scale * hidden . table + bias. Without a bias it is 0.

    Attributes:
      tied: the table is [v d], an embedding; otherwise it is a head, [d v].
      smoothing: label smoothing, probability that is taken from the target.
      z_loss: coefficient of log(Z)^2 in the objective.
      softcap: cap of the logits, or None.
      scale: factor of the products.
      axes: mesh axes over which v is split, inside a shard_map.
    """

    tied: bool
    smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    scale: float = 1.0
    axes: tuple[str, ...] = ()

    def local_size(self, table: jax.Array) -> int:
        """Returns the number of ids that this device holds."""
        return table.shape[0 if self.tied else 1]

    def global_size(self, table: jax.Array) -> int:
        """Returns the number of ids on all devices together."""
        return self.local_size(table) * math.prod(jax.lax.axis_size(axis) for axis in self.axes)

    def first_id(self, table: jax.Array) -> Int[Array, ""]:
        """Returns the first id that this device holds."""
        if not self.axes:
            return jnp.zeros((), jnp.int32)
        return jax.lax.axis_index(self.axes).astype(jnp.int32) * self.local_size(table)

    def local_ids(self, ids: Int[Array, "..."], table: jax.Array) -> Int[Array, "..."]:
        """Returns ids counted from the first that this device holds, -1 for those it does not."""
        ids = ids - self.first_id(table)
        return jnp.where((ids >= 0) & (ids < self.local_size(table)), ids, -1)

    def scale_and_cap(
        self, products: Float[Array, "... v"], bias: Float[Array, " v"] | None = None
    ) -> Float[Array, "... v"]:
        """Returns the logits of products hidden . table."""
        logits = products * self.scale if self.scale != 1 else products
        logits = logits if bias is None else logits + bias.astype(jnp.float32)
        return apply_softcap(logits, self.softcap)

    def product_gradient(
        self, gradient: Float[Array, "..."], logits: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Returns the gradient of the products hidden . table from that of the logits."""
        if self.softcap is not None:
            gradient = gradient * (1 - jnp.square(logits / self.softcap))
        return gradient * self.scale if self.scale != 1 else gradient


class SmoothedTarget(NamedTuple):
    """Distribution that label smoothing puts in place of a target.

    Attributes:
      target: probability of the target.
      other: probability of every other id.
      entropy: of the distribution, in nats.
    """

    target: float
    other: float
    entropy: float


def smooth_target(smoothing: float, vocab: int) -> SmoothedTarget:
    """Returns the distribution of label smoothing over a vocabulary of so many ids."""
    target, other = 1.0 - smoothing, smoothing / (vocab - 1)
    entropy = -target * math.log(target)
    if other > 0:
        entropy -= (vocab - 1) * other * math.log(other)
    return SmoothedTarget(target, other, entropy)


def target_mask(logits: Float[Array, "... v"], targets: Int[Array, "..."]) -> Bool[Array, "... v"]:
    """Mask that is true at each target's id: a comparison, as a gather cannot cross a vocabulary
    that is split over devices."""
    return jnp.arange(logits.shape[-1]) == targets[..., None]


def best_other_logit(
    logits: Float[Array, "... v"], targets: Int[Array, "..."]
) -> Float[Array, "..."]:
    """The largest logit of any id but the target's: a target is predicted if its own is larger. One
    that shares the first place is not, or a model of equal logits would predict everything."""
    return jnp.max(jnp.where(target_mask(logits, targets), -jnp.inf, logits), axis=-1)


class SoftmaxStats(NamedTuple):
    """Statistics of each row's logits over a part of the vocabulary.

    Attributes:
      m: [r], the largest logit.
      l: [r], the sum of exp(logit - m).
      target_logit: [r], 0 where the target is not in this part.
      logit_sum: [r], the sum of the logits.
      best_other: [r], the largest logit of any id but the target's.
    """

    m: Float[Array, " r"]
    l: Float[Array, " r"]
    target_logit: Float[Array, " r"]
    logit_sum: Float[Array, " r"]
    best_other: Float[Array, " r"]

    @property
    def log_z(self) -> Float[Array, " r"]:
        """log of the sum of exp(logit)."""
        return self.m + jnp.log(self.l)

    def all_reduce(self, axes: tuple[str, ...]) -> "SoftmaxStats":
        """Returns the statistics over the parts of all devices along mesh axes."""
        if not axes:
            return self
        m, best_other = jax.lax.pmax((self.m, self.best_other), axes)
        l = self.l * jnp.exp(self.m - m)
        sums = jax.lax.psum((l, self.target_logit, self.logit_sum), axes)
        return SoftmaxStats(m, *sums, best_other)


class RowGradients(NamedTuple):
    """Numbers of each row that the gradient of its logits depends on; they broadcast with ids.

    Attributes:
      target: id of the target.
      log_z: log of the sum of exp(logit).
      softmax_coefficient: factor of the softmax, z-loss included.
      target_coefficient: factor of the smoothed target.
    """

    target: Int[Array, "..."]
    log_z: Float[Array, "..."]
    softmax_coefficient: Float[Array, "..."]
    target_coefficient: Float[Array, "..."]

    def product_gradient(
        self,
        logits: Float[Array, "..."],
        ids: Int[Array, "..."],
        smoothed: SmoothedTarget,
        config: CrossEntropyConfig,
    ) -> Float[Array, "..."]:
        """Returns the objective's gradient to the products hidden . table of some rows and ids.

        Args:
          logits: of these rows and ids.
          ids: of the vocabulary.
          smoothed: the smoothed target.
          config: of the logits.
        """
        probs = jnp.exp(logits - self.log_z)
        target_probs = jnp.where(ids == self.target, smoothed.target, smoothed.other)
        gradient = self.softmax_coefficient * probs - self.target_coefficient * target_probs
        return config.product_gradient(gradient, logits)


def match_varying_axes(*operands: jax.Array) -> list[jax.Array]:
    """Returns operands that all vary over every mesh axis over which one of them does.

    The gradient of an operand that did not is then summed over that axis.
    """
    varying = [jax.typeof(operand).manual_axis_type.varying for operand in operands]
    union = frozenset().union(*varying)
    return [
        jax.lax.pcast(operand, tuple(union - axes), to="varying") if union - axes else operand
        for operand, axes in zip(operands, varying, strict=True)
    ]


def varies_over(operand: jax.Array, axes: tuple[str, ...]) -> bool:
    """Returns True if the operand's type says that it differs over all these mesh axes."""
    return set(axes) <= jax.typeof(operand).manual_axis_type.varying
