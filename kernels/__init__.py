# SPDX-License-Identifier: Apache-2.0
"""Attention, asked for by meaning; `chosen` says who computes it."""

from t5x_lite.kernels.block_sight import BlockSight
from t5x_lite.kernels.dispatch import (
    attend,
    chosen,
    cross_entropy,
    laid,
    prepared,
    probabilities,
)
from t5x_lite.kernels.pairs import Pairs
from t5x_lite.kernels.reference import KEPT
from t5x_lite.kernels.relative import Relative
from t5x_lite.kernels.sight import Sight
from t5x_lite.kernels.source import Source
from t5x_lite.kernels.tiles import How, device
from t5x_lite.kernels.token_losses import TokenLosses
from t5x_lite.kernels.vocabulary import VocabularyRule

__all__ = [
    "KEPT",
    "BlockSight",
    "How",
    "Pairs",
    "Relative",
    "Sight",
    "Source",
    "TokenLosses",
    "VocabularyRule",
    "attend",
    "chosen",
    "cross_entropy",
    "device",
    "laid",
    "prepared",
    "probabilities",
]
