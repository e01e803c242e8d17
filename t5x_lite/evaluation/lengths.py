# SPDX-License-Identifier: Apache-2.0
"""Losses of a split by the length of its texts: does a model go on where training ended?"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from t5x_lite import config, sharding
from t5x_lite.batch import Batch
from t5x_lite.config.canvas import check_left_to_right
from t5x_lite.data import Batches
from t5x_lite.evaluation import losses


class LengthBucket(NamedTuple):
    """The texts whose targets have from `least` to `most` tokens, measured with teacher forcing.

    Attributes:
      least: the fewest tokens.
      most: the most tokens; None is no limit.
      texts: number of texts.
      tokens: number of their targets.
      loss: nats per target; None without texts.
      accuracy: percentage of targets that the model predicts.
      whole: percentage of texts of which it predicts every target.
    """

    least: int
    most: int | None
    texts: int
    tokens: int
    loss: float | None = None
    accuracy: float | None = None
    whole: float | None = None


def parse_lengths(text: str) -> tuple[int, ...]:
    """Reads the longest length of each bucket but the last, such as "8,16".

    Raises:
      ValueError: they are not positive integers that rise.
    """
    parts = [part.strip() for part in text.split(",")]
    ends = tuple(int(part) for part in parts if part.isascii() and part.isdigit())
    rising = all(one < other for one, other in itertools.pairwise((0, *ends)))
    config.require(
        len(ends) == len(parts) and rising and ends[-1] < 2**31,
        f"--lengths {text}: write lengths that rise, such as --lengths=8,16",
    )
    return ends


@functools.partial(jax.jit, static_argnums=(0, 1))
def bucket_sums(cfg: config.Model, ends: tuple[int, ...], params: Any, batch: Batch) -> jax.Array:
    """Sums [5 buckets] of one batch: texts, targets, nats, targets and texts predicted.

    Args:
      cfg: config of the model.
      ends: the longest length of each bucket but the last.
      params: its weights.
      batch: rows on the mesh.
    """
    outcome = losses.target_outcomes(cfg, params, batch)
    counted = (batch.loss_weights > 0).astype(jnp.float32)
    segments = batch.target_segments
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, :, None]
    same = same.astype(jnp.float32)
    # Of the text that each target belongs to.
    length = jnp.einsum("bts,bs->bt", same, counted)
    wrong = jnp.einsum("bts,bs->bt", same, counted * (1 - outcome.right))
    bucket = sum((length > end).astype(jnp.int32) for end in ends)
    one_hot = jax.nn.one_hot(bucket, len(ends) + 1, dtype=jnp.float32)
    text = counted / jnp.maximum(length, 1)
    values = (text, counted, counted * outcome.nats, counted * outcome.right, text * (wrong == 0))
    sums = [jnp.einsum("bt,btk->k", each, one_hot, out_sharding=P(None)) for each in values]
    return jnp.stack(sums)


def measure_lengths(
    cfg: config.Model, params: Any, batches: Batches, ends: Sequence[int], most: int
) -> list[LengthBucket]:
    """Losses by the number of targets of a text.

    Args:
      cfg: config of the model, which writes text.
      params: its weights.
      batches: batches of the split.
      ends: the longest length of each bucket but the last.
      most: number of batches, from the first one on.

    Raises:
      ValueError: the model has labels or vectors in place of text, or fills masked blocks.
    """
    config.require(
        cfg.readout is None, "--lengths measures losses of text: the model has Model.readout"
    )
    check_left_to_right(cfg, "--lengths")
    sums = np.zeros((5, len(ends) + 1))
    for batch in itertools.islice(batches.evaluation(), most):
        placed = sharding.place_batch(batch)
        sums += np.asarray(bucket_sums(cfg, tuple(ends), params, placed), np.float64)
    rows = []
    for least, longest, column in zip(
        (1, *(e + 1 for e in ends)), (*ends, None), sums.T, strict=True
    ):
        texts, tokens, nats, right, whole = column.tolist()
        row = LengthBucket(least, longest, round(texts), round(tokens))
        if tokens:
            shares = 100 * right / tokens, 100 * whole / texts
            row = row._replace(loss=nats / tokens, accuracy=shares[0], whole=shares[1])
        rows.append(row)
    return rows


def format_lengths(rows: Sequence[LengthBucket]) -> str:
    """A table for the terminal, a line for each bucket."""
    lines = [f"  {'targets':<12}{'texts':>10}{'loss':>10}{'accuracy':>10}{'whole texts':>13}"]
    for row in rows:
        name = f"over {row.least - 1}" if row.most is None else f"{row.least} to {row.most}"
        line = f"  {name:<12}{row.texts:>10,}"
        if row.loss is not None:
            line += f"{row.loss:>10.4f}{row.accuracy:>10.2f}{row.whole:>13.2f}"
        lines.append(line)
    return "\n".join(lines)
