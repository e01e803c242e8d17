# SPDX-License-Identifier: Apache-2.0
"""Attention, asked for by meaning; this file picks who computes it."""

from t5x_lite.kernels.reference import KEPT, attend

__all__ = ["KEPT", "attend"]
