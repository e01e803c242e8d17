# SPDX-License-Identifier: Apache-2.0
"""Batches by step: every batch is a function of seed, step and host."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from t5x_lite import config
from t5x_lite.batch import Batch
from t5x_lite.data import mixing, randomness, rows, tasks


@dataclass(frozen=True)
class Statistics:
    """What one epoch of rows holds; `fill` is the share of places that are not padding.

    `truncated` counts the examples that lost tokens to Data.lengths, by feature; `counts` what
    reading the source counted (broken lines).
    """

    examples: int
    rows: int
    examples_per_row: float
    fill: dict[str, float]
    truncated: dict[str, int]
    counts: dict[str, int]

    def __str__(self) -> str:
        fill = ", ".join(f"{name} {share:.1%}" for name, share in self.fill.items())
        lost = ", ".join(
            f"{count} {name} truncated ({count / self.examples:.2%})"
            for name, count in self.truncated.items()
            if count
        )
        more = ", ".join(f"{count} {name}" for name, count in self.counts.items() if count)
        parts = [
            f"{self.examples} examples in {self.rows} rows ({self.examples_per_row:.1f} a row)",
            f"filled: {fill}",
            lost or "none truncated",
            more,
        ]
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True)
class Shard:
    """This host's part of every batch."""

    host: int
    hosts: int
    batch_size: int

    def __post_init__(self):
        if self.batch_size % self.hosts:
            raise ValueError(
                f"Train.batch_size ({self.batch_size}) must be a multiple of the hosts "
                f"({self.hosts})"
            )

    @property
    def size(self) -> int:
        return self.batch_size // self.hosts


class Batches:
    """Batches over cached tokens: any of them at any time, without those before it."""

    def __init__(
        self,
        parts: list[rows.Examples | rows.Windows],
        mixture: mixing.Mixture,
        layout: str,
        lengths: rows.Lengths,
        shard: Shard,
    ):
        self.parts, self.mixture = parts, mixture
        self.layout, self.lengths, self.shard = layout, lengths, shard
        self.seed = 0
        self.digest = ""
        self.counts: dict[str, int] = {}

    def at(self, step: int) -> Batch:
        """This host's rows [batch_size / hosts, ...] of the batch of a step."""
        first = step * self.shard.batch_size + self.shard.host * self.shard.size
        turns = np.arange(first, first + self.shard.size)
        batch = rows.empty(self.layout, self.shard.size, self.lengths)
        which, ranks = mixing.draw(self.mixture, turns, randomness.key(self.seed, "mixture"))
        for number, part in enumerate(self.parts):
            places = np.flatnonzero(which == number)
            if len(places):
                key = randomness.key(self.seed, "part", number)
                part.write(batch, places, ranks[places], key)
        return batch

    def evaluation(self) -> Iterator[Batch]:
        """Every row of the split once, in order; rows beyond the last are padding."""
        sizes = [part.rows for part in self.parts]
        edges = np.concatenate([[0], np.cumsum(sizes)])
        for start in range(0, int(edges[-1]), self.shard.batch_size):
            first = start + self.shard.host * self.shard.size
            turns = np.arange(first, min(first + self.shard.size, edges[-1]))
            batch = rows.empty(self.layout, self.shard.size, self.lengths)
            for number, part in enumerate(self.parts):
                places = np.flatnonzero((turns >= edges[number]) & (turns < edges[number + 1]))
                if len(places):
                    part.write(batch, places, turns[places] - edges[number], None)
            yield batch

    @property
    def statistics(self) -> Statistics:
        """One epoch of every part, added up."""
        shares = [part.shares() for part in self.parts]
        total = lambda name: sum(getattr(share, name) for share in shares)
        add = lambda name: {
            feature: sum(getattr(share, name).get(feature, 0) for share in shares)
            for share in shares
            for feature in getattr(share, name)
        }
        count = total("rows")
        tokens = add("tokens")
        if self.layout == "joined":
            fill = {"targets": sum(tokens.values()) / (count * self.lengths.row)}
        else:
            places = {"inputs": self.lengths.inputs, "targets": self.lengths.row}
            fill = {name: tokens[name] / (count * places[name]) for name in tokens}
        return Statistics(
            examples=total("examples"),
            rows=count,
            examples_per_row=total("examples") / count,
            fill=fill,
            truncated=add("truncated"),
            counts=self.counts,
        )

    def state(self) -> dict:
        """What a checkpoint keeps: which tokens these are. The step says the rest."""
        return {"tokens": self.digest}

    def restore(self, state: dict) -> None:
        """Raises ValueError if the tokens are not those of the state."""
        if state.get("tokens", self.digest) != self.digest:
            raise ValueError(
                "The training data have changed since the checkpoint was written: the same steps "
                "would read other examples. Put the old source back, or begin in a new MODEL_DIR"
            )


def open_batches(
    cfg: config.Data,
    layout: str,
    batch_size: int,
    seed: int,
    split: str = "train",
    host: int = 0,
    hosts: int = 1,
) -> Batches:
    """Batches of `batch_size` rows over all hosts, of one split.

    Raises ValueError if the task has no inputs where the layout needs them, or no example fits.
    """
    shard = Shard(host, hosts, batch_size)
    lengths = rows.row_lengths(cfg.lengths, layout)
    parts, rates, digests, counts = [], [], [], {}
    for task, rate in tasks.resolve(cfg):
        if split not in task.splits and len(rates):
            continue
        found = tasks.tokens(task, split, cfg.cache_dir)
        parts.append(part(cfg, task, found, layout, lengths))
        rates.append(rate)
        digests.append(found.digest)
        for name, count in found.counts.items():
            counts[name] = counts.get(name, 0) + count
    shares = [each.shares() for each in parts]
    row_rates = [
        rate * share.rows / share.examples for rate, share in zip(rates, shares, strict=True)
    ]
    batches = Batches(parts, mixing.mixture(row_rates), layout, lengths, shard)
    batches.seed, batches.digest, batches.counts = seed, "-".join(digests), counts
    return batches


def part(cfg: config.Data, task: tasks.Task, found, layout: str, lengths: rows.Lengths):
    """One task's rows, by its own pairs or by the objective."""
    if cfg.objective is not None:
        vocabulary = task.vocabularies[1]
        return rows.Windows(found, layout, lengths, cfg.objective, vocabulary)
    if found.inputs is None and layout != "joined":
        raise ValueError(
            f"{task.name} is text without inputs: set Data.objective (SpanCorruption or PrefixLM), "
            "or train a decoder alone"
        )
    if found.inputs is not None and not lengths.inputs:
        raise ValueError(f'{task.name} has inputs: set Data.lengths["inputs"]')
    return rows.Examples(found, layout, lengths, cfg.pack)
