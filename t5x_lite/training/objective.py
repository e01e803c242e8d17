# SPDX-License-Identifier: Apache-2.0
"""Objective of one microbatch: what a training step differentiates."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from t5x_lite import config, sharding
from t5x_lite.adaptation import teacher as teachers
from t5x_lite.adaptation.teacher import Teacher
from t5x_lite.batch import Batch, TeacherBatch
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.model import Transformer, mixed_precision
from t5x_lite.model.matching import match_logits
from t5x_lite.training import frozen_base
from t5x_lite.training.losses import (
    contrastive,
    cross_entropy,
    distillation,
    draft_heads,
    early_exit,
    policy,
    preferences,
    readout,
)
from t5x_lite.training.losses.distillation import DistillationTerms
from t5x_lite.training.optimizer.param_groups import Selection
from t5x_lite.training.preference_sums import preference_sums, sample_sums
from t5x_lite.training.step_values import LossSums, StepContext, count_unpadded_tokens
from t5x_lite.training.token_losses import (
    split_along_rows,
    token_losses,
    use_chunked_loss,
)
from t5x_lite.utils.not_none import not_none

# Folded into the step's key, which dropout splits, for the draw of a head.
HEAD_KEY = 1 << 31
# The same for the draw of pairs that do not belong together.
MATCHING_KEY = HEAD_KEY + 1


def make_objective(run: TrainingRun, selection: Selection, teacher: Teacher | None) -> Callable:
    """Builds the function that is differentiated.

    Args:
      run: config of the run.
      selection: the weights that train.
      teacher: teacher whose logits are computed in the step; None without one.

    Returns:
      objective(slots, batch, context, total, *, frozen): this microbatch's part of the objective
      per target token of all microbatches, and its LossSums. `slots` are the gradient slots of the
      weights that train (`mixed_precision.gradient_slots`), `total` is the sum of loss weights, and
      `frozen` the params of the state, the teacher's and the frozen base.
    """
    transformer = Transformer(run.model, remat=run.train.remat, unroll=run.train.unroll)

    def objective(slots, batch: Batch, context: StepContext, total, *, frozen):
        params, teacher_params, base = frozen
        params = selection.put(params, mixed_precision.join_slots(selection.take(params), slots))
        params = frozen_base.whole_params(run, params, base, context.key)
        if run.preferences is not None:
            reference = base if teacher_params is None else teacher_params
            sums = preference_sums(transformer, run, params, reference, batch)
            return sums.objective / total, sums
        if run.grpo is not None:
            sums = sample_sums(transformer, run, params, batch, context)
            return sums.objective / total, sums
        terms = None
        if batch.teacher_data is not None:
            assert run.distillation is not None
            terms = functools.partial(
                distillation_terms, run.distillation, teacher, teacher_params, batch.teacher_data
            )
        if run.contrastive is not None:
            sums = pair_sums(transformer, run.contrastive, params, batch, context)
        else:
            sums = token_sums(transformer, run, params, batch, context, terms)
        return sums.objective / total, sums

    return objective


def count_units(run: TrainingRun, batch: Batch) -> jax.Array:
    """Counts what the objective of a batch is the mean over: target tokens, pairs or samples."""
    if run.preferences is not None:
        return preferences.count_pairs(batch.target_segments).astype(jnp.float32)
    weights = batch.loss_weights.astype(jnp.float32)
    return jnp.sum(weights) if run.grpo is None else policy.count_units(run.grpo, weights)


def samples_heads(run: TrainingRun) -> bool:
    """True if each microbatch trains one head that is drawn."""
    return run.model.draft_heads is not None and run.train.draft_head_loss.heads == "random"


def distillation_terms(
    cfg: config.Distillation, teacher, teacher_params, teacher_data, logits
) -> DistillationTerms:
    """Computes the student's divergence from the teacher.

    Args:
      cfg: temperature and top_k.
      teacher: the teacher; None if its logits are stored.
      teacher_params: weights of the teacher; None if its logits are stored.
      teacher_data: the batch as the teacher reads it (TeacherBatch), or its stored TeacherLogits.
      logits: [b t v] float32, the student's.
    """
    if isinstance(teacher_data, TeacherBatch):
        teacher_logits = teachers.compute_logits(teacher, teacher_params, teacher_data)
        if cfg.top_k is None:
            divergence = distillation.full_divergence(logits, teacher_logits, cfg.temperature)
            return DistillationTerms(divergence, teacher_data.known)
        ids, log_probabilities = distillation.top_k_log_probabilities(
            teacher_logits, cfg.top_k, cfg.temperature
        )
    else:
        ids, log_probabilities = teacher_data.ids, teacher_data.log_probabilities
    divergence = distillation.top_k_divergence(logits, ids, log_probabilities, cfg.temperature)
    return DistillationTerms(divergence, teacher_data.known)


def pair_sums(
    transformer, cfg: config.Contrastive, params, batch: Batch, context: StepContext
) -> LossSums:
    """Computes the sums over the pairs of a batch, one for each of its rows.

    Args:
      transformer: the `model.Transformer` that trains.
      cfg: config of the loss.
      params: weights, those that train with their gradient slots.
      batch: all rows of the step, with the weights of `contrastive.weigh_pairs`.
      context: key and number of the step.
    """
    apply = functools.partial(transformer.apply, {"params": params})
    texts = contrastive.pair_texts(batch)
    read = functools.partial(apply, method=Transformer.pooled)
    vectors = contrastive.pair_vectors(read, texts, context.key)
    temperature = cfg.temperature
    if transformer.cfg.readout.temperature is not None:
        temperature = apply(method=trained_temperature)
    targets = contrastive.score_targets(texts, vectors, temperature)
    inputs = contrastive.score_inputs(texts, vectors, temperature)
    losses = contrastive.pair_losses(targets, inputs if cfg.symmetric else None)
    weights = jnp.sum(batch.loss_weights, axis=1)
    loss = objective = jnp.sum(losses.nll * weights)
    if cfg.matching:
        match = functools.partial(apply, method=match_logits)
        key = jax.random.fold_in(not_none(context.key), MATCHING_KEY)
        telling = contrastive.matching_losses(match, texts, (targets, inputs), key)
        objective = loss + cfg.matching * jnp.sum(telling * weights)
    return LossSums(
        objective=objective,
        loss=loss,
        correct=jnp.sum(losses.correct * weights),
        weights=jnp.sum(weights),
        tokens=count_unpadded_tokens(batch),
    )


def trained_temperature(transformer: Transformer) -> jax.Array:
    """The temperature that trains with the vectors (Readout.temperature)."""
    return transformer.readout_head.temperature()


@sharding.split_rows()
def token_sums(
    transformer, run: TrainingRun, params, batch: Batch, context: StepContext, terms
) -> LossSums:
    """Computes the sums over the target tokens of a batch; only `objective` has a gradient.

    Args:
      transformer: the `model.Transformer` that trains.
      run: config of the run.
      params: weights, those that train with their gradient slots.
      batch: one microbatch.
      context: key and number of the step.
      terms: DistillationTerms as a function of the logits [b t v]; None without a teacher.
    """
    if run.model.readout is not None:
        return readout.readout_sums(transformer, run, params, batch, context.key)
    cfg = run.train
    weights = split_along_rows(batch.loss_weights.astype(jnp.float32))
    apply = functools.partial(transformer.apply, {"params": params})
    read = functools.partial(token_losses, apply, cfg, use_chunked_loss(run, batch))
    hidden, early = hidden_and_exits(apply, run, batch._replace(teacher_data=None), context)
    if terms is None:
        losses = read(hidden, batch.targets)
    else:
        logits = apply(hidden, method=Transformer.logits)
        losses = cross_entropy.cross_entropy(logits, batch.targets, cfg.label_smoothing, cfg.z_loss)
    sums = LossSums(
        objective=jnp.sum(losses.objective * weights),
        loss=jnp.sum(losses.nll * weights),
        correct=jnp.sum(losses.correct * weights),
        weights=jnp.sum(weights),
        tokens=count_unpadded_tokens(batch),
    )
    if terms is not None:
        teaching = terms(logits)
        known = weights * teaching.known
        mixed = distillation.mixed_objective(losses, teaching, not_none(run.distillation))
        sums = sums._replace(
            objective=jnp.sum(mixed * weights),
            divergence=jnp.sum(teaching.divergence * known),
            teacher_tokens=jnp.sum(known),
        )
    if early is not None:
        last, added = early_exit.exit_objective(apply, read, early, batch)
        sums = sums._replace(objective=last * sums.objective + added)
    if run.model.draft_heads is None:
        return sums
    heads = draft_heads.TrainedHeads(apply, read, run.model.draft_heads, cfg.draft_head_loss)
    return add_head_losses(sums, heads, hidden, batch, context.key if samples_heads(run) else None)


def zero_sums(run: TrainingRun, batch: Batch) -> LossSums:
    """LossSums of no rows, with the fields that those of the batch have."""
    zero = jnp.zeros(())
    sums = LossSums(zero, zero, zero, zero, jnp.zeros((), jnp.int32))
    if run.model.readout is not None and run.model.readout.kind == "number":
        sums = sums._replace(correct=None)
    if run.preferences is not None:
        names = preferences.mean_names(run.preferences)
        return sums._replace(units=zero, means=dict.fromkeys(names, zero))
    if run.grpo is not None:
        return sums._replace(units=zero, means=dict.fromkeys(policy.MEANS, zero))
    if batch.teacher_data is not None:
        sums = sums._replace(divergence=zero, teacher_tokens=zero)
    if run.model.draft_heads is not None:
        sums = sums._replace(head_correct=zero, head_targets=zero)
    return sums


def hidden_and_exits(apply, run: TrainingRun, batch: Batch, context: StepContext):
    """Computes the hidden states [b t d] that logits are read from, and LayerSkip's exits.

    Args:
      apply: transformer.apply with its weights.
      run: config of the run.
      batch: one microbatch.
      context: key and number of the step.

    Returns:
      hidden states and EarlyExits; None in place of these without LayerSkip.
    """
    if run.train.layer_skip is None:
        return apply(batch, context.key, method=Transformer.hidden), None
    layers = not_none(run.model.decoder).layers
    rates = early_exit.skip_rates(run.train, layers, context.step)
    hidden, states = apply(batch, context.key, rates, method=Transformer.hidden_with_layer_skip)
    weights = early_exit.exit_weights(run.train.layer_skip, layers, context.step)
    return hidden, early_exit.EarlyExits(states, weights)


def add_head_losses(
    sums: LossSums, heads: draft_heads.TrainedHeads, hidden, batch: Batch, key
) -> LossSums:
    """Adds the draft heads' share of the objective, and how many targets they predicted.

    Args:
      sums: sums of the model's own loss.
      heads: the draft heads.
      hidden: [b t d] hidden states that the model's logits are read from.
      batch: one microbatch.
      key: PRNG key that draws one head; None for all heads.
    """
    main = heads.loss.factors(heads.heads.count)[0]
    head_key = None if key is None else jax.random.fold_in(key, HEAD_KEY)
    added = draft_heads.head_sums(heads, hidden, batch, head_key)
    return sums._replace(
        objective=main * sums.objective + added.objective,
        head_correct=added.correct,
        head_targets=added.weights,
    )
