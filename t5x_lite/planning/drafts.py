# SPDX-License-Identifier: Apache-2.0
"""Draft models by arithmetic: which depth, width and draft length pay at a measured acceptance.

A draft model writes k tokens, one decode step each; the target reads the block of k + 1 in one
step. With each draft token accepted with probability a, that writes (1 - a^(k + 1)) / (1 - a)
tokens (Leviathan et al., 2023, arXiv 2211.17192, equation 1).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from t5x_lite import config
from t5x_lite.config.resized import resize_model
from t5x_lite.planning import phases
from t5x_lite.planning.chips import Slice

LONGEST = 16  # draft tokens that are tried
HALVINGS = 40  # of the interval that the break-even acceptance is sought in


class DraftPlan(NamedTuple):
    """A draft model beside its target.

    Attributes:
      layers: its layers.
      width: of its states.
      cost: seconds of its decode step, over those of the target's.
      draft_length: tokens of a draft with which it is fastest at the acceptance.
      speedup: tokens per second over those of the target alone; below 1 it does not pay.
      break_even: acceptance from which it pays, with the best draft length there; 1 if none does.
    """

    layers: int
    width: int
    cost: float
    draft_length: int
    speedup: float
    break_even: float


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """Reads sizes of draft models, LAYERSxWIDTH with commas, such as "1x256,2x512".

    Raises:
      ValueError: they are not positive integers.
    """
    sizes = []
    for part in text.split(","):
        numbers = part.strip().split("x")
        whole = all(number.isascii() and number.isdigit() for number in numbers)
        config.require(
            whole and len(numbers) == 2 and min(map(int, numbers)) > 0,
            f"--draft={text}: write layers and width of each draft model, such as "
            "--draft=1x256,2x512",
        )
        sizes.append((int(numbers[0]), int(numbers[1])))
    return sizes


def expected_tokens(acceptance: float, draft_length: int) -> float:
    """Mean number of tokens that a block writes, the target's own token included."""
    return sum(acceptance**place for place in range(draft_length + 1))


def block_seconds(known: phases.ServingArithmetic, rows: int, tokens: int) -> float:
    """Seconds of a step that reads a block of tokens for each row, over the cache of the row.

    Args:
      known: arithmetic of the model.
      rows: of one shard.
      tokens: of a block.
    """
    many = known.decoding(rows * tokens)
    # The tokens of a block share the cache of their row.
    again = rows * (tokens - 1) * known.row_bytes()
    return many._replace(moved=many.moved - again).seconds


def rank_drafts(
    run: config.Run,
    slice_: Slice,
    sizes: phases.TextSizes,
    drafts: Sequence[tuple[int, int]],
    *,
    rows: int,
    acceptance: float,
) -> list[DraftPlan]:
    """Draft models, the fastest first.

    Args:
      run: config of the target.
      slice_: the chips.
      sizes: sizes of a text, and formats, of both models.
      drafts: layers and width of each draft model; its heads and MLP are in proportion.
      rows: texts at once.
      acceptance: probability that a draft token is accepted.

    Raises:
      ValueError: a width does not divide evenly, or the mesh cannot split the rows.
    """
    target = phases.serving_arithmetic(run, slice_, sizes)
    here = target.shard_rows(rows)
    blocks = [block_seconds(target, here, tokens) for tokens in range(1, LONGEST + 2)]
    plans = []
    for layers, width in drafts:
        small = dataclasses.replace(run, model=resize_model(run.model, layers, width))
        known = phases.serving_arithmetic(small, slice_, sizes)
        plans.append(plan_draft((layers, width), known.decoding(here).seconds, blocks, acceptance))
    return sorted(plans, key=lambda plan: -plan.speedup)


def plan_draft(
    size: tuple[int, int], step: float, blocks: Sequence[float], acceptance: float
) -> DraftPlan:
    """The best use of one draft model.

    Args:
      size: its layers and width.
      step: seconds of its decode step.
      blocks: seconds of the target's steps over blocks of 1, 2, ... tokens.
      acceptance: probability that a draft token is accepted.
    """

    def best(probability: float) -> tuple[float, int]:
        return max(
            (expected_tokens(probability, k) * blocks[0] / (blocks[k] + k * step), k)
            for k in range(1, len(blocks))
        )

    speedup, draft_length = best(acceptance)
    low, high = 0.0, 1.0
    if best(high)[0] <= 1:
        low = high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if best(middle)[0] > 1 else (middle, high)
    return DraftPlan(*size, step / blocks[0], draft_length, speedup, high)


def draft_table(plans: Sequence[DraftPlan]) -> list[list[str]]:
    """Rows of a table, the heads first."""
    heads = ["draft model", "cost of its step", "draft length", "speed-up", "pays from acceptance"]
    rows = [
        [
            f"{plan.layers} x {plan.width}",
            f"{plan.cost:.1%} of the target's",
            str(plan.draft_length),
            f"{plan.speedup:.2f}" + ("" if plan.speedup > 1 else " (does not pay)"),
            f"{plan.break_even:.2f}" if plan.break_even < 1 else "never",
        ]
        for plan in plans
    ]
    return [heads, *rows]
