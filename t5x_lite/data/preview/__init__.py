# SPDX-License-Identifier: Apache-2.0
"""Preview of what training reads: examples of each denoiser, their lengths, noise and rates."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from t5x_lite import config
from t5x_lite.batch import Batch
from t5x_lite.config.objectives import OF_NAMES
from t5x_lite.config.windows import LengthLimits, length_limits
from t5x_lite.data import batches, objectives
from t5x_lite.data.objectives import WindowPreprocessor
from t5x_lite.tokenizers.vocabulary import TextVocabulary
from t5x_lite.utils.not_none import not_none

CHUNK = 64  # rows in a batch


class Example(NamedTuple):
    """Ids of one example.

    Attributes:
      inputs: ids of the inputs.
      targets: ids of the targets.
      loss: whether each target bears loss.
    """

    inputs: np.ndarray
    targets: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True)
class Denoiser:
    """Examples of one part of the data: a task with one objective.

    Attributes:
      name: of the task and the objective.
      preprocessor: cuts texts into examples; None for the pairs of a task.
      vocabularies: of inputs and targets.
      lengths: limits of the config.
      examples: the first examples of the part.
      filled: share of places that are not padding, by side.
      truncated: examples of an epoch that were cut, by side.
      share: its share of the first rows of a run.
      configured_share: its share by the rates of the config.
    """

    name: str
    preprocessor: WindowPreprocessor | None
    vocabularies: tuple[TextVocabulary, TextVocabulary]
    lengths: LengthLimits
    examples: list[Example]
    filled: dict[str, float]
    truncated: dict[str, int]
    share: float
    configured_share: float

    @property
    def limits(self) -> tuple[int, int]:
        """The most inputs and targets of an example."""
        pairs = self.preprocessor is None and any(len(each.inputs) for each in self.examples)
        apart = pairs or isinstance(self.objective, config.SpanCorruption | OF_NAMES)
        if self.lengths.layout == "encoder_decoder" or (
            apart and self.lengths.layout == "decoder_only"
        ):
            return self.lengths.inputs, self.lengths.targets
        return self.lengths.row, self.lengths.row

    @property
    def objective(self) -> Any:
        """The objective of the config; None for the pairs of a task."""
        return None if self.preprocessor is None else self.preprocessor.objective


def denoisers(
    cfg: config.Data, layout: str, seed: int, split: str = "train", count: int = 1000
) -> list[Denoiser]:
    """Examples of every task by every denoiser, as a run reads them.

    Args:
      cfg: config of the data.
      layout: "encoder_decoder", "decoder_only" or "encoder_only".
      seed: of the run.
      split: split of the tasks.
      count: examples of each denoiser.

    Raises:
      ValueError: as `open_batches`.
    """
    opened = batches.open_batches(cfg, layout, CHUNK, seed, split)
    which, _ = opened.mixture.draw(np.arange(count))
    lengths, result = length_limits(cfg.lengths, layout), []
    for number, (source, _) in enumerate(batches.list_sources(cfg, split)):
        part = opened.parts[number]
        inputs, targets = source.task.vocabularies
        preprocessor = None
        if source.objective is not None:
            inputs = targets
            preprocessor = objectives.make_preprocessor(source.objective, lengths, targets)
        key = part.key if split == "train" else None
        examples, filled = read_examples(part, count, key)
        result.append(
            Denoiser(
                name=source.name,
                preprocessor=preprocessor,
                vocabularies=(inputs, targets),
                lengths=lengths,
                examples=examples,
                filled=filled,
                truncated=part.rows.epoch_counts().truncated,
                share=float((which == number).mean()),
                configured_share=float(opened.mixture.shares[number]),
            )
        )
    return result


def read_examples(
    part: batches.MixturePart, count: int, key: int | None
) -> tuple[list[Example], dict[str, float]]:
    """The first examples of a part, and the share of places filled in their rows.

    Args:
      part: rows of one task with one objective.
      count: how many examples.
      key: of the noise; None for that of evaluation.
    """
    examples, used, places, row = [], {}, {}, 0
    while len(examples) < count:
        batch = part.rows.batch(np.arange(row, row + CHUNK), key)
        row += CHUNK
        for side, segments in segments_by_side(batch).items():
            used[side] = used.get(side, 0) + int((segments > 0).sum())
            places[side] = places.get(side, 0) + segments.size
        examples += split_examples(batch)
    return examples[:count], {side: used[side] / places[side] for side in used}


def segments_by_side(batch: Batch) -> dict[str, np.ndarray]:
    """Segments of each side by name; a decoder alone has one row for both."""
    if batch.inputs is None:
        return {"row": batch.target_segments}
    return {"inputs": batch.input_segments, "targets": batch.target_segments}


def split_examples(batch: Batch) -> Iterator[Example]:
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
    """Noise of some examples.

    Attributes:
      density: share of the text that is to be predicted.
      mean_span: mean length of a hidden span in tokens; None where there are no spans.
      sentinels: the most sentinels in an example.
    """

    density: float
    mean_span: float | None
    sentinels: int


def measure_noise(denoiser: Denoiser) -> Noise:
    """The noise of a denoiser, counted in its examples."""
    hidden = text = spans = most = 0
    for example in denoiser.examples:
        counts = count_tokens(denoiser, example)
        hidden, text, spans = hidden + counts[0], text + counts[1], spans + counts[2]
        most = max(most, counts[2])
    infills = isinstance(denoiser.objective, config.FillInTheMiddle)
    return Noise(
        density=hidden / text,
        mean_span=hidden / spans if spans else None,
        sentinels=3 if infills and denoiser.objective.marks is None else most,
    )


def count_tokens(denoiser: Denoiser, example: Example) -> tuple[int, int, int]:
    """Hidden tokens of a text, all of its tokens, and the hidden spans."""
    mode = 0 if denoiser.preprocessor is None else len(denoiser.preprocessor.mode)
    inputs, targets = len(example.inputs) - mode, len(example.targets)
    if denoiser.lengths.layout == "encoder_only":
        loss = example.loss.astype(int)
        return int(loss.sum()), targets - mode, int((np.diff(loss, prepend=0) == 1).sum())
    match denoiser.objective:
        case config.SpanCorruption() | config.MaskedNames():
            spans = int(np.isin(example.targets, not_none(denoiser.preprocessor).sentinels).sum())
            hidden = targets - spans - 1
            return hidden, hidden + inputs - spans - 1, spans
        case config.FillInTheMiddle():
            return targets - 1, targets - 1 + inputs - 3, 0
        case _:
            return targets, targets + inputs, 0


def configured_noise(objective: Any) -> tuple[float | None, float | None]:
    """Density and mean span of an objective's config; None where it has none."""
    match objective:
        case config.SpanCorruption(density, span):
            return density, span
        case config.PrefixLM(share):
            return share, None
        case config.CausalLM():
            return 1.0, None
        case _:
            return None, None


def decode_with_ends(vocabulary: TextVocabulary, ids: np.ndarray) -> str:
    """Ids as text, with </s> wherever a text ends."""
    edges = np.flatnonzero(np.isin(ids, vocabulary.stops))
    pieces = np.split(ids, np.unique(np.concatenate([edges, edges + 1])))
    return "".join(
        "</s>" if len(piece) == 1 and piece[0] in vocabulary.stops else vocabulary.decode(piece)
        for piece in pieces
    )


def shorten_text(text: str, most: int) -> str:
    """A text of about `most` characters: without its middle, where that is shorter."""
    half = most // 2
    gap = f" [... {len(text) - 2 * half:,} characters ...] "
    return text if len(text) <= most + len(gap) else text[:half] + gap + text[-half:]
