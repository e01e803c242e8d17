# SPDX-License-Identifier: Apache-2.0
"""Batches by step: every batch is a function of seed, step and host."""

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from t5x_lite import config
from t5x_lite.batch import Batch
from t5x_lite.data import files, layout, mixing, objectives, randomness, rows, streams, tasks
from t5x_lite.data.cache import Tokens
from t5x_lite.data.lengths import Lengths, of
from t5x_lite.denoising import Objective

log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Part:
    """One task's rows in the batches, the key of their order, and what a checkpoint keeps."""

    name: str
    rows: rows.Examples | rows.Windows | streams.Streamed
    key: int
    counts: dict[str, int]
    state: Callable[[], dict]
    restore: Callable[[dict], None]


class Batches:
    """Batches of a split, any of them at any time without those before it; of a streamed split
    only forward, from the last state restored."""

    def __init__(self, parts: list[Part], mixture: mixing.Mixture, lengths: Lengths, shard: Shard):
        self.parts, self.mixture, self.lengths, self.shard = parts, mixture, lengths, shard

    def at(self, step: int) -> Batch:
        """This host's rows [batch_size / hosts, ...] of the batch of a step."""
        first = step * self.shard.batch_size + self.shard.host * self.shard.size
        which, ranks = self.mixture.draw(np.arange(first, first + self.shard.size))
        if (which == which[0]).all():
            part = self.parts[which[0]]
            return part.rows.batch(ranks, part.key)
        batch = layout.empty(self.shard.size, self.lengths)
        for number in np.unique(which):
            places, part = np.flatnonzero(which == number), self.parts[number]
            layout.put(batch, places, part.rows.batch(ranks[places], part.key))
        return batch

    def evaluation(self) -> Iterator[Batch]:
        """Every row of the split once, in order; rows beyond the last are padding.

        Noise, where an objective draws it, is the same whatever the seed.
        """
        sizes = [part.rows.rows for part in self.parts]
        edges = np.concatenate([[0], np.cumsum(sizes)])
        for start in range(0, int(edges[-1]), self.shard.batch_size):
            first = start + self.shard.host * self.shard.size
            numbers = np.arange(first, min(first + self.shard.size, int(edges[-1])))
            which = np.searchsorted(edges, numbers, side="right") - 1
            batch = layout.empty(self.shard.size, self.lengths)
            for number in np.unique(which):
                places, part = np.flatnonzero(which == number), self.parts[number]
                layout.put(batch, places, part.rows.batch(numbers[places] - edges[number], None))
            yield batch

    @functools.cached_property
    def statistics(self) -> Statistics:
        """One epoch of every part, added up; of a stream, its first shard."""
        shares = [part.rows.shares() for part in self.parts]
        count = sum(share.rows for share in shares)
        examples = sum(share.examples for share in shares)
        tokens = added([share.tokens for share in shares])
        if self.lengths.layout == "joined":
            fill = {"row": sum(tokens.values()) / (count * self.lengths.row)}
        else:
            wide = self.lengths.inputs if self.lengths.layout == "pair" else self.lengths.row
            places = {"inputs": wide, "targets": self.lengths.row}
            fill = {name: tokens[name] / (count * places[name]) for name in tokens}
        return Statistics(
            examples=examples,
            rows=count,
            examples_per_row=examples / count,
            fill=fill,
            truncated=added([share.truncated for share in shares]),
            counts=added([part.counts for part in self.parts]),
        )

    def state(self) -> dict:
        """What a checkpoint keeps beside the step, for JSON: which tokens these are, and how far
        streams have come. It holds for this step and those made ahead of it."""
        return {part.name: part.state() for part in self.parts}

    def restore(self, state: dict) -> None:
        """Goes on where the state was taken.

        Raises ValueError if the data are no longer those of the state.
        """
        if state.keys() != {part.name for part in self.parts}:
            raise ValueError(
                f"The checkpoint was trained on {', '.join(sorted(state))}, but Data.task is now "
                f"{', '.join(part.name for part in self.parts)}"
            )
        for part in self.parts:
            part.restore(state[part.name])


def added(counts: list[dict[str, int]]) -> dict[str, int]:
    """The dictionaries added up, name by name."""
    names = dict.fromkeys(name for each in counts for name in each)
    return {name: sum(each.get(name, 0) for each in counts) for name in names}


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

    `layout` is config.Model.layout. Raises ValueError if the data do not suit the layout or the
    lengths, and where opening or reading them fails.
    """
    shard = Shard(host, hosts, batch_size)
    lengths = of(cfg.lengths, layout)
    parts, rates = [], []
    for source, rate in sources(cfg, split):
        task = source.task
        check_inputs(cfg, task, lengths)
        part = open_part(cfg, source, split, lengths, randomness.key(seed, "part", source.name))
        share = part.rows.shares()
        if not share.whole:
            raise ValueError(
                f"None of {share.examples} examples of {task.name} fits Data.lengths "
                f"{cfg.lengths} whole: raise the lengths, or cut running text up by Data.objective"
            )
        parts.append(part)
        # Rates are of examples, but what is drawn are rows.
        rates.append(rate * share.rows / share.examples)
    mixture = mixing.Mixture(rates, randomness.key(seed, "mixture"))
    batches = Batches(parts, mixture, lengths, shard)
    found = batches.statistics
    level = (
        logging.WARNING
        if any([*found.truncated.values(), *found.counts.values()])
        else logging.INFO
    )
    log.log(level, "%s, %s: %s", "+".join(part.name for part in parts), split, found)
    return batches


class Source(NamedTuple):
    """What the rows of a part are made of: a task, by one objective or by its own pairs.

    `tokens` reads its cache once for all its parts; only the `first` tells what reading counted.
    """

    name: str
    task: tasks.Task
    tokens: Callable[[], Tokens]
    objective: Objective | None
    first: bool = True


def sources(cfg: config.Data, split: str) -> list[tuple[Source, float]]:
    """Each task by each denoiser, with its rate."""
    found = []
    for task, rate in tasks.having(cfg, split):
        tokens = functools.cache(functools.partial(tasks.tokens, task, split, cfg.cache_dir))
        if cfg.objective is None:
            found.append((Source(task.name, task, tokens, None), rate))
            continue
        parts = objectives.denoisers(cfg.objective, task.vocabularies[1])
        for number, (name, objective, share) in enumerate(parts):
            name = f"{task.name}/{name}" if name else task.name
            found.append((Source(name, task, tokens, objective, number == 0), rate * share))
    return found


def check_inputs(cfg: config.Data, task: tasks.Task, lengths: Lengths) -> None:
    """Raises ValueError unless the task has what the layout reads."""
    if cfg.objective is not None:
        return
    if not task.has_inputs and lengths.layout != "joined":
        raise ValueError(
            f"{task.name} is text without inputs: set Data.objective (SpanCorruption or PrefixLM), "
            "or train a decoder alone"
        )
    if task.has_inputs and not lengths.inputs and lengths.layout != "aligned":
        raise ValueError(f'{task.name} has inputs: set Data.lengths["inputs"]')


def open_part(cfg: config.Data, source: Source, split: str, lengths: Lengths, key: int) -> Part:
    """The source's rows, cached or streamed."""
    task = source.task
    if source.objective is None:
        make = lambda found: rows.Examples(found, lengths, cfg.pack)
    else:
        cutter = objectives.cutter(source.objective, lengths, task.vocabularies[1])
        make = lambda found: rows.Windows(found, cutter)
    if cfg.stream and split == "train":
        streamed = streams.Streamed(task, split, lengths, make)
        counts = task.counts if source.first else {}
        return Part(source.name, streamed, key, counts, streamed.state, streamed.restore)
    found, stamps = source.tokens(), task.stamps(split)
    return Part(
        name=source.name,
        rows=make(found),
        key=key,
        counts=found.counts if source.first else {},
        state=lambda: {"tokens": found.digest, "files": stamps},
        restore=functools.partial(check_digest, source.name, found.digest, stamps),
    )


def check_digest(name: str, digest: str, stamps: dict, state: dict) -> None:
    """Raises ValueError if the state is of other tokens, naming the files that changed."""
    if state.get("tokens") != digest:
        changed = files.changes(state["files"], stamps) if state.get("files") else ""
        raise ValueError(
            f"The training data of {name} have changed since the checkpoint was written"
            f"{changed and f' ({changed})'}: the same steps would read other examples. Put the old "
            "source back, or begin in a new MODEL_DIR"
        )
