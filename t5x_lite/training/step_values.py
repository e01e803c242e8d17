# SPDX-License-Identifier: Apache-2.0
"""Values of one training step besides state and batch: context, sums of losses, metrics."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from t5x_lite.batch import Batch


class LossSums(NamedTuple):
    """Sums over target tokens; divided by `weights` once, whatever the microbatches.

    Attributes:
      objective: scalar, what is minimized.
      loss: scalar, cross entropy in nats.
      correct: scalar, targets whose logit is the largest; None for numbers.
      weights: scalar, loss weights: the number of targets that count.
      tokens: int32 scalar, positions that are not padding, inputs and targets together.
      divergence: scalar, KL to the teacher over `teacher_tokens`; None without a teacher.
      teacher_tokens: scalar, targets for which the teacher has a distribution.
      head_correct: scalar, targets that draft heads predicted; None without Model.draft_heads.
      head_targets: scalar, targets that draft heads were to predict.
      units: scalar, what `objective` and `means` are divided by, in place of `weights`: pairs, or
        samples; None where that is `weights`.
      means: sums by the name of what is reported besides; None for nothing.
    """

    objective: jax.Array
    loss: jax.Array
    correct: jax.Array | None
    weights: jax.Array
    tokens: jax.Array
    divergence: jax.Array | None = None
    teacher_tokens: jax.Array | None = None
    head_correct: jax.Array | None = None
    head_targets: jax.Array | None = None
    units: jax.Array | None = None
    means: dict[str, jax.Array] | None = None


class StepContext(NamedTuple):
    """Random key and number of a step.

    Attributes:
      key: PRNG key of dropout, skipped layers and the drawn head; None if nothing is random.
      step: int scalar, steps done before this one.
      update: int scalar, updates by the same samples before this one.
    """

    key: jax.Array | None = None
    step: Any = 0
    update: Any = 0


class StepMetrics(NamedTuple):
    """Results of one step besides the new state.

    Attributes:
      sums: sums over the step's tokens.
      learning_rate: scalar.
      gradient_norm: scalar, global L2 norm of the gradient of what trains at this step.
      skipped: bool scalar, true if gradient or update were not finite.
      consecutive: int scalar, skipped steps in a row, this one included.
      squares: tree of the weights' structure, squared norm of each gradient, per layer where layers
        are stacked: it locates a gradient that is not finite.
    """

    sums: LossSums
    learning_rate: Any
    gradient_norm: jax.Array
    skipped: jax.Array
    consecutive: jax.Array
    squares: Any


def count_unpadded_tokens(batch: Batch) -> jax.Array:
    """Number of positions of a batch that are not padding, inputs, targets and negatives."""
    segments = (batch.target_segments, batch.input_segments, batch.negative_segments)
    return functools.reduce(
        jnp.add, (jnp.sum((part > 0).astype(jnp.int32)) for part in segments if part is not None)
    )
