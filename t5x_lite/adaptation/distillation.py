# SPDX-License-Identifier: Apache-2.0
"""Batches with what a teacher is to read of them, or has answered before."""

from typing import Any, NamedTuple

import numpy as np

from t5x_lite import config, sharding
from t5x_lite.adaptation.answers import Answered
from t5x_lite.adaptation.teacher import Teacher, open_teacher
from t5x_lite.batch import Batch, Lesson
from t5x_lite.data import Batches
from t5x_lite.data.vocabularies import Vocabulary


class Reading:
    """Turns a batch, as data make it, into the rows that the teacher reads.

    A row of the teacher holds the same texts as the row of the batch, in their order. A start that
    the data give the encoder (bos) is left out where the teacher has its own.
    """

    def __init__(self, teacher: config.Model, size: int):
        self.teacher, self.size = teacher, size

    def lesson(self, batch: Batch, step: int | None = None) -> Lesson:
        """The lesson of a batch of the layouts pair and joined, numpy [b s + t] and [b t].

        Raises:
          ValueError: the batch has ids that the teacher does not know.
        """
        tokens, segments, of_inputs = side_by_side(batch)
        self.check(tokens, segments)
        if self.teacher.starts_prompts:
            first = of_inputs & (begins_of(batch) == 0) & (tokens == self.teacher.start)
            segments = np.where(first, 0, segments)
        order = np.argsort(np.where(segments > 0, segments, np.iinfo(np.int32).max), 1, "stable")
        tokens, segments, of_inputs = (
            np.take_along_axis(x, order, 1) for x in (tokens, segments, of_inputs)
        )
        positions = places_in(segments)
        targets = batch.targets.shape[1]
        places = np.argsort(order, 1)[:, -targets:]
        known = batch.target_segments > 0
        read = tokens
        if self.teacher.starts_prompts:
            # What is read at a place is the token before it.
            read = np.where(
                positions == 0, self.teacher.start, np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
            )
            of_inputs = (positions == 0) | np.pad(of_inputs, ((0, 0), (1, 0)))[:, :-1]
        else:
            known = known & (np.take_along_axis(positions, places, 1) > 0)
            places = places - 1
        used = segments > 0
        return Lesson(
            tokens=np.where(used, read, 0).astype(np.int32),
            segments=segments.astype(np.int32),
            positions=positions.astype(np.int32),
            places=np.where(known, places, 0).astype(np.int32),
            known=known,
            inside=(of_inputs & used) if self.teacher.prefix_lm else None,
        )

    def check(self, tokens: np.ndarray, segments: np.ndarray) -> None:
        strange = tokens[(segments > 0) & (tokens >= self.size)]
        if len(strange):
            raise ValueError(
                f"The data have id {strange[0]}, but Distillation.teacher knows {self.size} ids: "
                "texts for a teacher have neither sentinels nor names that were added"
            )


def side_by_side(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens and segments of inputs and then targets [b s + t], and which are of the inputs."""
    if batch.inputs is None:
        return batch.targets, batch.target_segments, batch.prefix
    of_inputs = np.zeros((1, batch.inputs.shape[1] + batch.targets.shape[1]), bool)
    of_inputs[:, : batch.inputs.shape[1]] = True
    tokens = np.concatenate([batch.inputs, batch.targets], 1)
    segments = np.concatenate([batch.input_segments, batch.target_segments], 1)
    return tokens, segments, np.broadcast_to(of_inputs, tokens.shape)


def begins_of(batch: Batch) -> np.ndarray:
    """Positions of `side_by_side`: 0 where inputs, or targets, begin."""
    if batch.inputs is None:
        return batch.target_positions
    return np.concatenate([batch.input_positions, batch.target_positions], 1)


def places_in(segments: np.ndarray) -> np.ndarray:
    """The position of each token in its segment; segments of a row never fall but to padding."""
    place = np.arange(segments.shape[1])
    begins = np.diff(segments, axis=1, prepend=-1) != 0
    return place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)


class Taught:
    """Batches of a run, each with its lesson: what `data.Batches` gives, and nothing else new."""

    def __init__(self, batches: Batches, lessons: Any):
        self.batches, self.lessons = batches, lessons

    def at(self, step: int) -> Batch:
        batch = self.batches.at(step)
        return batch._replace(lesson=self.lessons.lesson(batch, step))

    @property
    def statistics(self):
        return self.batches.statistics

    def state(self) -> dict:
        return self.batches.state()

    def restore(self, state: dict) -> None:
        self.batches.restore(state)


class School(NamedTuple):
    """A run's batches, and the teacher whose weights its steps need; None for none."""

    batches: Any
    teacher: Teacher | None


def attend(
    run: config.Run, batches: Batches, vocabularies: tuple[Vocabulary, Vocabulary]
) -> School:
    """The batches with lessons, if the run has a teacher.

    Raises:
      ValueError: the teacher, or its answers, do not suit the run.
    """
    if run.distillation is None:
        return School(batches, None)
    if run.distillation.answers is not None:
        answered = Answered(run, *sharding.batch_share())
        return School(Taught(batches, answered), None)
    teacher = open_teacher(run, vocabularies)
    return School(Taught(batches, Reading(teacher.model, teacher.size)), teacher)
