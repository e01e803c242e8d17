# SPDX-License-Identifier: Apache-2.0
"""Sums over a microbatch of the losses of pairs (`Run.preferences`) and of samples (`Run.grpo`)."""

import jax
import jax.numpy as jnp

from t5x_lite import sharding
from t5x_lite.batch import Batch, PairReference, SampleData
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.training.losses import policy, preferences
from t5x_lite.training.step_values import LossSums, StepContext, count_unpadded_tokens
from t5x_lite.training.token_losses import split_along_rows, text_losses
from t5x_lite.utils.not_none import not_none


@sharding.split_rows()
def preference_sums(
    transformer, run: TrainingRun, params, reference_params, batch: Batch
) -> LossSums:
    """Computes the sums over the pairs of a batch; only `objective` has a gradient.

    Args:
      transformer: the `model.Transformer` that trains.
      run: config of the run.
      params: weights, those that train with their gradient slots.
      reference_params: weights of the reference model; None without one.
      batch: one microbatch, whose segments are the texts of pairs.
    """
    cfg = not_none(run.preferences)
    weights = split_along_rows(batch.loss_weights.astype(jnp.float32))
    losses = text_losses(transformer, run, params, batch)
    texts = preferences.score_pairs(-losses.objective, weights, batch.target_segments)
    reference = None
    if isinstance(batch.teacher_data, PairReference):
        reference = preferences.by_pair(batch.teacher_data.scores)
    elif cfg.has_reference:
        frozen = text_losses(transformer, run, reference_params, batch)
        scores = preferences.score_pairs(-frozen.objective, weights, batch.target_segments)
        reference = jax.lax.stop_gradient(scores.sums)
    pairs = preferences.preference_losses(cfg, texts, reference)

    def sum_pairs(values):
        return jnp.sum(jnp.where(texts.there, values, 0))

    return LossSums(
        objective=sum_pairs(pairs.loss),
        loss=jnp.sum(losses.nll * weights),
        correct=jnp.sum(losses.correct * weights),
        weights=jnp.sum(weights),
        tokens=count_unpadded_tokens(batch),
        units=preferences.count_pairs(batch.target_segments).astype(jnp.float32),
        means={name: sum_pairs(values) for name, values in pairs.means.items()},
    )


@sharding.split_rows()
def sample_sums(
    transformer, run: TrainingRun, params, batch: Batch, context: StepContext
) -> LossSums:
    """Computes the sums over the samples of a batch; only `objective` has a gradient.

    Args:
      transformer: the `model.Transformer` that trains.
      run: config of the run.
      params: weights, those that train with their gradient slots.
      batch: one microbatch, a sample in each row, with its SampleData.
      context: number of the update by these samples.
    """
    cfg, samples = not_none(run.grpo), batch.teacher_data
    assert isinstance(samples, SampleData)
    inside = split_along_rows(batch.loss_weights.astype(jnp.float32))
    samples = jax.tree.map(split_along_rows, samples)
    losses = text_losses(transformer, run, params, batch)
    current = jnp.where(inside > 0, -losses.objective, 0)
    # The program that scored the samples rounds otherwise: at the first update the ratio is 1.
    first = jax.lax.stop_gradient(current)
    old = jnp.where(context.update == 0, first, samples.old)
    tokens = policy.policy_losses(cfg, current, old, samples)
    weights = policy.token_weights(cfg, inside, run.data.lengths["targets"])
    return LossSums(
        objective=jnp.sum(tokens.loss * weights),
        loss=jnp.sum(losses.nll * inside),
        correct=jnp.sum(losses.correct * inside),
        weights=jnp.sum(inside),
        tokens=count_unpadded_tokens(batch),
        units=policy.count_units(cfg, inside),
        means={name: jnp.sum(values * weights) for name, values in tokens.means.items()},
    )
