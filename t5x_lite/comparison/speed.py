# SPDX-License-Identifier: Apache-2.0
"""Time to the first token and tokens per second afterwards, twins in turns on one machine."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_lite import config, decoding

ENDLESS = -1  # eos that no token equals, so that every text has the requested length


class TwinModel(NamedTuple):
    """A twin ready to decode.

    Attributes:
      name: name of the twin.
      cfg: its config.
      params: its weights from `decoding.prepare_params`.
    """

    name: str
    cfg: config.Model
    params: Any


class SpeedCase(NamedTuple):
    """Sizes of a timed batch.

    Attributes:
      rows: number of texts at once.
      inputs: number of ids read per text.
      outputs: number of ids written per text.
    """

    rows: int
    inputs: int
    outputs: int


def speed_cases(compare: config.Compare) -> Iterator[SpeedCase]:
    """All combinations of the sizes of a comparison."""
    for rows in compare.rows:
        for inputs in compare.input_lengths:
            for outputs in compare.output_lengths:
                yield SpeedCase(rows, inputs, outputs)


def time_twins(models: Sequence[TwinModel], case: SpeedCase, repeats: int) -> list[dict]:
    """Times all models in turns; a warm-up turn before them is not counted.

    Args:
      models: the twins.
      case: sizes of the batch.
      repeats: number of turns.

    Returns:
      A row per model: seconds to the first and last token of each turn; milliseconds to the first
      and to the last token, and tokens per second after the first, medians with their quartiles.
      Tokens per second are None where the time between first and last token is lost in noise.
    """
    first = [make_timer(each, case, 1) for each in models]
    whole = [make_timer(each, case, case.outputs) for each in models]
    times: list[list[tuple[float, float]]] = [[] for _ in models]
    for turn in range(repeats + 1):
        for place in range(len(models)):
            pair = first[place](), whole[place]()
            if turn:
                times[place].append(pair)
    return [
        speed_row(model, case, np.array(seconds))
        for model, seconds in zip(models, times, strict=True)
    ]


def make_timer(model: TwinModel, case: SpeedCase, limit: int) -> Callable[[], float]:
    """Makes a function that decodes a random batch and returns its seconds.

    The executable is that of all outputs, so that the first token is timed as in a full answer.

    Args:
      model: the twin.
      case: sizes of the batch.
      limit: number of tokens to write.
    """
    draw = np.random.default_rng(0)
    texts = draw.integers(3, model.cfg.vocab, (case.rows, case.inputs)).tolist()
    decode = config.Decode(max_new_tokens=case.outputs)
    request = decoding.make_request(model.cfg, texts, decode, eos=ENDLESS)
    request = request._replace(limit=np.minimum(request.limit, limit))

    def run() -> float:
        began = time.perf_counter()
        decoding.generate(model.cfg, model.params, request, decode)
        return time.perf_counter() - began

    return run


def speed_row(model: TwinModel, case: SpeedCase, seconds: np.ndarray) -> dict:
    """Summarizes times as a row of the report.

    Args:
      model: the twin.
      case: sizes of the batch.
      seconds: [turns 2] to the first and to the last token.
    """
    rate, range_of_rate = token_rates(case, seconds[:, 1] - seconds[:, 0])
    first, last = 1e3 * seconds[:, 0], 1e3 * seconds[:, 1]
    return {
        "twin": model.name,
        **case._asdict(),
        "seconds": seconds.tolist(),
        "first_token_ms": statistics.median(first.tolist()),
        "first_token_ms_quartiles": quartiles(first),
        "last_token_ms": statistics.median(last.tolist()),
        "tokens_per_second": rate,
        "tokens_per_second_quartiles": range_of_rate,
    }


def quartiles(values: np.ndarray) -> list[float]:
    """The lower and the upper quartile."""
    return [float(np.percentile(values, q)) for q in (25, 75)]


def token_rates(case: SpeedCase, gaps: np.ndarray) -> tuple[float | None, list[float] | None]:
    """Tokens per second at the median of the gaps (seconds), and at their quartiles; or None.

    A gap is the difference of two times. If the quartiles are farther apart than the median is from
    zero, the quotient is meaningless.
    """
    tokens = case.rows * (case.outputs - 1)
    low, middle, high = np.percentile(gaps, [25, 50, 75])
    if low <= 0 or high - low > middle:
        return None, None
    return float(tokens / middle), [float(tokens / high), float(tokens / low)]
