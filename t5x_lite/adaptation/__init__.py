# SPDX-License-Identifier: Apache-2.0
"""Adaptation of pretrained models to another arrangement of towers, and distillation."""

from t5x_lite.adaptation.initial_weights import MissingSource, explain, initialize
from t5x_lite.adaptation.report import Report

__all__ = ["MissingSource", "Report", "explain", "initialize"]
