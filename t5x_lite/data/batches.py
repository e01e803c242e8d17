# SPDX-License-Identifier: Apache-2.0
"""Batches by step: every batch is a function of seed, step and host."""

import functools
import logging
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from t5x_lite import config
from t5x_lite.batch import Batch
from t5x_lite.config.objectives import Objective
from t5x_lite.config.windows import LengthLimits, length_limits
from t5x_lite.data import (
    checks,
    content,
    layout,
    mixing,
    objectives,
    randomness,
    rows,
    streams,
    tasks,
)
from t5x_lite.data.cache import Tokens
from t5x_lite.data.canvas import BlockMasker, make_masker
from t5x_lite.data.task import SplitFiles, Task, cached_tokens
from t5x_lite.utils.paths import cache_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Statistics:
    """Statistics of one epoch of rows.

    Attributes:
      examples: number of examples.
      rows: number of rows.
      examples_per_row: their mean number in a row.
      fill: share of places that are not padding, by feature.
      truncated: examples that lost tokens to Data.lengths, by feature.
      counts: counts of the reader (broken lines), by name.
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
class HostShard:
    """One host's part of every batch.

    Attributes:
      host: number of the host.
      hosts: number of hosts.
      batch_size: rows of a batch, all hosts together.
    """

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
class MixturePart:
    """One source of rows in the batches: a task, by one objective.

    Attributes:
      name: of the task, and of the objective where there are several.
      rows: its rows.
      key: random key of their order.
      counts: counts of the reader (broken lines), by name.
      state: returns what a checkpoint keeps of it.
      restore: continues from such a state.
    """

    name: str
    rows: rows.Examples | rows.Windows | streams.Streamed
    key: int
    counts: dict[str, int]
    state: Callable[[], dict]
    restore: Callable[[dict], None]


class Batches:
    """Batches of a split by step, each without those before it; of a streamed split only forward,
    from the last state restored."""

    def __init__(
        self,
        parts: list[MixturePart],
        mixture: mixing.MixtureSampler,
        lengths: LengthLimits,
        shard: HostShard,
        masker: BlockMasker | None = None,
    ):
        self.parts, self.mixture, self.lengths, self.shard = parts, mixture, lengths, shard
        self.masker = masker

    def at(self, step: int) -> Batch:
        """Returns this host's rows [batch_size / hosts, ...] of the batch of a step."""
        first = step * self.shard.batch_size + self.shard.host * self.shard.size
        numbers = np.arange(first, first + self.shard.size)
        batch = self.draw_rows(numbers)
        return batch if self.masker is None else self.masker.mask(batch, numbers)

    def draw_rows(self, numbers: np.ndarray) -> Batch:
        """Returns the rows of ascending numbers, counted through all steps."""
        which, ranks = self.mixture.draw(numbers)
        if (which == which[0]).all():
            part = self.parts[which[0]]
            return part.rows.batch(ranks, part.key)
        batch = layout.empty_batch(self.shard.size, self.lengths)
        for number in np.unique(which):
            places, part = np.flatnonzero(which == number), self.parts[number]
            layout.copy_rows(batch, places, part.rows.batch(ranks[places], part.key))
        return batch

    def evaluation(self) -> Iterator[Batch]:
        """Yields every row of the split once, in order; rows beyond the last are padding.

        Noise, where an objective draws it, is the same for every seed.
        """
        parts: list[Any] = [part.rows for part in self.parts]  # none is Streamed
        sizes = [rows.rows for rows in parts]
        edges = np.concatenate([[0], np.cumsum(sizes)])
        for start in range(0, int(edges[-1]), self.shard.batch_size):
            first = start + self.shard.host * self.shard.size
            numbers = np.arange(first, min(first + self.shard.size, int(edges[-1])))
            which = np.searchsorted(edges, numbers, side="right") - 1
            batch = layout.empty_batch(self.shard.size, self.lengths)
            for number in np.unique(which):
                places, part = np.flatnonzero(which == number), self.parts[number]
                layout.copy_rows(
                    batch, places, part.rows.batch(numbers[places] - edges[number], None)
                )
            if self.masker is not None:
                batch = self.masker.for_evaluation().mask(batch, first + np.arange(len(batch[0])))
            yield batch

    @functools.cached_property
    def statistics(self) -> Statistics:
        """Statistics of one epoch of every part, added up; of a stream, of its first shard."""
        epochs = [part.rows.epoch_counts() for part in self.parts]
        count = sum(epoch.rows for epoch in epochs)
        examples = sum(epoch.examples for epoch in epochs)
        tokens = add_counts([epoch.tokens for epoch in epochs])
        if self.lengths.layout == "decoder_only":
            fill = {"row": sum(tokens.values()) / (count * self.lengths.row)}
        else:
            wide = (
                self.lengths.inputs
                if self.lengths.layout == "encoder_decoder"
                else self.lengths.row
            )
            row = self.lengths.row
            places = {"inputs": wide, "targets": row, "negatives": row}
            fill = {name: tokens[name] / (count * places[name]) for name in tokens}
        return Statistics(
            examples=examples,
            rows=count,
            examples_per_row=examples / count,
            fill=fill,
            truncated=add_counts([epoch.truncated for epoch in epochs]),
            counts=add_counts([part.counts for part in self.parts]),
        )

    def state(self) -> dict:
        """State for a checkpoint, as JSON: digests of the tokens, and the positions of streams. It
        holds for this step and those prefetched."""
        return {part.name: part.state() for part in self.parts}

    def restore(self, state: dict) -> None:
        """Continues from a state.

        Raises ValueError if the data are not those of the state.
        """
        try:
            self.restore_parts(state)
        except (TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
            raise ValueError(
                f"The checkpoint's position in the data is not one that a run saves ({error!r:.80})"
                ": copy the checkpoint again, or begin in a new MODEL_DIR"
            ) from error

    def restore_parts(self, state: dict) -> None:
        """`restore`, of a state that may be of any form."""
        if state.keys() != {part.name for part in self.parts}:
            raise ValueError(
                f"The checkpoint was trained on {', '.join(sorted(state))}, but Data.task is now "
                f"{', '.join(part.name for part in self.parts)}"
            )
        for part in self.parts:
            part.restore(state[part.name])


def add_counts(counts: list[dict[str, int]]) -> dict[str, int]:
    """Sums of the dictionaries, name by name."""
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
    model: config.Model | None = None,
) -> Batches:
    """Opens the batches of one split.

    Args:
      cfg: the data.
      layout: config.Model.layout.
      batch_size: rows of a batch, all hosts together.
      seed: of the run.
      split: of the tasks.
      host: number of this host.
      hosts: number of hosts.
      model: config of a model whose canvas masks the targets; None for any other.

    Raises:
      ValueError: the data do not suit the layout or the lengths, or cannot be read.
    """
    shard, sources = HostShard(host, hosts, batch_size), list_sources(cfg, split)
    masker = make_masker(model, sources[0][0].task.vocabularies[1], seed)
    lengths = length_limits(cfg.lengths, layout)._replace(negatives=has_negatives(cfg, layout))
    if masker is not None:
        lengths = lengths._replace(multiple=masker.canvas.block)
    parts, rates = [], []
    if split == "train":
        checks.warn_of_mixed_ends([source.task for source, _ in sources if source.first])
    for source, rate in sources:
        task = source.task
        checks.check_inputs(cfg, task, lengths)
        if split == "train" and source.first:
            checks.warn_of_overlap(task)
        part = open_part(cfg, source, split, lengths, randomness.key(seed, "part", source.name))
        epoch = part.rows.epoch_counts()
        if split == "train":
            checks.check_targets(task.name, epoch, lengths)
        if source.objective is None:
            checks.warn_of_ends(task, split, part.rows.first_tokens())
        parts.append(part)
        # Rates are of examples, but rows are drawn.
        rates.append(rate * epoch.rows / epoch.examples)
    mixture = mixing.MixtureSampler(rates, randomness.key(seed, "mixture"))
    return log_statistics(Batches(parts, mixture, lengths, shard, masker), split)


def log_statistics(batches: Batches, split: str) -> Batches:
    """Logs one epoch of a split, as a warning if something is lost; returns its batches."""
    statistics = batches.statistics
    lost = any([*statistics.truncated.values(), *statistics.counts.values()])
    level = logging.WARNING if lost else logging.INFO
    names = "+".join(part.name for part in batches.parts)
    log.log(level, "%s, %s: %s", names, split, statistics)
    return batches


def has_negatives(cfg: config.Data, layout: str) -> bool:
    """True if rows of this layout have hard negatives beside their targets."""
    return layout == "encoder_decoder" and cfg.objective is None and cfg.has_negatives


class PartSource(NamedTuple):
    """Source of a part's rows: a task, by one objective or by its own pairs.

    Attributes:
      name: of the part.
      task: the task.
      tokens: reads its cache, once for all parts of the task.
      objective: of the part; None for the task's own pairs.
      first: true for the first part of the task, which reports the reader's counts.
    """

    name: str
    task: Task
    tokens: Callable[[], Tokens]
    objective: Objective | None
    first: bool = True


def list_sources(cfg: config.Data, split: str) -> list[tuple[PartSource, float]]:
    """Sources of a split, each task by each denoiser, with their rates."""
    result = []
    for task, rate in tasks.tasks_with_split(cfg, split):
        tokens = functools.cache(functools.partial(cached_tokens, task, split, cfg.cache_dir))
        if cfg.objective is None:
            result.append((PartSource(task.name, task, tokens, None), rate))
            continue
        parts = objectives.denoisers(cfg.objective, task.vocabularies[1])
        for number, (name, objective, share) in enumerate(parts):
            name = f"{task.name}/{name}" if name else task.name
            result.append((PartSource(name, task, tokens, objective, number == 0), rate * share))
    return result


def open_part(
    cfg: config.Data, source: PartSource, split: str, lengths: LengthLimits, key: int
) -> MixturePart:
    """Opens the rows of a source, cached or streamed.

    Args:
      cfg: the data.
      source: task and objective.
      split: of the task.
      lengths: limits of the rows.
      key: random key of their order.
    """
    task = source.task
    reference = None
    if source.objective is None:
        paired = task.paired and split == "train"
        if paired and task.reference is not None:
            reference = np.array([*task.reference()], np.float32).reshape(-1)
        make_rows = functools.partial(
            rows.Examples, lengths=lengths, pack=cfg.pack, paired=paired, reference=reference
        )
    else:
        preprocessor = objectives.make_preprocessor(source.objective, lengths, task.vocabularies[1])
        make_rows = functools.partial(rows.Windows, preprocessor=preprocessor)
    if cfg.stream and split == "train":
        streamed = streams.Streamed(task, split, lengths, make_rows)
        counts = task.counts.get(split, {}) if source.first else {}
        return MixturePart(source.name, streamed, key, counts, streamed.state, streamed.restore)
    tokens, digests = source.tokens(), SplitFiles(task, split, cache_folder(cfg.cache_dir)).digests
    digest = tokens.digest if reference is None else f"{tokens.digest}-{zlib.crc32(reference):08x}"
    return MixturePart(
        name=source.name,
        rows=make_rows(tokens),
        key=key,
        counts=tokens.counts if source.first else {},
        state=lambda: {"tokens": digest, "files": digests},
        restore=functools.partial(check_digest, source.name, digest, digests),
    )


def check_digest(name: str, digest: str, digests: dict[str, str], state: dict) -> None:
    """Checks that a state is of the same tokens.

    Args:
      name: of the part.
      digest: of its tokens.
      digests: of its files, by path.
      state: what a checkpoint kept of the part.

    Raises:
      ValueError: they are other tokens; the message names the files that changed.
    """
    if state.get("tokens") != digest:
        changed = content.describe_changes(state["files"], digests) if state.get("files") else ""
        raise ValueError(
            f"The training data of {name} have changed since the checkpoint was written"
            f"{changed and f' ({changed})'}: the same steps would read other examples. Put the old "
            "source back, or begin in a new MODEL_DIR"
        )
