# SPDX-License-Identifier: Apache-2.0
"""Losses of the target tokens of rows, from all logits at once or a part of the vocabulary at a
time."""

import dataclasses
import functools

import jax

from t5x_lite import config
from t5x_lite.batch import Batch
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.kernels import api as kernels
from t5x_lite.model import Transformer
from t5x_lite.sharding import batch_shards, spec
from t5x_lite.training.losses import cross_entropy

# Above this many bytes of float32 logits on a device, computing them again for the backward pass (a
# third more work in the last product) is the smaller evil.
MAX_LOGIT_BYTES = 1 << 30


def token_losses(apply, cfg: config.Train, chunked: bool, hidden, targets):
    """Computes the losses [b t] of targets.

    Args:
      apply: transformer.apply with its weights.
      cfg: label smoothing and z-loss.
      chunked: true to compute the loss without the logits of all targets at once.
      hidden: [b t d] hidden state of each target.
      targets: [b t] ids.
    """
    targets = split_along_rows(targets)
    if chunked:
        return apply(hidden, targets, cfg.label_smoothing, cfg.z_loss, method=Transformer.losses)
    logits = apply(hidden, method=Transformer.logits)
    return cross_entropy.cross_entropy(logits, targets, cfg.label_smoothing, cfg.z_loss)


def split_along_rows(x: jax.Array) -> jax.Array:
    """Places x [b t] as rows are that train: split along their length too (Mesh.context)."""
    return jax.reshard(x, spec("batch length"))


def use_chunked_loss(run: TrainingRun, batch: Batch) -> bool:
    """True if the loss is to be computed without the logits of all targets at once."""
    choice = run.train.cross_entropy
    if choice != "auto":
        return choice == "chunked"
    logit_bytes = 4 * batch.targets.size * run.model.vocab / batch_shards()
    fused = kernels.has_kernels(kernels.select_backend(run.model.attention))
    fused = fused and not run.model.logits_bias
    return fused or logit_bytes > MAX_LOGIT_BYTES


def text_losses(transformer, run: TrainingRun, params, batch: Batch) -> kernels.TokenLosses:
    """Losses [b t] whose `objective` is the negative log-probability of each target.

    Args:
      transformer: the `model.Transformer`.
      run: config of the run.
      params: weights.
      batch: rows.
    """
    apply = functools.partial(transformer.apply, {"params": params})
    hidden = apply(batch._replace(teacher_data=None), None, method=Transformer.hidden)
    # Smoothing and z-loss are of likelihood training.
    cfg = dataclasses.replace(run.train, label_smoothing=0.0, z_loss=0.0)
    return token_losses(apply, cfg, use_chunked_loss(run, batch), hidden, batch.targets)
