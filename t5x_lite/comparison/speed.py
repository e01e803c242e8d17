# SPDX-License-Identifier: Apache-2.0
"""How soon the first token comes and how fast the others, twins in turns on one machine."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_lite import config, decoding

ENDLESS = -1  # no token ends a text, so that every text has the length asked for


class Model(NamedTuple):
    """A twin ready to decode: its config and `decoding.prepare`d weights."""

    name: str
    cfg: config.Model
    params: Any


class Case(NamedTuple):
    """So many texts at once, of so many ids in and out."""

    rows: int
    inputs: int
    outputs: int


def cases(asked: config.Compare) -> Iterator[Case]:
    for rows in asked.rows:
        for inputs in asked.input_lengths:
            for outputs in asked.output_lengths:
                yield Case(rows, inputs, outputs)


def measure(models: Sequence[Model], case: Case, repeats: int) -> list[dict]:
    """For each model a row: milliseconds to the first token and to the last, tokens per second
    after the first, medians of turns with their quartiles; one turn before them is not counted.

    Tokens per second and their quartiles are None where the time between first and last token is
    lost in noise."""
    first = [timed(each, case, 1) for each in models]
    whole = [timed(each, case, case.outputs) for each in models]
    times: list[list[tuple[float, float]]] = [[] for _ in models]
    for turn in range(repeats + 1):
        for place in range(len(models)):
            pair = first[place](), whole[place]()
            if turn:
                times[place].append(pair)
    return [row(model, case, np.array(found)) for model, found in zip(models, times, strict=True)]


def timed(model: Model, case: Case, limit: int) -> Callable[[], float]:
    """Seconds to write `limit` tokens after the case's inputs; the executable is that of the whole
    length, so that the first token is timed as it comes."""
    draw = np.random.default_rng(0)
    texts = draw.integers(3, model.cfg.vocab, (case.rows, case.inputs)).tolist()
    decode = config.Decode(length=case.outputs)
    request = decoding.request(model.cfg, texts, decode, eos=ENDLESS)
    request = request._replace(limit=np.minimum(request.limit, limit))

    def run() -> float:
        began = time.perf_counter()
        decoding.generate(model.cfg, model.params, request, decode)
        return time.perf_counter() - began

    return run


def row(model: Model, case: Case, seconds: np.ndarray) -> dict:
    """Seconds [turns 2] to the first and last token, as a row of the report."""
    rate, range_of_rate = rates(case, seconds[:, 1] - seconds[:, 0])
    quartiles = lambda values: [float(np.percentile(values, q)) for q in (25, 75)]
    first, last = 1e3 * seconds[:, 0], 1e3 * seconds[:, 1]
    return {
        "twin": model.name,
        **case._asdict(),
        "first_token_ms": statistics.median(first.tolist()),
        "first_token_ms_quartiles": quartiles(first),
        "last_token_ms": statistics.median(last.tolist()),
        "tokens_per_second": rate,
        "tokens_per_second_quartiles": range_of_rate,
    }


def rates(case: Case, gaps: np.ndarray) -> tuple[float | None, list[float] | None]:
    """Tokens per second at the median of the gaps (seconds), and at their quartiles; or None.

    A gap is the difference of two times. Where the quartiles lie farther apart than the median from
    zero, the quotient would be any number.
    """
    tokens = case.rows * (case.outputs - 1)
    low, middle, high = np.percentile(gaps, [25, 50, 75])
    if low <= 0 or high - low > middle:
        return None, None
    return float(tokens / middle), [float(tokens / high), float(tokens / low)]
