# SPDX-License-Identifier: Apache-2.0
"""Ranking of texts by probability and length, and the rules by which a beam search ends.

b rows    k beams    T slots of a row
"""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from t5x_lite import config

# When a search ends, as config.Decode.early_stopping has it.
EarlyStopping = bool | Literal["never"] | None


class LengthPenalty(NamedTuple):
    """Divisor of log-probabilities, ((offset + length) / (offset + 1)) ** exponent.

    Attributes:
      exponent: 0 is no penalty; above it longer texts gain.
      offset: 5 is the penalty of Wu et al., 2016, eq. 14; 0 divides by length ** exponent, as
        transformers does.
    """

    exponent: Any
    offset: Any = 5.0

    def divisor(self, lengths: Int[Array, "..."]) -> Float[Array, "..."]:
        """The divisor for texts of so many tokens."""
        return ((self.offset + lengths) / (self.offset + 1.0)) ** self.exponent


def make_length_penalty(decode: config.Decode) -> LengthPenalty:
    """The penalty of a config, as float32."""
    if decode.length_penalty is None:
        return LengthPenalty(np.float32(decode.alpha), np.float32(5))
    return LengthPenalty(np.float32(decode.length_penalty), np.float32(0))


class BeamHypotheses(NamedTuple):
    """k texts per row.

    Attributes:
      tokens: prompt and new tokens by slot.
      lengths: number of new tokens.
      log_probability: sum over the new tokens.
      score: log_probability over the length penalty; minus infinity where there is no text.
    """

    tokens: Int[Array, "b k T"]
    lengths: Int[Array, "b k"]
    log_probability: Float[Array, "b k"]
    score: Float[Array, "b k"]


class EndingRule(NamedTuple):
    """Rule by which a search ends before the limit.

    Attributes:
      early_stopping: as in config.Decode.
      penalty: length penalty.
    """

    early_stopping: EarlyStopping
    penalty: LengthPenalty

    def has_ended(
        self, finished: BeamHypotheses, live: BeamHypotheses, most: Int[Array, " b"]
    ) -> Bool[Array, " b"]:
        """Rows whose finished texts stay as they are.

        Args:
          finished: the best texts that have ended, best first.
          live: texts that are continued.
          most: most new tokens of each row.
        """
        worst = finished.score[:, -1]
        complete = jnp.isfinite(worst)
        if self.early_stopping is None or self.early_stopping is True:
            return complete
        lengths = live.lengths[:, 0]
        if self.early_stopping == "never":
            lengths = jnp.where(self.penalty.exponent > 0, most, lengths)
        best = jnp.max(live.log_probability, axis=1) / self.penalty.divisor(lengths)
        return complete & ~(best > worst)
