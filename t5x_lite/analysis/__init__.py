# SPDX-License-Identifier: Apache-2.0
"""Analysis of a text: attention, lenses, alternatives, drafts and position biases, rendered for
notebooks and terminals."""

from t5x_lite.analysis.explanation import Explanation, explain, position_bias
from t5x_lite.analysis.maps import AttentionMaps, Map, Positions
from t5x_lite.analysis.views import Alternatives, Blocks, DecoderLens, Lens

__all__ = [
    "Alternatives",
    "AttentionMaps",
    "Blocks",
    "DecoderLens",
    "Explanation",
    "Lens",
    "Map",
    "Positions",
    "explain",
    "position_bias",
]
