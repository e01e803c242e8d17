# SPDX-License-Identifier: Apache-2.0
"""The text of which inputs and targets are parts, from what an objective's name promises alone."""

import numpy as np

from t5x_lite import config


def rows(ragged) -> list[list[int]]:
    """Ragged token ids as lists."""
    return [each.tolist() for each in np.split(ragged.tokens, np.cumsum(ragged.lengths)[:-1])]


def runs(ids: list[int], sentinels: list[int]) -> dict[int, list[int]]:
    """Tokens after each sentinel, by sentinel."""
    parts: dict[int, list[int]] = {}
    for token in ids:
        if token in sentinels:
            parts[token] = run = []
        else:
            run.append(token)
    return parts


def restored(cutter, inputs: list[int], targets: list[int]) -> list[int]:
    """Reconstructs the window from inputs and targets, by the definition of the objective alone.

    Args:
      cutter: the objective with its lengths and marks.
      inputs: ids of the inputs.
      targets: ids of the targets.
    """
    mode = cutter.mode.tolist()
    assert inputs[: len(mode)] == mode
    inputs, eos = inputs[len(mode) :], cutter.eos
    match cutter.objective:
        case config.PrefixLM():
            return inputs + targets
        case config.FillInTheMiddle(order):
            assert targets.pop() == eos
            prefix, suffix, middle = cutter.marks.tolist()
            assert inputs.pop() == middle
            parts = runs(inputs, [prefix, suffix])
            assert list(parts) == ([prefix, suffix] if order == "psm" else [suffix, prefix])
            return parts[prefix] + targets + parts[suffix]
    assert inputs.pop() == targets.pop() == eos
    sentinels = cutter.sentinels.tolist()
    hidden = runs(targets, sentinels)
    assert list(hidden) == sentinels[: len(hidden)] == [t for t in inputs if t in sentinels]
    return [t for token in inputs for t in (hidden[token] if token in hidden else [token])]
