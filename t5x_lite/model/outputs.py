# SPDX-License-Identifier: Apache-2.0
"""From hidden states to logits, and the settings of the loss that computes them itself."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_lite import config
from t5x_lite.kernels import api as kernels
from t5x_lite.model.layers import project_to_vocabulary
from t5x_lite.model.quantization import Quantized


def token_logits(
    cfg: config.Model,
    hidden: Float[Array, "b t d"],
    table: jax.Array | Quantized,
    tied: bool,
    bias: Float[Array, " v"] | None,
) -> Float[Array, "b t v"]:
    """Float32 logits of hidden states.

    Args:
      cfg: architecture.
      hidden: [b t d] hidden states.
      table: [v d] embedding if tied, else [d v] head.
      tied: which one it is.
      bias: [v] added to the logits; None without one.
    """
    if cfg.scale_logits:
        hidden = hidden * hidden.shape[-1] ** -0.5
    logits = project_to_vocabulary(hidden, table, tied).astype(jnp.float32)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    cap = cfg.logits_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def cross_entropy_config(
    cfg: config.Model, smoothing: float, z_loss: float
) -> kernels.CrossEntropyConfig:
    """Settings of the loss of hidden states, whose logits are those of `token_logits`.

    Args:
      cfg: architecture.
      smoothing: label smoothing.
      z_loss: coefficient of the squared log normalizer.
    """
    scale = cfg.last_stack.embed**-0.5 if cfg.scale_logits else 1.0
    return kernels.CrossEntropyConfig(cfg.tied, smoothing, z_loss, cfg.logits_softcap, scale)
