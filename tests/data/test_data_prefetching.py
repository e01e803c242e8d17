# SPDX-License-Identifier: Apache-2.0
"""Laws of batches made ahead."""

import time

import pytest

from t5x_lite import data


class Counting:
    """Batches that are their own step; those from `broken` on cannot be read."""

    def __init__(self, broken: int = 10**9):
        self.broken, self.made = broken, []

    def at(self, step: int) -> int:
        if step >= self.broken:
            raise ValueError(f"step {step} cannot be read")
        self.made.append(step)
        return step


def test_steps_come_in_order_and_the_wait_is_measured():
    ahead = data.prefetch(Counting(), 3, 9)
    assert list(ahead) == [(step, step) for step in range(3, 9)]
    assert ahead.waited >= 0
    assert not ahead.thread.is_alive()


def test_no_more_than_a_few_batches_are_made_ahead():
    batches = Counting()
    ahead = data.prefetch(batches, 0, 100)
    assert next(ahead) == (0, 0)
    time.sleep(0.3)
    assert len(batches.made) <= 8
    ahead.close()


def test_an_error_is_raised_where_the_batch_is_read():
    ahead = data.prefetch(Counting(broken=2), 0, 5)
    assert [next(ahead), next(ahead)] == [(0, 0), (1, 1)]
    with pytest.raises(ValueError, match="step 2 cannot be read"):
        next(ahead)


def test_closing_early_leaves_no_thread():
    ahead = data.prefetch(Counting(), 0, 10**9)
    next(ahead)
    ahead.close()
    assert not ahead.thread.is_alive()
    with pytest.raises(StopIteration):
        next(ahead)
