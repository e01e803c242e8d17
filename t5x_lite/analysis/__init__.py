# SPDX-License-Identifier: Apache-2.0
"""A look inside: attention, lenses, alternatives, drafts, positions; drawn for notebook and
terminal."""

from t5x_lite.analysis.explanation import Explanation, explain, position_bias
from t5x_lite.analysis.maps import Attention, Map, Positions
from t5x_lite.analysis.views import Alternatives, Blocks, DecoderLens, Lens

__all__ = [
    "Alternatives",
    "Attention",
    "Blocks",
    "DecoderLens",
    "Explanation",
    "Lens",
    "Map",
    "Positions",
    "explain",
    "position_bias",
]
