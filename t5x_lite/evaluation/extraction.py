# SPDX-License-Identifier: Apache-2.0
"""Exact extraction: the span of a text that is the most probable output of a model."""

from typing import Any, NamedTuple

import numpy as np

from t5x_lite import decoding
from t5x_lite.utils.not_none import not_none


class Span(NamedTuple):
    """A part of a text as an output of the model.

    Attributes:
      text: the part.
      tokens: its ids.
      start: number of its first token in the text.
      log_probability: of the part and the end after it, in nats.
    """

    text: str
    tokens: list[int]
    start: int
    log_probability: float


def score_spans(predictor: Any, input: str, text: str, longest: int) -> list[Span]:
    """All spans of a text with their probability as the whole output, the most probable one first.

    Exact extraction: from each token on one teacher-forced pass scores the spans of every length. A
    span is a run of the text's own tokens. Probabilities of different spans add up to at most 1.

    Args:
      predictor: `predict.Predictor`, the model.
      input: input of the model.
      text: the text, in which the answer is.
      longest: most tokens of a span.

    Raises:
      ValueError: the text is empty, or no span may have a token.
    """
    ids = predictor.targets.encode(text)
    if not len(ids) or longest < 1:
        raise ValueError(f"There are no spans of up to {longest} tokens in {text!r:.60}")
    (source,) = predictor.encode_inputs([input])
    stops = predictor.targets.stops
    # One token more than the longest span, in whose place the end is scored.
    rows = [[*ids[i : i + longest], stops[0]] for i in range(len(ids))]
    spans = []
    for first in range(0, len(rows), predictor.batch_size):
        batch = rows[first : first + predictor.batch_size]
        filled = batch + batch[-1:] * (predictor.padded_rows(len(batch)) - len(batch))
        sources = [source] * len(filled)
        scores = decoding.score(predictor.cfg, predictor.params, sources, filled, stops)
        sums = np.cumsum(scores.tokens, axis=1, dtype=np.float64)
        totals = sums[:, :-1] + not_none(scores.ends)[:, 1:]
        for row, each in enumerate(batch):
            spans += [
                Span("", each[:size], first + row, float(totals[row, size - 1]))
                for size in range(1, len(each))
            ]
    spans.sort(key=lambda span: -span.log_probability)
    return [span._replace(text=predictor.targets.decode(span.tokens)) for span in spans]
