# SPDX-License-Identifier: Apache-2.0
"""Cross entropy from hidden states: the logits of all rows are never held.

Forward and backward compute them a chunk at a time; between the two only log(Z) of each row is
kept. Inside a shard_map these take local arrays, with or without its check of varying axes;
interpreted kernels need it off (JAX 0.10.2 cannot interpret a kernel of varying operands).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.kernels.backend import Backend
from t5x_lite.kernels.vocabulary import chunked, tpu, tpu_backward
from t5x_lite.kernels.vocabulary.logits import (
    CrossEntropyConfig,
    RowGradients,
    match_varying_axes,
    smooth_target,
    varies_over,
)


class TokenLosses(NamedTuple):
    """Losses of each token.

    Attributes:
      objective: what is minimized: cross entropy with label smoothing, less the entropy of the
        smoothed target, and z-loss.
      nll: negative log-likelihood of the target, in nats.
      correct: True where the target's logit is larger than all others.
    """

    objective: Float[Array, "b t"]
    nll: Float[Array, "b t"]
    correct: Bool[Array, "b t"]


def chunked_cross_entropy(
    hidden: Float[Array, "r d"],
    table: Float[Array, "..."],
    targets: Int[Array, " r"],
    config: CrossEntropyConfig,
    bias: Float[Array, " v"] | None = None,
) -> TokenLosses:
    """Returns the losses [r] of each row in plain XLA, as `losses.cross_entropy` has them of its
    logits.

    Logits are float32 throughout, also of bfloat16 operands. Only the objective has a gradient;
    those of the table and the bias are summed in float32.

    Args:
      hidden: [r d], hidden states.
      table: [v d] where config.tied, else [d v]; v is this device's part where it is split.
      targets: [r], ids.
      config: of logits and loss.
      bias: [v], added to the logits; None without one.
    """
    if bias is None:
        return row_losses(*match_varying_axes(hidden, table, targets), None, config, None)
    return row_losses(*match_varying_axes(hidden, table, targets, bias), config, None)


def fused_cross_entropy(
    hidden: Float[Array, "r d"],
    table: Float[Array, "..."],
    targets: Int[Array, " r"],
    config: CrossEntropyConfig,
    backend: Backend,
) -> TokenLosses:
    """Returns what `chunked_cross_entropy` does, by kernels that never write a logit.

    Args:
      hidden: [r d], hidden states.
      table: [v d] where config.tied, else [d v]; v is this device's part where it is split.
      targets: [r], ids.
      config: of logits and loss.
      backend: what runs the kernels.
    """
    return row_losses(*match_varying_axes(hidden, table, targets), None, config, backend)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def row_losses(
    hidden, table, targets, bias, config: CrossEntropyConfig, backend: Backend | None
) -> TokenLosses:
    """Returns the losses of each row.

    Args:
      hidden: [r d], hidden states.
      table: [v d] or [d v].
      targets: [r], ids.
      bias: [v], or None, which it is for kernels.
      config: of logits and loss.
      backend: what runs the kernels; None is plain XLA.
    """
    return row_losses_fwd(hidden, table, targets, bias, config, backend)[0]


def row_losses_fwd(
    hidden, table, targets, bias, config: CrossEntropyConfig, backend: Backend | None
):
    """Forward rule of `row_losses`.

    Args:
      hidden: [r d], hidden states.
      table: [v d] or [d v].
      targets: [r], ids.
      bias: [v], or None.
      config: of logits and loss.
      backend: what runs the kernels; None is plain XLA.
    """
    target, other, entropy = smooth_target(config.smoothing, config.global_size(table))
    targets = config.local_ids(targets, table)
    if backend is None:
        stats = chunked.chunked_stats(hidden, table, targets, bias, config)
    else:
        stats = tpu.fused_stats(hidden, table, targets, config, backend)
    stats = stats.all_reduce(config.axes)
    log_z = stats.log_z
    # Of the difference to the largest, not of log(Z): a loss near 0 keeps its digits.
    nll = jnp.log(stats.l) - (stats.target_logit - stats.m)
    objective = nll
    if other > 0:
        objective += (1 - target + other) * stats.target_logit - other * stats.logit_sum - entropy
    if config.z_loss > 0:
        objective += config.z_loss * jnp.square(log_z)
    losses = TokenLosses(objective, nll, stats.target_logit > stats.best_other)
    return losses, (hidden, table, targets, bias, log_z)


def row_losses_bwd(config: CrossEntropyConfig, backend: Backend | None, residuals, gradients):
    """Backward rule of `row_losses`.

    Args:
      config: of logits and loss.
      backend: what runs the kernels; None is plain XLA.
      residuals: what the forward rule kept.
      gradients: of the TokenLosses; only that of the objective counts.
    """
    hidden, table, targets, bias, log_z = residuals
    smoothed = smooth_target(config.smoothing, config.global_size(table))
    weight = gradients.objective
    if not varies_over(table, config.axes):
        # Unchecked, a shard_map hands every device its share of the gradient, not the whole.
        weight = jax.lax.psum(weight, config.axes)
    softmax_coefficient = weight * (1 + 2 * config.z_loss * log_z)
    rows = RowGradients(*match_varying_axes(targets, log_z, softmax_coefficient, weight))
    if backend is None:
        dhidden, dtable, dbias = chunked.chunked_gradients(
            hidden, table, bias, rows, smoothed, config
        )
        return dhidden, dtable, None, dbias
    backward = tpu_backward.BackwardConfig(config, smoothed, backend)
    dhidden = tpu_backward.hidden_gradient(hidden, table, rows, backward)
    return dhidden, tpu_backward.table_gradient(hidden, table, rows, backward), None, None


row_losses.defvjp(row_losses_fwd, row_losses_bwd)
