# SPDX-License-Identifier: Apache-2.0
"""Attention of whole rows by cuDNN on GPUs, and which attention "auto" chooses there."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from t5x_lite.kernels.backend import HOPPER, target_device
from t5x_lite.kernels.reference import CHECKPOINT_NAME, zero_fully_masked

# Implementation of "auto" on a GPU for attention of whole rows, without and with a relative
# position bias. Not measured: cuDNN makes no array of scores, but takes a bias, and gives its
# gradient, as an array of all pairs. `benchmarks/device.py` measures what belongs here.
GPU_IMPLEMENTATIONS: dict[bool, Literal["cudnn", "xla"]] = {False: "cudnn", True: "xla"}
# Largest head of cuDNN's attention; twice as large from Hopper on.
LARGEST_HEAD = 128
HOPPER_AND_LATER = (*HOPPER, "B100", "B200", "GB200", "B300", "GB300")

SAVED_NAMES = jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME)


def save_attention(primitive, *operands: Any, **params: Any) -> bool:
    """Policy of rematerialization: saves what the backward pass of attention needs.

    Args:
      primitive: jax's; those of cuDNN give what theirs needs, which has no name.
      *operands: types of its operands.
      **params: its parameters.
    """
    is_cudnn = primitive.name.startswith("dot_product_attention_fwd")
    return is_cudnn or bool(SAVED_NAMES(primitive, *operands, **params))


def use_cudnn(
    q: Float[Array, "b t k g h"],
    keys: Float[Array, "b k s h"],
    biased: bool,
    softcap: float | None,
) -> bool:
    """Returns True where "auto" has cuDNN compute the attention of whole rows on a GPU.

    Args:
      q: queries.
      keys: keys.
      biased: there is a relative position bias.
      softcap: cap of the scores, which cuDNN does not have; None without one.
    """
    kind = target_device().kind
    largest = LARGEST_HEAD * (2 if any(name in kind for name in HOPPER_AND_LATER) else 1)
    t, s, h = q.shape[1], keys.shape[2], q.shape[4]
    # A mask is a bias to cuDNN, which wants even lengths for its gradient.
    fits = h <= largest and h % 8 == 0 and t % 2 == 0 and s % 2 == 0
    floats = all(x.dtype in (jnp.bfloat16, jnp.float16) for x in (q, keys))
    chosen = GPU_IMPLEMENTATIONS[biased] == "cudnn"
    return chosen and softcap is None and fits and floats


def cudnn_attention(
    q: Float[Array, "b t k g h"],
    keys: Float[Array, "b k s h"],
    values: Float[Array, "b k s h"],
    mask: Bool[Array, " b #t s"],
    causal: bool,
) -> Float[Array, "b t k g h"]:
    """Softmax attention of one device by cuDNN; a fully masked query gets 0.

    Args:
      q: [b t k g h], queries, already scaled.
      keys: [b k s h].
      values: [b k s h].
      mask: [b t s] or [b 1 s], True where a query attends to a key.
      causal: no query attends to a later key of its row, so that blocks of these are left out.
    """
    b, t, k, g, h = q.shape
    context = jax.nn.dot_product_attention(
        q.reshape(b, t, k * g, h),
        jnp.swapaxes(keys, 1, 2),
        jnp.swapaxes(values, 1, 2),
        mask=jnp.broadcast_to(mask, (b, t, keys.shape[2]))[:, None],
        scale=1.0,
        is_causal=causal,
        implementation="cudnn",
    )
    return zero_fully_masked(mask, context.reshape(q.shape))
