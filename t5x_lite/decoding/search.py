# SPDX-License-Identifier: Apache-2.0
"""Search by a judge over rows that fork: what is kept, dropped and doubled after each segment.

A judge gives every text so far a number, higher is better; minus infinity drops it. Each policy
returns rows that have ended, best or most probable first.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from t5x_lite.decoding.forks import ForkedDecoder, ForkedTexts, Forks
from t5x_lite.decoding.result import Result

Judge = Callable[[ForkedTexts], Sequence[float]]
EXPLORATION = 1.0  # c of PUCT: weight of what has been visited little


class SearchSettings(NamedTuple):
    """Settings of a policy.

    Attributes:
      particles: rows that are written at a time.
      segment: most tokens of a segment.
      weight: by which the judge's numbers are multiplied.
      rounds: simulations of a tree search; most tries of a rejected segment.
      seed: of the choices on the host.
    """

    particles: int
    segment: int
    weight: float = 1.0
    rounds: int = 16
    seed: int = 0


class SearchText(NamedTuple):
    """A text that a policy has found.

    Attributes:
      texts: rows that have ended, or that no weight is left to.
      row: number of its row.
      value: what the judge says of it.
    """

    texts: ForkedTexts
    row: int
    value: float


def list_rows(
    texts: ForkedTexts, rows: Iterable[int] | np.ndarray, values: np.ndarray
) -> list[SearchText]:
    """Returns rows as texts that were found.

    Args:
      texts: the rows.
      rows: numbers of those to return, in order.
      values: the judge's numbers of all rows.
    """
    return [SearchText(texts, int(row), float(values[row])) for row in rows]


def judge_rows(judge: Judge, texts: ForkedTexts) -> np.ndarray:
    """Returns the judge's numbers [b], in float64."""
    return np.array(list(judge(texts)), np.float64)


def choose_best(decoder: ForkedDecoder, judge: Judge, settings: SearchSettings) -> list[SearchText]:
    """Keeps the best row after each segment and doubles it (Mudgal et al., 2024, arXiv 2310.17022).

    With a segment as long as the text this is the best of n.

    Args:
      decoder: the prompt.
      judge: gives the numbers.
      settings: rows and segment.
    """
    forks = decoder.begin(settings.particles)
    while True:
        forks, texts = decoder.advance(forks, settings.segment)
        values = judge_rows(judge, texts)
        if all(texts.done):
            return list_rows(texts, np.argsort(-values, kind="stable"), values)
        forks = decoder.fork(forks, [int(np.argmax(values))] * settings.particles)


def reject_segments(
    decoder: ForkedDecoder, judge: Judge, settings: SearchSettings
) -> list[SearchText]:
    """Draws a segment again until it is accepted (as in Li et al., 2024, arXiv 2406.16306).

    With probability min(1, exp(weight * rise)) for the rise of the judge's number, which is 0
    before the first segment. Candidates are written together, and the first one that is accepted
    goes on; if none is in all rounds, the best of the last one does.

    Args:
      decoder: the prompt.
      judge: gives the numbers.
      settings: rows, segment, weight and rounds.
    """
    draw = np.random.default_rng(settings.seed)
    forks, before = decoder.begin(1), 0.0
    while True:
        for number in range(settings.rounds):
            same = [0] * settings.particles
            trial = decoder.fork(forks, same, keep=number == 0)
            trial, texts = decoder.advance(trial, settings.segment)
            values = judge_rows(judge, texts)
            rise = settings.weight * (values - before) if np.isfinite(before) else values
            accepted = np.log(draw.random(len(values))) < np.minimum(rise, 0)
            if accepted.any():
                break
        row = int(np.argmax(accepted)) if accepted.any() else int(np.argmax(values))
        if texts.done[row]:
            return list_rows(texts, [row], values)
        forks, before = decoder.fork(trial, [row]), float(values[row])


def sample_particles(
    decoder: ForkedDecoder, judge: Judge, settings: SearchSettings
) -> list[SearchText]:
    """Samples from the model's law times exp(weight * judge), by sequential Monte Carlo.

    Weights grow by the rise of the judge's number; rows are resampled when their effective number
    falls below half (Lew et al., 2023, arXiv 2306.03081; Del Moral et al., 2006). The texts are a
    last sample by weight, so that the first one is a draw.

    Args:
      decoder: the prompt.
      judge: gives the numbers.
      settings: particles, segment and weight.
    """
    draw = np.random.default_rng(settings.seed)
    forks, count = decoder.begin(settings.particles), settings.particles
    log_weights, before = np.zeros(count), np.zeros(count)
    while True:
        forks, texts = decoder.advance(forks, settings.segment)
        values = judge_rows(judge, texts)
        log_weights = update_weights(log_weights, settings.weight, values, before)
        if all(texts.done) or np.isneginf(log_weights).all():
            rows = draw.permutation(resample(log_weights, draw))
            return list_rows(texts, rows, values)
        before = values
        if effective_size(log_weights) < count / 2:
            parents = resample(log_weights, draw)
            forks, before = decoder.fork(forks, parents.tolist()), values[parents]
            log_weights = np.zeros(count)


def update_weights(
    log_weights: np.ndarray, weight: float, values: np.ndarray, before: np.ndarray
) -> np.ndarray:
    """Returns the weights [n] after a segment; minus infinity stays.

    Args:
      log_weights: logarithms of the weights before it.
      weight: of the judge.
      values: the judge's numbers after it.
      before: the judge's numbers before it.
    """
    alive = np.isfinite(values) & np.isfinite(log_weights)
    rise = np.where(alive, values, 0) - np.where(alive, before, 0)
    return np.where(alive, log_weights + weight * rise, -np.inf)


def effective_size(log_weights: np.ndarray) -> float:
    """Effective sample size: (sum of weights)^2 over the sum of their squares."""
    weights = np.exp(log_weights - log_weights.max())
    return float(weights.sum() ** 2 / (weights**2).sum())


def resample(log_weights: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Draws as many rows [n] by weight, in order, by systematic resampling (Kitagawa, 1996).

    A row of weight w of all n has floor(n w) or ceil(n w) copies. Without any weight, every row
    stays.
    """
    count = len(log_weights)
    if np.isneginf(log_weights).all():
        return np.arange(count)
    weights = np.exp(log_weights - log_weights.max())
    places = (draw.random() + np.arange(count)) / count * weights.sum()
    # Rounding must not choose a row of weight 0 at the end.
    last = int(np.flatnonzero(weights)[-1])
    return np.minimum(np.searchsorted(np.cumsum(weights), places, side="right"), last)


class Node:
    """A prefix in the tree of a search.

    Attributes:
      forks: rows of which it is one.
      row: its number.
      log_probability: of its text.
      prior: probability of its last segment after its parent's text.
      parent: None for the prompt.
      children: nodes by the tokens of their texts.
      values: the judge's numbers of all texts below it.
      closed: nothing below it can be new.
    """

    def __init__(
        self,
        forks: Forks,
        row: int,
        log_probability: float = 0.0,
        prior: float = 1.0,
        parent: Any = None,
    ):
        self.forks, self.row, self.log_probability = forks, row, log_probability
        self.prior, self.parent = prior, parent
        self.children: dict[tuple[int, ...], Node] = {}
        self.values: list[float] = []
        self.closed = False

    @property
    def unseen(self) -> float:
        """Probability of all segments that are not among the children."""
        return max(1 - sum(child.prior for child in self.children.values()), 0.0)


def search_tree(decoder: ForkedDecoder, judge: Judge, settings: SearchSettings) -> list[SearchText]:
    """Tree search over segments, by PUCT (Zhang et al., 2023, arXiv 2303.05510).

    A simulation goes down from the prompt to the node whose segments not yet seen promise most,
    draws segments there, completes them, and judges the complete texts.

    Args:
      decoder: the prompt.
      judge: gives the numbers; of complete texts alone.
      settings: segments of an expansion, their tokens, and simulations.
    """
    root = Node(decoder.begin(1), 0)
    every: dict[tuple[int, ...], SearchText] = {}
    for _ in range(settings.rounds):
        for each in expand_node(decoder, judge, settings, select_node(root)):
            every.setdefault(tuple(each.texts.tokens[each.row]), each)
        if root.closed:
            break
    return sorted(every.values(), key=lambda each: -each.value)[: settings.particles]


def select_node(root: Node) -> Node:
    """Goes down to the node to expand: by mean value plus what prior and visits leave open."""
    finite = [value for value in root.values if np.isfinite(value)]
    least, spread = (min(finite), max(finite) - min(finite)) if finite else (0.0, 0.0)

    def quality(node: Node) -> float:
        # Values on the scale 0 to 1 of those seen so far (as in MuZero, arXiv 1911.08265).
        scaled = [(max(value, least) - least) / (spread or 1.0) for value in node.values]
        return sum(scaled) / max(len(scaled), 1)

    node = root
    while True:
        explore = EXPLORATION * math.sqrt(len(node.values) + 1)
        open_children = [child for child in node.children.values() if not child.closed]
        scores = [
            quality(child) + explore * child.prior / (1 + len(child.values))
            for child in open_children
        ]
        # Segments not yet seen count as one child that has the mean value of its siblings.
        if not scores or quality(node) + explore * node.unseen / (1 + len(node.children)) > max(
            scores
        ):
            return node
        node = open_children[int(np.argmax(scores))]


def expand_node(
    decoder: ForkedDecoder, judge: Judge, settings: SearchSettings, node: Node
) -> list[SearchText]:
    """Draws segments after a node, and judges complete texts that continue them.

    Args:
      decoder: the prompt.
      judge: gives the numbers.
      settings: segments and their tokens.
      node: the node.

    Returns:
      The complete texts.
    """
    forks = decoder.fork(node.forks, [node.row] * settings.particles, keep=False)
    forks, texts = decoder.advance(forks, settings.segment)
    complete = texts if all(texts.done) else decoder.advance(forks, decoder.program.length)[1]
    values = judge_rows(judge, complete)
    for row, tokens in enumerate(map(tuple, texts.tokens)):
        child = node.children.get(tokens)
        if child is None:
            log_probability = texts.log_probability[row]
            prior = math.exp(min(log_probability - node.log_probability, 0.0))
            child = node.children[tokens] = Node(forks, row, log_probability, prior, node)
        child.closed |= texts.done[row]
        above: Node | None = child
        while above is not None:
            above.values.append(float(values[row]))
            above = above.parent
    above = node
    while above is not None:
        below = all(child.closed for child in above.children.values())
        above.closed = above.unseen < 1e-5 and below
        above = above.parent
    return list_rows(complete, range(len(values)), values)


def join_results(chosen: Sequence[SearchText]) -> Result:
    """Returns texts as those of one input: a Result with b = 1 and n = len(chosen)."""

    def take_row(result: Result, row: int) -> Result:
        return jax.tree.map(lambda x: x[row], result._replace(steps=None))

    rows = [take_row(each.texts.result, each.row) for each in chosen]
    joined = jax.tree.map(lambda *parts: np.concatenate(parts)[None], *rows)
    return joined._replace(steps=max(int(each.texts.result.steps) for each in chosen))


POLICIES = {
    "best": choose_best,
    "rejection": reject_segments,
    "smc": sample_particles,
    "puct": search_tree,
}
