# SPDX-License-Identifier: Apache-2.0
"""Config of decoding."""

from dataclasses import dataclass
from typing import Annotated

from t5x_lite.config.checked import (
    Checked,
    Count,
    CountOrZero,
    Range,
    Seed,
    ShareAboveZero,
    require,
)
from t5x_lite.utils import paths


@dataclass(frozen=True)
class Decode(Checked):
    """Decoding of text: greedily (temperature 0), by sampling, or by beam search (beams > 1).

    Attributes:
      max_new_tokens: most new tokens of a row.
      temperature: 0 is greedy; 1 samples from the model's distribution.
      top_k: samples among the k most probable tokens; 0 among all.
      top_p: samples among the fewest tokens whose probabilities sum to p; 1 among all.
      seed: the same seed gives the same text for a row.
      beams: beams of the search; 1 is none.
      alpha: length penalty: beams are ranked by log-probability / ((5 + length) / 6) ** alpha (Wu
        et al., 2016, eq. 14).
      n_best: beams returned, best first.
      drafter: what drafts tokens ahead, which changes the speed and not the text: auto, plain,
        lookup, early:4, draft:PATH, lookup+recycling, ... (`infer --help` lists them).
      draft_length: tokens of a block, its first included, 2 to 64; 0 takes the fastest by
        measurement.
      accept: rule by which draft tokens are kept; some rules change the text, and say so.
    """

    max_new_tokens: Count = 64
    temperature: Annotated[float, Range(1e-6, also=(0.0,))] = 0.0
    top_k: CountOrZero = 0
    top_p: ShareAboveZero = 1.0
    seed: Seed = 0
    beams: Count = 1
    alpha: Annotated[float, Range(-10, 10)] = 0.6
    n_best: Count = 1
    drafter: str = "auto"
    draft_length: Annotated[int, Range(2, 64, also=(0,))] = 0
    accept: str = "exact"

    def check(self):
        try:
            for part in self.drafter.split("+"):  # draft:PATH, recycling:PATH
                paths.check_local(part.partition(":")[2])
        except ValueError as error:
            raise ValueError(f"Decode.drafter: {error}") from None
        require(
            self.n_best <= self.beams,
            f"Decode.n_best must be in 1..Decode.beams ({self.beams}); got {self.n_best}",
        )
        require(
            self.beams == 1 or self.temperature == 0,
            "Decode.beams searches for the most probable text: it cannot also sample "
            "(temperature > 0)",
        )
        require(
            self.beams == 1 or self.drafter in ("auto", "plain"),
            f"Decode.drafter {self.drafter} drafts for one text per row; beam search (beams > 1) "
            "takes plain or auto",
        )
