# SPDX-License-Identifier: Apache-2.0
"""Loss, perplexity and bits per byte of a split, with teacher forcing."""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from t5x_lite import config, model, processes, sharding
from t5x_lite.batch import Batch
from t5x_lite.data import Batches
from t5x_lite.decoding import sampling, verification
from t5x_lite.kernels.vocabulary.logits import best_other_logit, target_mask
from t5x_lite.model.readout import target_losses
from t5x_lite.tokenizers.vocabulary import TextVocabulary

# Measured of every split.
NAMES = ("loss", "perplexity", "accuracy", "bits_per_byte", "target_tokens")
# Measured of every split of a model with Model.readout.
READOUT_NAMES = ("loss", "target_tokens")


class TargetSums(NamedTuple):
    """Sums over the targets that count.

    Attributes:
      nats: scalar, cross entropy.
      tokens: scalar, number of targets.
      right: scalar, targets that the model predicts.
    """

    nats: jax.Array
    tokens: jax.Array
    right: jax.Array


class TargetOutcomes(NamedTuple):
    """Outcomes of every target under a model, those that do not count included.

    Attributes:
      nats: [b t] cross entropy.
      right: [b t] 1 for targets that the model predicts, else 0.
    """

    nats: jax.Array
    right: jax.Array


def target_outcomes(cfg: config.Model, params: Any, batch: Batch) -> TargetOutcomes:
    """Outcomes of one batch with teacher forcing.

    Args:
      cfg: config of a model that writes text.
      params: its weights.
      batch: rows on the mesh.
    """
    outputs = model.Transformer(cfg).apply({"params": params}, batch)
    logits = sampling.gather_vocabulary(outputs)
    nats = -verification.token_log_probability(logits, batch.targets)
    target = jnp.sum(jnp.where(target_mask(logits, batch.targets), logits, 0), axis=-1)
    right = (target > best_other_logit(logits, batch.targets)).astype(jnp.float32)
    return TargetOutcomes(nats, right)


@functools.partial(jax.jit, static_argnums=0)
def target_sums(cfg: config.Model, params: Any, batch: Batch) -> TargetSums:
    """Sums of one batch.

    Args:
      cfg: config of the model.
      params: its weights.
      batch: rows on the mesh.
    """
    if cfg.readout is not None:
        outputs = model.Transformer(cfg).apply({"params": params}, batch)
        losses = target_losses(cfg.readout, outputs, batch.targets, batch.target_positions)
        right = jnp.zeros_like(losses.nll) if losses.correct is None else losses.correct
        return TargetSums(*(weighted_sum(batch, x) for x in (losses.nll, 1.0, right)))
    outcome = target_outcomes(cfg, params, batch)
    if batch.canvas is None:
        return TargetSums(*(weighted_sum(batch, x) for x in (outcome.nats, 1.0, outcome.right)))
    # The ends behind a text add to the bound of its likelihood, and are no tokens of it.
    text = batch.canvas.text
    tokens = jax.reshard(jnp.sum(text), P())
    nats, right = (weighted_sum(batch, x) for x in (outcome.nats, outcome.right * text))
    return TargetSums(nats, tokens, right)


def weighted_sum(batch: Batch, x: jax.Array | float) -> jax.Array:
    """Sum of values [b t] of the targets of a batch by their weights in the loss."""
    return jax.reshard(jnp.sum(x * batch.loss_weights), P())


def text_bytes(batch: Batch, vocabulary: TextVocabulary) -> int:
    """UTF-8 bytes of the text that the weighted targets of this host's rows stand for."""
    count, counted = 0, batch.loss_weights if batch.canvas is None else batch.canvas.text
    for targets, segments, weights in zip(
        batch.targets, batch.target_segments, counted, strict=True
    ):
        for segment in range(1, segments.max(initial=0) + 1):
            ids = targets[(segments == segment) & (weights > 0)]
            count += len(vocabulary.decode(ids).encode())
    return count


class SplitSums(NamedTuple):
    """TargetSums of a split, on the host.

    Attributes:
      nats: cross entropy.
      tokens: number of targets.
      right: targets that the model predicts.
      bytes: UTF-8 bytes of the targets' text.
    """

    nats: float = 0.0
    tokens: float = 0.0
    right: float = 0.0
    bytes: int = 0

    def plus(self, other: "SplitSums") -> "SplitSums":
        """Sums of both."""
        return SplitSums(*(a + b for a, b in zip(self, other, strict=True)))

    def loss(self) -> float:
        """Nats per token; raises ValueError without tokens."""
        if not self.tokens:
            raise ValueError("This split has no targets to predict")
        return self.nats / self.tokens


def measure_losses(
    cfg: config.Model, params: Any, batches: Batches, vocabulary: TextVocabulary, most: int
) -> dict[str, float]:
    """Computes loss (nats per target token), perplexity, accuracy, bits per byte, and the number of
    tokens.

    Of a model with Model.readout there are the loss (nats, or squared error of numbers) and the
    number of targets alone. Neither label smoothing nor z-loss counts, whatever the training adds.
    If rows come from several tasks or denoisers, each gets an equal part of the batches, and a loss
    "loss/<name>".

    Args:
      cfg: config of the model.
      params: its weights.
      batches: batches of the split.
      vocabulary: of the targets.
      most: number of batches, from the first one on.

    Raises:
      ValueError: the split has no targets to predict.
    """
    sums, each = {}, max(1, most // len(batches.parts))
    for part in batches.parts:
        alone = Batches([part], batches.mixture, batches.lengths, batches.shard, batches.masker)
        sums[part.name] = split_sums(cfg, params, alone, vocabulary, each)
    total = functools.reduce(SplitSums.plus, sums.values(), SplitSums())
    loss = total.loss()
    if cfg.readout is not None:
        return {"loss": loss, "target_tokens": total.tokens}
    by_part = {f"loss/{name}": part.loss() for name, part in sums.items() if part.tokens}
    values = (
        loss,
        math.exp(min(loss, 700.0)),
        100 * total.right / total.tokens,
        total.nats / math.log(2) / max(sum_over_processes(total.bytes), 1),
        total.tokens,
    )
    return dict(zip(NAMES, values, strict=True)) | (by_part if len(sums) > 1 else {})


def split_sums(
    cfg: config.Model, params: Any, batches: Batches, vocabulary: TextVocabulary, most: int
) -> SplitSums:
    """Sums over the first batches of a split.

    Args:
      cfg: config of the model.
      params: its weights.
      batches: batches of the split.
      vocabulary: of the targets.
      most: number of batches.
    """
    sums, size = np.zeros(3), 0
    for batch in itertools.islice(batches.evaluation(), most):
        size += text_bytes(batch, vocabulary) if cfg.writes else 0
        sums += np.array(target_sums(cfg, params, sharding.place_batch(batch)), np.float64)
    return SplitSums(*sums.tolist(), size)


def sum_over_processes(count: int) -> int:
    """Sum of `count` over the parts of the batch; several processes may share a part."""
    _, parts = sharding.batch_share()
    counts = processes.gather_texts(str(count))
    return sum(map(int, counts)) * parts // len(counts)
