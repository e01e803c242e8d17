# SPDX-License-Identifier: Apache-2.0
"""What guessing ahead did while a command wrote: the comparison with plain texts, and a picture."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5x_lite import config
from t5x_lite.evaluation.predict import Prediction

# As many texts are drawn, and as many differences told one by one.
DRAWN, TOLD = 20, 5


class Watch:
    """Hears of every prediction; `close` tells. Says so at once where the picture has no format."""

    def __init__(self, verify: bool, draw: str | None):
        if draw not in (None, "-") and Path(draw).suffix not in (".html", ".png"):
            raise ValueError(f"--draw={draw}: it must end in .html or .png, or be -")
        self.verify, self.path = verify, draw
        self.pictures: list[Any] = []
        self.compared = self.different = 0

    def __call__(
        self,
        predictor: Any,
        texts: Sequence[str],
        rows: Sequence[int],
        decode: config.Decode,
        found: Sequence[Prediction],
    ) -> None:
        from t5x_lite.evaluation import blocks

        room = DRAWN - len(self.pictures) if self.path else 0
        for text, prediction in list(zip(texts, found, strict=True))[:room]:
            self.pictures.append(blocks.drawn(text, prediction, predictor.targets))
        if self.verify:
            self.compare(predictor, texts, rows, decode, found)

    def compare(self, predictor, texts, rows, decode, found) -> None:
        from t5x_lite.evaluation import drafting

        ids = predictor.read(texts)
        for row, each in zip(
            rows, drafting.differences(predictor, ids, decode, rows, found), strict=True
        ):
            self.compared += 1
            self.different += each is not None
            if each is not None and self.different <= TOLD:
                gap = "one text ends there" if math.isnan(each.gap) else f"{each.gap:.2g} nats"
                print(
                    f"text {row + 1} differs from plain decoding at token {each.place + 1}: id "
                    f"{each.drafted} for {each.plain} (plain's is more probable by: {gap})",
                    file=sys.stderr,
                )

    def close(self, predictor: Any) -> None:
        """Tells tokens per call and how the comparison went, and draws."""
        if predictor.tally.calls:
            print(predictor.tally, file=sys.stderr)
        if self.verify:
            same = self.compared - self.different
            print(f"identical to plain decoding: {same:,} of {self.compared:,}", file=sys.stderr)
        if self.path and self.pictures:
            self.draw()

    def draw(self) -> None:
        from t5x_lite.evaluation import blocks

        if self.path == "-":
            print(blocks.terminal(self.pictures), file=sys.stderr)
        else:
            blocks.draw(self.path, self.pictures)
            print(f"drawn: {self.path}", file=sys.stderr)
