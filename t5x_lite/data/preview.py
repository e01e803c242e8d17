# SPDX-License-Identifier: Apache-2.0
"""What training reads, for people: real examples of each denoiser as text, and how lengths, noise
and rates come out beside what was asked for."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from t5x_lite import config
from t5x_lite.batch import Batch
from t5x_lite.data import batches, objectives
from t5x_lite.data.lengths import Lengths, of
from t5x_lite.data.objectives import Cutter
from t5x_lite.data.vocabularies import Vocabulary

CHUNK = 64  # rows made at a time


class Example(NamedTuple):
    """Ids of one example, and of its targets those that bear loss."""

    inputs: np.ndarray
    targets: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True)
class Denoiser:
    """Some examples of one part of the data. `cutter` is None for a task's own pairs; `drawn` is
    its share of the rows that a run begins with, `asked` the share that its rate asks for."""

    name: str
    cutter: Cutter | None
    vocabularies: tuple[Vocabulary, Vocabulary]
    lengths: Lengths
    examples: list[Example]
    filled: dict[str, float]
    truncated: dict[str, int]
    drawn: float
    asked: float

    @property
    def limits(self) -> tuple[int, int]:
        """The most inputs and targets of an example."""
        pairs = self.cutter is None and any(len(each.inputs) for each in self.examples)
        apart = pairs or isinstance(self.objective, config.SpanCorruption)
        if self.lengths.layout == "pair" or (apart and self.lengths.layout == "joined"):
            return self.lengths.inputs, self.lengths.targets
        return self.lengths.row, self.lengths.row

    @property
    def objective(self):
        return None if self.cutter is None else self.cutter.objective


def denoisers(
    cfg: config.Data, layout: str, seed: int, split: str = "train", count: int = 1000
) -> list[Denoiser]:
    """`count` examples of every task by every denoiser, as a run of this seed reads them.

    Raises ValueError as `open_batches` does.
    """
    found = batches.open_batches(cfg, layout, CHUNK, seed, split)
    which, _ = found.mixture.draw(np.arange(count))
    lengths, made = of(cfg.lengths, layout), []
    for number, (source, _) in enumerate(batches.sources(cfg, split)):
        part = found.parts[number]
        inputs, targets = source.task.vocabularies
        cutter = None
        if source.objective is not None:
            inputs, cutter = targets, objectives.cutter(source.objective, lengths, targets)
        examples, filled = taken(part, lengths, count, None if split != "train" else part.key)
        made.append(
            Denoiser(
                name=source.name,
                cutter=cutter,
                vocabularies=(inputs, targets),
                lengths=lengths,
                examples=examples,
                filled=filled,
                truncated=part.rows.shares().truncated,
                drawn=float((which == number).mean()),
                asked=float(found.mixture.shares[number]),
            )
        )
    return made


def taken(
    part: batches.Part, lengths: Lengths, count: int, key: int | None
) -> tuple[list[Example], dict[str, float]]:
    """The first `count` examples of a part, and the share of places filled in their rows."""
    examples, used, places, row = [], {}, {}, 0
    while len(examples) < count:
        batch = part.rows.batch(np.arange(row, row + CHUNK), key)
        row += CHUNK
        for side, segments in segments_of(batch).items():
            used[side] = used.get(side, 0) + int((segments > 0).sum())
            places[side] = places.get(side, 0) + segments.size
        examples += examples_of(batch)
    return examples[:count], {side: used[side] / places[side] for side in used}


def segments_of(batch: Batch) -> dict[str, np.ndarray]:
    """Segments of each side by name; a decoder alone has one row for both."""
    if batch.inputs is None:
        return {"row": batch.target_segments}
    return {"inputs": batch.input_segments, "targets": batch.target_segments}


def examples_of(batch: Batch) -> Iterator[Example]:
    """Every example of every row, in order."""
    for row in range(len(batch.targets)):
        segments, targets = batch.target_segments[row], batch.targets[row]
        weights = batch.loss_weights[row]
        for segment in range(1, int(segments.max(initial=0)) + 1):
            here = segments == segment
            if batch.inputs is None:
                first, here = here & batch.prefix[row], here & ~batch.prefix[row]
                inputs = targets[first]
            else:
                inputs = batch.inputs[row][batch.input_segments[row] == segment]
            yield Example(inputs, targets[here], weights[here] > 0)


class Noise(NamedTuple):
    """Of some examples: the share of the text that is asked for, tokens of a span of it on average
    (None where there are no spans), and the most sentinels in an example."""

    density: float
    mean_span: float | None
    sentinels: int


def noise(denoiser: Denoiser) -> Noise:
    """What was hidden, counted in the examples themselves."""
    hidden = text = spans = most = 0
    for example in denoiser.examples:
        found, whole, runs = counted(denoiser, example)
        hidden, text, spans, most = hidden + found, text + whole, spans + runs, max(most, runs)
    infills = isinstance(denoiser.objective, config.FillInTheMiddle)
    return Noise(
        density=hidden / text,
        mean_span=hidden / spans if spans else None,
        sentinels=3 if infills and denoiser.objective.marks is None else most,
    )


def counted(denoiser: Denoiser, example: Example) -> tuple[int, int, int]:
    """Tokens of the text that are asked for, all of its tokens, and the spans."""
    mode = 0 if denoiser.cutter is None else len(denoiser.cutter.mode)
    inputs, targets = len(example.inputs) - mode, len(example.targets)
    if denoiser.lengths.layout == "aligned":
        loss = example.loss.astype(int)
        return int(loss.sum()), targets - mode, int((np.diff(loss, prepend=0) == 1).sum())
    match denoiser.objective:
        case config.SpanCorruption():
            spans = int(np.isin(example.targets, denoiser.cutter.sentinels).sum())
            hidden = targets - spans - 1
            return hidden, hidden + inputs - spans - 1, spans
        case config.FillInTheMiddle():
            return targets - 1, targets - 1 + inputs - 3, 0
        case _:
            return targets, targets + inputs, 0


def asked_noise(objective) -> tuple[float | None, float | None]:
    """The density and mean span that the objective asks for; None where it names none."""
    match objective:
        case config.SpanCorruption(density, span):
            return density, span
        case config.PrefixLM(share):
            return share, None
        case config.CausalLM():
            return 1.0, None
        case _:
            return None, None


def written(vocabulary: Vocabulary, ids: np.ndarray) -> str:
    """The ids as text, with </s> wherever a text ends."""
    edges = np.flatnonzero(np.isin(ids, vocabulary.stops))
    pieces = np.split(ids, np.unique(np.concatenate([edges, edges + 1])))
    return "".join(
        "</s>" if len(piece) == 1 and piece[0] in vocabulary.stops else vocabulary.decode(piece)
        for piece in pieces
    )


def shortened(text: str, most: int) -> str:
    """The text, its middle left out where that saves something: about `most` characters."""
    half = most // 2
    told = f" [... {len(text) - 2 * half:,} characters ...] "
    return text if len(text) <= most + len(told) else text[:half] + told + text[-half:]
