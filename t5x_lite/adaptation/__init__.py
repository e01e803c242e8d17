# SPDX-License-Identifier: Apache-2.0
"""From a pretrained model to another arrangement of it: the map of the weights, and a teacher."""

from t5x_lite.adaptation.beginning import MissingSource, explain, initialize
from t5x_lite.adaptation.report import Report

__all__ = ["MissingSource", "Report", "explain", "initialize"]
