# SPDX-License-Identifier: Apache-2.0
"""Public names of the kernels: attention and cross entropy, and the types that describe them."""

from t5x_lite.kernels.backend import Backend, has_kernels, target_device
from t5x_lite.kernels.block_diffusion import BlockDiffusionMask
from t5x_lite.kernels.cudnn import save_attention
from t5x_lite.kernels.decode.mask import CacheMask
from t5x_lite.kernels.dense_mask import AttentionSource, DenseMask
from t5x_lite.kernels.dispatch import (
    attention_probs,
    cross_entropy,
    dot_product_attention,
    prepare_bias,
    prepare_mask,
    select_backend,
)
from t5x_lite.kernels.mask import Mask
from t5x_lite.kernels.relative import (
    LinearPositionBias,
    PositionBias,
    RelativePositionBias,
    alibi_slopes,
)
from t5x_lite.kernels.vocabulary.cross_entropy import TokenLosses
from t5x_lite.kernels.vocabulary.logits import CrossEntropyConfig

__all__ = [
    "AttentionSource",
    "Backend",
    "BlockDiffusionMask",
    "CacheMask",
    "CrossEntropyConfig",
    "DenseMask",
    "LinearPositionBias",
    "Mask",
    "PositionBias",
    "RelativePositionBias",
    "TokenLosses",
    "alibi_slopes",
    "attention_probs",
    "cross_entropy",
    "dot_product_attention",
    "has_kernels",
    "prepare_bias",
    "prepare_mask",
    "save_attention",
    "select_backend",
    "target_device",
]
