# SPDX-License-Identifier: Apache-2.0
"""How long examples and rows may be."""

from t5x_lite.windows import Lengths as Lengths
from t5x_lite.windows import lengths_of as of

__all__ = ["Lengths", "of"]
