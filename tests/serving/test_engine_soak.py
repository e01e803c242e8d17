# SPDX-License-Identifier: Apache-2.0
"""Many short requests to one engine."""

import dataclasses
import itertools
import os
import random
import time
from collections import deque
from pathlib import Path

import pytest
from test_engine import LIMITS, MIXED, PROMPTS, assert_alone, predictor_of

from t5x_lite.serving.completion import TextRequest
from t5x_lite.serving.engine import Engine


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.exhaustive  # 1.5 minutes: 20,000 texts, each compared
def test_many_short_requests_leave_nothing_behind():
    """No answer is lost or doubled, each is the one of its request, and memory does not grow."""
    layout, draw = "encoder_decoder", random.Random(0)
    predictor, count = predictor_of(layout), int(os.environ.get("T5X_LITE_SOAK", "20000"))
    decodes = [dataclasses.replace(decode, max_new_tokens=6) for decode in MIXED[:4]]
    engine = Engine(predictor, dataclasses.replace(LIMITS, rows=16, queue=64))
    requests = [TextRequest(*pair) for pair in itertools.product(PROMPTS[1:], decodes)]
    expected = [engine.submit(request).result() for request in requests]
    for request, chunk in zip(requests, expected, strict=True):
        assert_alone(chunk, layout, request)
    pending: deque = deque()
    memory = []
    for number in range(count):
        place = draw.randrange(len(requests))
        ends, ended = draw.random() < 0.1, []
        completion = engine.submit(requests[place], ended.append)
        if ends:
            completion.cancel()
        pending.append((place, ends, ended))
        while len(pending) > 48:
            check_ended(*pending.popleft(), expected)
        if number % (count // 10) == count // 10 - 1:
            memory.append(resident_bytes())
    engine.close()
    for each in pending:
        check_ended(*each, expected)
    assert sum(engine.gauges().finished.values()) == count + len(requests)
    assert memory[-1] - memory[3] < 16 * 2**20, memory


def check_ended(place: int, cancelled: bool, chunks: list, expected: list) -> None:
    """Waits for the last of the chunks, and compares the text.

    Args:
      place: number of the request.
      cancelled: the text may have ended early.
      chunks: its chunks, which another thread appends.
      expected: the text of each request.
    """
    while not chunks or chunks[-1].finish_reason is None:
        time.sleep(1e-4)
    assert sum(chunk.finish_reason is not None for chunk in chunks) == 1
    tokens = [token for chunk in chunks for token in chunk.tokens]
    if chunks[-1].finish_reason == "cancelled":
        assert cancelled and tokens == expected[place].tokens[: len(tokens)]
    else:
        assert tokens == expected[place].tokens
        assert "".join(chunk.text for chunk in chunks) == expected[place].text
