# SPDX-License-Identifier: Apache-2.0
"""Cross entropy in plain XLA, a chunk of rows at a time: what CPU and GPU run."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite.kernels import vocabulary
from t5x_lite.kernels.vocabulary import Part, Rows, VocabularyRule

# Logits of one chunk: 64 MB of float32, as long as that is 128 rows or more. Below, the products
# would read the table more often than they use it.
LOGITS = 1 << 24
LEAST_ROWS = 128


def chunks(rows: int, vocab: int) -> tuple[int, int]:
    """How many chunks, and rows of each (the last is padded)."""
    most = max(LOGITS // vocab, LEAST_ROWS)
    count = -(-rows // most)
    return count, -(-rows // count)


def cut(x: Float[Array, "r ..."], count: int, rows: int) -> Float[Array, "c p ..."]:
    """x in count chunks of rows, padded with zeros."""
    missing = count * rows - x.shape[0]
    padded = jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))) if missing else x
    return padded.reshape(count, rows, *x.shape[1:])


def logits_of(hidden, table, rule: VocabularyRule) -> Float[Array, "p v"]:
    products = jnp.einsum(
        "pd,vd->pv" if rule.tied else "pd,dv->pv",
        hidden,
        table,
        preferred_element_type=jnp.float32,
        precision=vocabulary.precision(table),
    )
    return rule.capped(products)


def forward(
    hidden: Float[Array, "r d"],
    table: Float[Array, "..."],
    targets: Int[Array, " r"],
    rule: VocabularyRule,
) -> Part:
    """What this device's part of the vocabulary tells of each row; targets count within it."""
    ids = jnp.arange(rule.local(table))

    def one(chunk) -> Part:
        hidden, targets = chunk
        logits = logits_of(hidden, table, rule)
        peak = jnp.max(logits, axis=-1)
        total = jnp.sum(jnp.exp(logits - peak[:, None]), axis=-1)
        chosen = jnp.sum(jnp.where(ids == targets[:, None], logits, 0), axis=-1)
        return Part(peak, total, chosen, jnp.sum(logits, axis=-1))

    count, rows = chunks(len(targets), len(ids))
    part = jax.lax.map(one, (cut(hidden, count, rows), cut(targets, count, rows)))
    return Part(*(field.reshape(-1)[: len(targets)] for field in part))


def backward(
    hidden: Float[Array, "r d"],
    table: Float[Array, "..."],
    rows: Rows,
    shares: tuple[float, float],
    rule: VocabularyRule,
) -> tuple[Float[Array, "r d"], Float[Array, "..."]]:
    """Gradients to hidden (this device's part of them) and to the table."""
    ids = jnp.arange(rule.local(table))
    exact = {"preferred_element_type": jnp.float32, "precision": vocabulary.precision(table)}

    def one(of_table: Float[Array, "..."], chunk):
        hidden, rows = chunk
        logits = logits_of(hidden, table, rule)
        slope = rows.slope(logits, ids, shares, rule).astype(hidden.dtype)
        letters = "pv,vd->pd" if rule.tied else "pv,dv->pd"
        of_hidden = jnp.einsum(letters, slope, table, **exact).astype(hidden.dtype)
        letters = "pv,pd->vd" if rule.tied else "pv,pd->dv"
        return of_table + jnp.einsum(letters, slope, hidden, **exact), of_hidden

    count, size = chunks(len(hidden), len(ids))
    columns = Rows(*(cut(row[:, None], count, size) for row in rows))
    nothing, _ = vocabulary.alike(jnp.zeros(table.shape, jnp.float32), hidden)
    of_table, of_hidden = jax.lax.scan(one, nothing, (cut(hidden, count, size), columns))
    return of_hidden.reshape(-1, hidden.shape[1])[: len(hidden)], of_table.astype(table.dtype)
