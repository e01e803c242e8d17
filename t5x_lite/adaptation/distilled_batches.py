# SPDX-License-Identifier: Apache-2.0
"""Batches of a run with the rows of its teacher, or with its saved logits."""

from typing import Any, NamedTuple

import numpy as np

from t5x_lite import config, sharding
from t5x_lite.adaptation.teacher import Teacher, open_teacher
from t5x_lite.adaptation.teacher_logits import SavedTeacherLogits
from t5x_lite.batch import Batch, TeacherBatch
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.data import Batches
from t5x_lite.tokenizers.vocabulary import TextVocabulary


class TeacherBatchBuilder:
    """Builds the rows that the teacher reads from a batch of the data.

    A row of the teacher has the same texts as the row of the batch, in their order. Hidden spans
    stand where they were hidden: the teacher reads the text before the spans were taken out, and
    has no distribution for sentinels and ends, whose targets are one-hot (T5Gemma 2, section 3.1).
    A start token of the encoder's inputs (bos) is left out if the teacher has its own.

    Attributes:
      teacher: model of the teacher.
      size: number of ids with logits of the teacher.
      vocabulary: of the run's targets, whose sentinels mark hidden spans; None for texts without.
    """

    def __init__(self, teacher: config.Model, size: int, vocabulary: TextVocabulary | None = None):
        self.teacher, self.size, self.vocabulary = teacher, size, vocabulary

    def teacher_data(self, batch: Batch, step: int | None = None) -> TeacherBatch:
        """The teacher rows of a batch of the layouts pair and joined, numpy [b s + t] and [b t].

        Raises:
          ValueError: the batch has ids that the teacher does not know.
        """
        tokens, segments, of_inputs = concatenate_parts(batch)
        order, added = self.restore_order(tokens, segments, of_inputs)
        segments = np.where(added, 0, segments)
        self.check_ids(tokens, segments)
        if self.teacher.add_bos:
            first = (
                of_inputs
                & (start_positions(batch) == 0)
                & (tokens == self.teacher.decoder_start_token_id)
            )
            segments = np.where(first, 0, segments)
        # Segments first; in each of them the order of the text.
        order = order + segments.astype(np.int64) * (order.max(initial=0) + 1)
        order = np.argsort(np.where(segments > 0, order, np.iinfo(np.int64).max), 1, "stable")
        tokens, segments, of_inputs = (
            np.take_along_axis(x, order, 1) for x in (tokens, segments, of_inputs)
        )
        positions = segment_positions(segments)
        targets = batch.targets.shape[1]
        places = np.argsort(order, 1)[:, -targets:]
        known = segments_of_targets(batch, added) > 0
        read = tokens
        if self.teacher.add_bos:
            # The decoder's input at a position is the token before it.
            read = np.where(
                positions == 0,
                self.teacher.decoder_start_token_id,
                np.pad(tokens, ((0, 0), (1, 0)))[:, :-1],
            )
            of_inputs = (positions == 0) | np.pad(of_inputs, ((0, 0), (1, 0)))[:, :-1]
        else:
            known = known & (np.take_along_axis(positions, places, 1) > 0)
            places = places - 1
        used = segments > 0
        return TeacherBatch(
            tokens=np.where(used, read, 0).astype(np.int32),
            segments=segments.astype(np.int32),
            positions=positions.astype(np.int32),
            places=np.where(known, places, 0).astype(np.int32),
            known=known,
            inside=(of_inputs & used) if self.teacher.prefix_lm else None,
        )

    def restore_order(
        self, tokens: np.ndarray, segments: np.ndarray, of_inputs: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The place of each token in its text before spans were hidden, and a mask of the tokens
        that hiding has added: sentinels, and ends of what has some. Both [b s + t].

        Args:
          tokens: ids of inputs and targets [b s + t].
          segments: numbers of their texts.
          of_inputs: true for tokens of the inputs.
        """
        if self.vocabulary is None or not len(self.vocabulary.sentinel_ids):
            # All inputs, and then all targets.
            return np.where(of_inputs, 0, 1), np.zeros(tokens.shape, bool)
        sentinel = np.isin(tokens, self.vocabulary.sentinel_ids) & (segments > 0)
        spans = count_in_runs(sentinel, 2 * segments + of_inputs)
        # A span of the targets stands behind what is before its sentinel in the inputs, and before
        # what follows it there; targets before any sentinel go on from all inputs.
        place = 3 * spans + np.where(of_inputs, 1, np.where(spans > 0, 0, 2))
        return place, sentinel | ((tokens == self.vocabulary.eos) & (spans > 0))

    def check_ids(self, tokens: np.ndarray, segments: np.ndarray) -> None:
        """Raises ValueError if the tokens have ids that the teacher lacks."""
        strange = tokens[(segments > 0) & (tokens >= self.size)]
        if len(strange):
            raise ValueError(
                f"The data have id {strange[0]}, but Distillation.teacher knows {self.size} ids: "
                "texts for a teacher have no names that were added"
            )


def concatenate_parts(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, segments and a mask of the inputs [b s + t]: inputs first, then targets."""
    if batch.inputs is None:
        return batch.targets, batch.target_segments, batch.prefix
    of_inputs = np.zeros((1, batch.inputs.shape[1] + batch.targets.shape[1]), bool)
    of_inputs[:, : batch.inputs.shape[1]] = True
    tokens = np.concatenate([batch.inputs, batch.targets], 1)
    segments = np.concatenate([batch.input_segments, batch.target_segments], 1)
    return tokens, segments, np.broadcast_to(of_inputs, tokens.shape)


def segments_of_targets(batch: Batch, added: np.ndarray) -> np.ndarray:
    """Segments of the targets [b t], 0 for those that hiding has added (`added` [b s + t])."""
    length = batch.targets.shape[1]
    return np.where(added[:, -length:], 0, batch.target_segments)


def count_in_runs(mask: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """Number of true values so far in the run of equal numbers that each place is in [b t].

    Args:
      mask: what is counted [b t].
      runs: numbers that are equal within a run [b t].
    """
    total = np.cumsum(mask, axis=1)
    begins = np.diff(runs, axis=1, prepend=-1) != 0
    before = np.where(begins, total - mask, 0)
    return total - np.maximum.accumulate(before, axis=1)


def start_positions(batch: Batch) -> np.ndarray:
    """Positions [b s + t] in the order of `concatenate_parts`: 0 where inputs or targets begin."""
    if batch.inputs is None:
        return batch.target_positions
    return np.concatenate([batch.input_positions, batch.target_positions], 1)


def segment_positions(segments: np.ndarray) -> np.ndarray:
    """Position of each token in its segment; segments of a row ascend, padding (0) comes last."""
    place = np.arange(segments.shape[1])
    begins = np.diff(segments, axis=1, prepend=-1) != 0
    return place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)


class DistilledBatches:
    """Batches of a run, each with its `teacher_data`; otherwise those of `data.Batches`.

    Attributes:
      batches: batches of the data.
      teacher_source: a TeacherBatchBuilder or SavedTeacherLogits.
    """

    def __init__(self, batches: Batches, teacher_source: Any):
        self.batches, self.teacher_source = batches, teacher_source

    def at(self, step: int) -> Batch:
        """The batch of a step."""
        batch = self.batches.at(step)
        return batch._replace(teacher_data=self.teacher_source.teacher_data(batch, step))

    @property
    def statistics(self):
        """Statistics of packing."""
        return self.batches.statistics

    def state(self) -> dict:
        return self.batches.state()

    def restore(self, state: dict) -> None:
        self.batches.restore(state)


class DistillationData(NamedTuple):
    """Batches of a run, and the teacher with the weights that its steps need; None without one."""

    batches: Any
    teacher: Teacher | None


def make_distilled_batches(
    run: TrainingRun, batches: Batches, vocabularies: tuple[TextVocabulary, TextVocabulary]
) -> DistillationData:
    """Adds the rows or the saved logits of the teacher to batches, if the run has one.

    Args:
      run: config of the run.
      batches: batches of the data.
      vocabularies: of inputs and of targets.

    Raises:
      ValueError: the teacher, or its saved logits, do not match the run.
    """
    source = check_teacher(run, vocabularies)
    if source is None:
        return DistillationData(batches, None)
    if isinstance(source, SavedTeacherLogits):
        return DistillationData(DistilledBatches(batches, source), None)
    return DistillationData(
        DistilledBatches(batches, make_builder(source, vocabularies[1])), source
    )


def make_builder(teacher: Teacher, vocabulary: TextVocabulary) -> TeacherBatchBuilder:
    """The builder of a teacher's rows; `vocabulary` is that of the run's targets."""
    return TeacherBatchBuilder(teacher.model, teacher.size, vocabulary)


def check_teacher(
    run: TrainingRun, vocabularies: tuple[TextVocabulary, TextVocabulary]
) -> Teacher | SavedTeacherLogits | None:
    """Opens the teacher of a run, or its saved logits; reads no weight. None without a teacher.

    Raises:
      ValueError: they do not match the run.
    """
    if run.distillation is None:
        return None
    if run.distillation.answers is not None:
        return SavedTeacherLogits(run, *sharding.batch_share())
    return open_teacher(run, vocabularies)
