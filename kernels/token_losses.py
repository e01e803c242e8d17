# SPDX-License-Identifier: Apache-2.0
"""What a loss says of each token, and the smoothed target that it compares with."""

import math
from typing import NamedTuple

from jaxtyping import Array, Bool, Float


class TokenLosses(NamedTuple):
    """What is minimised, the negative log-likelihood in nats, and whether the target came first."""

    objective: Float[Array, "b t"]
    nll: Float[Array, "b t"]
    correct: Bool[Array, "b t"]


def smoothed(smoothing: float, vocab: int) -> tuple[float, float, float]:
    """Probability of the target, of every other id, and the entropy of that distribution."""
    target, other = 1.0 - smoothing, smoothing / (vocab - 1)
    entropy = -target * math.log(target)
    if other > 0:
        entropy -= (vocab - 1) * other * math.log(other)
    return target, other, entropy
