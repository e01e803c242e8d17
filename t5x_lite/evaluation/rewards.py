# SPDX-License-Identifier: Apache-2.0
"""Rewards of texts by name: a metric, whether a text compiles as Python, or a user's function."""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from t5x_lite.evaluation import choosing, metrics
from t5x_lite.utils.nearest import suggest

FUNCTION = "function:"
COMPILE = "compile"
# Of these metrics a value is a count; all others are percent, and their reward is in [0, 1].
COUNTED = ("edit_distance",)


class Group(NamedTuple):
    """Texts for one input.

    Attributes:
      input: the input.
      texts: the texts.
      references: acceptable answers.
    """

    input: str
    texts: list[str]
    references: list[str]


# The reward of each text of a group.
Reward = Callable[[Group], Sequence[float]]


def find_reward(name: str) -> Reward:
    """The reward of that name.

    Args:
      name: a key of metrics.METRICS, "compile" or "function:MODULE.NAME".

    Raises:
      ValueError: there is no such metric or function.
    """
    if name.startswith(FUNCTION):
        function = choosing.import_function(name.removeprefix(FUNCTION), "Grpo.reward")
        return lambda group: function(group.input, list(group.texts), list(group.references))
    if name == COMPILE:
        return lambda group: [float(compiles(text)) for text in group.texts]
    if name not in metrics.METRICS:
        known = [*metrics.METRICS, COMPILE, f"{FUNCTION}MODULE.NAME"]
        raise ValueError(f"Grpo.reward {name!r} is not a reward: {suggest(name, known)}")
    return lambda group: [metric_reward(name, text, group.references) for text in group.texts]


def metric_reward(metric: str, text: str, references: Sequence[str]) -> float:
    """A metric of one text as a reward: more is better, rates are shares and not percent.

    Args:
      metric: key of metrics.METRICS.
      text: the text.
      references: acceptable answers.
    """
    value = choosing.utility(metric, text, references)
    return value if metric in COUNTED else value / 100


def compiles(text: str) -> bool:
    """True if text is a Python program that compiles; it is not run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(text, "<sample>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError):
        return False
    return True


def reward_groups(name: str, reward: Reward, groups: Sequence[Group]) -> np.ndarray:
    """Computes the rewards [g n] of groups of equal size, float64.

    Args:
      name: Grpo.reward, for messages.
      reward: computes those of a group.
      groups: the groups.

    Raises:
      ValueError: the reward raises, or is not a finite number for each text.
    """
    return np.array([reward_group(name, reward, group) for group in groups])


def reward_group(name: str, reward: Reward, group: Group) -> list[float]:
    """Computes the rewards of one group.

    Args:
      name: Grpo.reward, for messages.
      reward: computes them.
      group: the group.

    Raises:
      ValueError: as `reward_groups`.
    """
    # SystemExit too: a user's function may end a program on bad input.
    try:
        values = choosing.list_yielded(reward(group), len(group.texts))
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"Grpo.reward {name} failed on input {group.input!r:.60}: {type(error).__name__}: "
            f"{str(error):.200}"
        ) from error
    numbers: list[float] = []
    with contextlib.suppress(TypeError, ValueError):
        numbers = [float(value) for value in values]
    if len(numbers) != len(group.texts) or not np.all(np.isfinite(numbers)):
        raise ValueError(
            f"Grpo.reward {name} must return a finite number for each of {len(group.texts)} "
            f"texts; on input {group.input!r:.60} it returned {values!r:.80}"
        )
    return numbers
