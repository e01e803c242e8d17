# SPDX-License-Identifier: Apache-2.0
"""Cross entropy from hidden states: the logits of all rows are never held.

Forward and backward make them a piece at a time; between the two only log(Z) of each row is kept.
Inside a shard_map these take local arrays, with or without its check of varying axes; interpreted
kernels need it off (JAX 0.10.2 cannot interpret a kernel of varying operands).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite.kernels import cross_entropy_chunks, cross_entropy_tiles, tiles, vocabulary
from t5x_lite.kernels.token_losses import TokenLosses, smoothed
from t5x_lite.kernels.vocabulary import Rows, VocabularyRule


def chunked_cross_entropy(
    hidden: Float[Array, "r d"],
    table: Float[Array, "..."],
    targets: Int[Array, " r"],
    rule: VocabularyRule,
) -> TokenLosses:
    """The losses [r] of each row, as `losses.cross_entropy` has them of its logits; plain XLA.

    table is [v d] or [d v], as rule says, v being this device's part where the vocabulary is
    split. Logits are float32 throughout, also of bfloat16 operands. Only the objective has a
    gradient; that of the table is summed in float32.
    """
    return of_rows(*vocabulary.alike(hidden, table, targets), rule, None)


def fused_cross_entropy(
    hidden: Float[Array, "r d"],
    table: Float[Array, "..."],
    targets: Int[Array, " r"],
    rule: VocabularyRule,
    how: tiles.How,
) -> TokenLosses:
    """What `chunked_cross_entropy` gives, by kernels that never write a logit."""
    return of_rows(*vocabulary.alike(hidden, table, targets), rule, how)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def of_rows(hidden, table, targets, rule: VocabularyRule, how: tiles.How | None) -> TokenLosses:
    return forward(hidden, table, targets, rule, how)[0]


def forward(hidden, table, targets, rule: VocabularyRule, how):
    target, other, entropy = smoothed(rule.smoothing, rule.size(table))
    targets = rule.within(targets, table)
    if how is None:
        part = cross_entropy_chunks.forward(hidden, table, targets, rule)
    else:
        part = cross_entropy_tiles.forward(hidden, table, targets, rule, how)
    part = part.merged(rule.axes)
    log_z = part.log_z
    # Of the difference to the peak, not of log(Z): a loss near 0 keeps its digits.
    nll = jnp.log(part.total) - (part.chosen - part.peak)
    objective = nll
    if other > 0:
        objective += (1 - target + other) * part.chosen - other * part.sum - entropy
    if rule.z_loss > 0:
        objective += rule.z_loss * jnp.square(log_z)
    told = TokenLosses(objective, nll, part.chosen >= part.peak)
    return told, (hidden, table, targets, log_z)


def backward(rule: VocabularyRule, how, kept, gradient):
    hidden, table, targets, log_z = kept
    shares = smoothed(rule.smoothing, rule.size(table))[:2]
    weight = gradient.objective
    if not vocabulary.varies(table, rule.axes):
        # Unchecked, a shard_map hands every device its share of the gradient, not the whole.
        weight = jax.lax.psum(weight, rule.axes)
    heat = weight * (1 + 2 * rule.z_loss * log_z)
    rows = Rows(*vocabulary.alike(targets, log_z, heat, weight))
    if how is None:
        return *cross_entropy_chunks.backward(hidden, table, rows, shares, rule), None
    asked = cross_entropy_tiles.Asked(rule, shares, how)
    of_hidden = cross_entropy_tiles.of_hidden(hidden, table, rows, asked)
    return of_hidden, cross_entropy_tiles.of_table(hidden, table, rows, asked), None


of_rows.defvjp(forward, backward)
