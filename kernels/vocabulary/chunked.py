# SPDX-License-Identifier: Apache-2.0
"""Cross entropy in plain XLA, a chunk of rows at a time: what CPUs and GPUs run.

Axes: r rows, c chunks of p rows, d width of the model, v ids of the vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite.kernels.tile_math import dot_precision
from t5x_lite.kernels.vocabulary.logits import (
    CrossEntropyConfig,
    RowGradients,
    SmoothedTarget,
    SoftmaxStats,
    best_other_logit,
    match_varying_axes,
)

# Logits of one chunk: 64 MB of float32, as long as that is 128 rows or more. Below, the products
# would read the table more often than they use it.
CHUNK_LOGITS = 1 << 24
MIN_ROWS = 128


def chunk_sizes(rows: int, vocab: int) -> tuple[int, int]:
    """Returns the number of chunks, and rows of each (the last is padded)."""
    max_rows = max(CHUNK_LOGITS // vocab, MIN_ROWS)
    count = -(-rows // max_rows)
    return count, -(-rows // count)


def split_rows(x: Float[Array, "r ..."], count: int, rows: int) -> Float[Array, "c p ..."]:
    """Returns x in chunks, padded with zeros.

    Args:
      x: [r ...].
      count: number of chunks.
      rows: rows of each.
    """
    missing = count * rows - x.shape[0]
    padded = jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))) if missing else x
    return padded.reshape(count, rows, *x.shape[1:])


def compute_logits(hidden, table, bias, config: CrossEntropyConfig) -> Float[Array, "p v"]:
    """Returns the float32 logits of a chunk of rows.

    Args:
      hidden: [p d].
      table: [v d] where tied, else [d v].
      bias: [v], or None.
      config: of the logits.
    """
    products = jnp.einsum(
        "pd,vd->pv" if config.tied else "pd,dv->pv",
        hidden,
        table,
        preferred_element_type=jnp.float32,
        precision=dot_precision(table.dtype),
    )
    return config.scale_and_cap(products, bias)


def chunked_stats(
    hidden: Float[Array, "r d"],
    table: Float[Array, "..."],
    targets: Int[Array, " r"],
    bias: Float[Array, " v"] | None,
    config: CrossEntropyConfig,
) -> SoftmaxStats:
    """Returns the statistics of each row over this device's part of the vocabulary.

    Args:
      hidden: [r d], hidden states.
      table: [v d] where tied, else [d v].
      targets: [r], counted within this part.
      bias: [v], or None.
      config: of the logits.
    """
    ids = jnp.arange(config.local_size(table))

    def chunk_stats(chunk) -> SoftmaxStats:
        hidden, targets = chunk
        logits = compute_logits(hidden, table, bias, config)
        m = jnp.max(logits, axis=-1)
        l = jnp.sum(jnp.exp(logits - m[:, None]), axis=-1)
        target_logit = jnp.sum(jnp.where(ids == targets[:, None], logits, 0), axis=-1)
        best_other = best_other_logit(logits, targets)
        return SoftmaxStats(m, l, target_logit, jnp.sum(logits, axis=-1), best_other)

    count, rows = chunk_sizes(len(targets), len(ids))
    chunks = split_rows(hidden, count, rows), split_rows(targets, count, rows)
    stats = jax.lax.map(chunk_stats, chunks)
    return SoftmaxStats(*(field.reshape(-1)[: len(targets)] for field in stats))


def chunked_gradients(
    hidden: Float[Array, "r d"],
    table: Float[Array, "..."],
    bias: Float[Array, " v"] | None,
    rows: RowGradients,
    smoothed: SmoothedTarget,
    config: CrossEntropyConfig,
) -> tuple[Float[Array, "r d"], Float[Array, "..."], Float[Array, " v"] | None]:
    """Returns the gradients of hidden (this device's part of it), of the table and of the bias.

    Args:
      hidden: [r d], hidden states.
      table: [v d] where tied, else [d v].
      bias: [v], or None.
      rows: [r] each.
      smoothed: the smoothed target.
      config: of the logits.
    """
    ids = jnp.arange(config.local_size(table))
    exact: dict[str, Any] = {
        "preferred_element_type": jnp.float32,
        "precision": dot_precision(table.dtype),
    }

    def chunk_gradients(sums, chunk):
        (dtable, dbias), (hidden, rows) = sums, chunk
        logits = compute_logits(hidden, table, bias, config)
        gradient = rows.product_gradient(logits, ids, smoothed, config)
        if dbias is not None:
            dbias += jnp.sum(gradient, axis=0) / config.scale
        gradient = gradient.astype(hidden.dtype)
        to_hidden = "pv,vd->pd" if config.tied else "pv,dv->pd"
        dhidden = jnp.einsum(to_hidden, gradient, table, **exact).astype(hidden.dtype)
        to_table = "pv,pd->vd" if config.tied else "pv,pd->dv"
        return (dtable + jnp.einsum(to_table, gradient, hidden, **exact), dbias), dhidden

    count, size = chunk_sizes(len(hidden), len(ids))
    columns = RowGradients(*(split_rows(row[:, None], count, size) for row in rows))
    parts = [jnp.zeros(part.shape, jnp.float32) for part in (table, bias) if part is not None]
    zeros = match_varying_axes(*parts, hidden)[:-1]
    sums = zeros[0], None if bias is None else zeros[1]
    chunks = split_rows(hidden, count, size), columns
    (dtable, dbias), dhidden = jax.lax.scan(chunk_gradients, sums, chunks)
    if bias is not None and dbias is not None:
        dbias = dbias.astype(bias.dtype)
    dhidden = dhidden.reshape(-1, hidden.shape[1])[: len(hidden)]
    return dhidden, dtable.astype(table.dtype), dbias
