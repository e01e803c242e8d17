# SPDX-License-Identifier: Apache-2.0
"""Loss, perplexity and bits per byte of a split, teacher-forced."""

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
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.decoding import loop, sampling


class Totals(NamedTuple):
    """Sums over the targets that count: nats, tokens, and those the model would have chosen."""

    nats: jax.Array
    tokens: jax.Array
    right: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def totals(cfg: config.Model, params: Any, batch: Batch) -> Totals:
    logits = sampling.whole(model.Transformer(cfg).apply({"params": params}, batch))
    nats = -loop.token_log_probability(logits, batch.targets)
    right = (jnp.argmax(logits, axis=-1) == batch.targets).astype(jnp.float32)
    total = lambda x: jax.reshard(jnp.sum(x * batch.loss_weights), P())
    return Totals(total(nats), total(jnp.ones_like(nats)), total(right))


def text_bytes(batch: Batch, vocabulary: Vocabulary) -> int:
    """UTF-8 bytes of the text that the weighted targets of this host's rows stand for."""
    count = 0
    for targets, segments, weights in zip(
        batch.targets, batch.target_segments, batch.loss_weights, strict=True
    ):
        for segment in range(1, segments.max(initial=0) + 1):
            ids = targets[(segments == segment) & (weights > 0)]
            count += len(vocabulary.decode(ids).encode())
    return count


class Sums(NamedTuple):
    """Totals on the host, and the UTF-8 bytes of the targets' text."""

    nats: float = 0.0
    tokens: float = 0.0
    right: float = 0.0
    bytes: int = 0

    def plus(self, other: "Sums") -> "Sums":
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))

    def loss(self) -> float:
        """Nats per token; ValueError where there is no token."""
        if not self.tokens:
            raise ValueError("There is no target to predict in this split")
        return self.nats / self.tokens


def measure(
    cfg: config.Model, params: Any, batches: Batches, vocabulary: Vocabulary, most: int
) -> dict[str, float]:
    """Loss (nats per target token), perplexity, accuracy, bits per byte, and the tokens counted.

    Over the first `most` batches of the split in order. Without label smoothing and z-loss,
    whatever the training adds. Where rows come from several tasks or denoisers, each gets an equal
    part of the batches, and a loss of its own, "loss/<name>".

    Raises:
      ValueError: the split has no targets to predict.
    """
    found, each = {}, max(1, most // len(batches.parts))
    for part in batches.parts:
        alone = Batches([part], batches.mixture, batches.lengths, batches.shard)
        found[part.name] = sums_of(cfg, params, alone, vocabulary, each)
    whole = functools.reduce(Sums.plus, found.values(), Sums())
    loss = whole.loss()
    own = {f"loss/{name}": sums.loss() for name, sums in found.items() if sums.tokens}
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "accuracy": 100 * whole.right / whole.tokens,
        "bits_per_byte": whole.nats / math.log(2) / max(everywhere(whole.bytes), 1),
        "target_tokens": whole.tokens,
    } | (own if len(found) > 1 else {})


def sums_of(
    cfg: config.Model, params: Any, batches: Batches, vocabulary: Vocabulary, most: int
) -> Sums:
    """Totals over the first `most` batches."""
    sums, size = np.zeros(3), 0
    for batch in itertools.islice(batches.evaluation(), most):
        size += text_bytes(batch, vocabulary)
        sums += np.array(totals(cfg, params, sharding.place_batch(batch)), np.float64)
    return Sums(*sums.tolist(), size)


def everywhere(count: int) -> int:
    """The sum of count over the parts of the batch, of which processes may share one."""
    _, parts = sharding.batch_share()
    said = processes.everyone(str(count))
    return sum(map(int, said)) * parts // len(said)
