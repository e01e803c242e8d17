# SPDX-License-Identifier: Apache-2.0
"""What attention is paid to."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float

from t5x_lite.kernels.block_sight import BlockSight
from t5x_lite.kernels.pairs import Pairs
from t5x_lite.kernels.relative import Relative
from t5x_lite.kernels.sight import Sight


class Source(NamedTuple):
    """Keys and values, which of them a query sees, and the bias of their distances.

    sight is a Sight for whole rows, a BlockSight for blocks over a cache, Bool [b s] for keys that
    every query of a row sees, and Pairs for plain XLA, which also wants the bias as an array.
    """

    keys: Float[Array, "b k s h"]
    values: Float[Array, "b k s h"]
    sight: Sight | BlockSight | Pairs | Bool[Array, "b s"]
    relative: Relative | Float[Array, "#b n t s"] | None = None
