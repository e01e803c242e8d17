# SPDX-License-Identifier: Apache-2.0
"""SuperGLUE by likelihood: each task's choices are scored, and its own metrics computed."""

import collections
import json
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from t5x_lite import config
from t5x_lite.data.superglue import TASKS, SuperGlueQuestion, list_questions
from t5x_lite.evaluation.multiple_choice import score_choices
from t5x_lite.evaluation.predict import Predictor

Questions = Sequence[SuperGlueQuestion]
# Choices of questions, by number.
Chosen = Sequence[int]


class SuperGlueFile(NamedTuple):
    """A task with its file.

    Attributes:
      task: key of TASKS.
      path: the JSONL file.
    """

    task: str
    path: Path


def accuracy(questions: Questions, chosen: Chosen) -> float:
    """Percent of questions whose choice is right."""
    right = [number in each.answers for each, number in zip(questions, chosen, strict=True)]
    return 100 * sum(right) / len(right)


def f1_of_label(questions: Questions, chosen: Chosen, label: int) -> float:
    """F1 of one label, 0 to 1; 0 where neither a question nor a choice has it.

    Args:
      questions: the questions.
      chosen: their choices.
      label: number of the label.
    """
    pairs = [
        (label in each.answers, number == label)
        for each, number in zip(questions, chosen, strict=True)
    ]
    right = sum(one and other for one, other in pairs)
    return 2 * right / max(sum(one + other for one, other in pairs), 1)


def mean_f1(questions: Questions, chosen: Chosen) -> float:
    """Mean over all labels of their F1, in percent."""
    labels = range(len(questions[0].choices))
    return 100 * sum(f1_of_label(questions, chosen, each) for each in labels) / len(labels)


def answer_f1(questions: Questions, chosen: Chosen) -> float:
    """F1 of right answers over all answers of all questions, in percent (MultiRC's F1a)."""
    return 100 * f1_of_label(questions, chosen, 1)


def group_match(questions: Questions, chosen: Chosen) -> float:
    """Percent of groups all of whose choices are right (MultiRC's exact match)."""
    groups = collections.defaultdict(list)
    for each, number in zip(questions, chosen, strict=True):
        groups[each.group].append(number in each.answers)
    return 100 * sum(map(all, groups.values())) / len(groups)


def normalize_answer(text: str) -> list[str]:
    """Words of an answer as SQuAD compares them: lower case, no punctuation and no articles."""
    text = "".join(each for each in text.lower() if each not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the words that two answers share, 0 to 1."""
    one, other = normalize_answer(prediction), normalize_answer(reference)
    common = sum((collections.Counter(one) & collections.Counter(other)).values())
    return 2 * common / (len(one) + len(other)) if common else float(one == other)


def best_overlap(
    questions: Questions, chosen: Chosen, overlap: Callable[[str, str], float]
) -> float:
    """Mean overlap of choices with the nearest of the right answers, in percent.

    Args:
      questions: the questions, whose choices are entities.
      chosen: their choices.
      overlap: of two texts, 0 to 1.
    """
    values = []
    for each, number in zip(questions, chosen, strict=True):
        text = each.entities[number]
        values.append(max(overlap(text, answer) for answer in each.answer_texts))
    return 100 * sum(values) / len(values)


def entity_f1(questions: Questions, chosen: Chosen) -> float:
    """Mean F1 of the words of entities (ReCoRD's F1)."""
    return best_overlap(questions, chosen, token_f1)


def entity_match(questions: Questions, chosen: Chosen) -> float:
    """Percent of entities that are a right answer (ReCoRD's exact match)."""

    def equal(one: str, other: str) -> float:
        return float(normalize_answer(one) == normalize_answer(other))

    return best_overlap(questions, chosen, equal)


METRICS: dict[str, dict[str, Callable[[Questions, Chosen], float]]] = {
    **{name: {"accuracy": accuracy} for name in ("boolq", "copa", "rte", "wic", "wsc")},
    "cb": {"accuracy": accuracy, "f1": mean_f1},
    "multirc": {"f1a": answer_f1, "exact_match": group_match},
    "record": {"f1": entity_f1, "exact_match": entity_match},
}


def find_files(folder: Path, split: str) -> list[SuperGlueFile]:
    """Files of a split in a folder of SuperGLUE as it is downloaded: BoolQ/val.jsonl ...

    Raises:
      ValueError: there is none.
    """
    files = [
        SuperGlueFile(name, path)
        for name, task in TASKS.items()
        if (path := folder / task.folder / f"{split}.jsonl").is_file()
    ]
    names = ", ".join(f"{task.folder}/{split}.jsonl" for task in TASKS.values())
    config.require(bool(files), f"--superglue: {folder} has none of {names}, SuperGLUE's own files")
    return files


def read_questions(file: SuperGlueFile, style: str, most: int | None = None) -> Questions:
    """Questions of a file that have an answer.

    Args:
      file: the file and its task.
      style: of the prompts, t5 or plain.
      most: records that are read; None for all.

    Raises:
      ValueError: a line is broken, or no question has an answer.
    """
    questions: list[SuperGlueQuestion] = []
    with file.path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if most is not None and number > most:
                break
            try:
                questions += list_questions(file.task, json.loads(line), style)
            except ValueError as error:
                raise ValueError(f"{file.path}, line {number}: {error}") from error
    questions = [each for each in questions if each.answer_texts and each.choices]
    config.require(
        bool(questions),
        f"{file.path} has no labels, as the test files have none: measure on val.jsonl",
    )
    return questions


def measure_questions(
    predictor: Predictor,
    task: str,
    questions: Questions,
    normalize: str = "none",
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Scores the choices of a task's questions and computes its metrics, in percent.

    Args:
      predictor: the model.
      task: key of TASKS.
      questions: its questions.
      normalize: how choices are compared, as `score_choices` takes it.
      on_progress: called with the number of scored choices.
    """
    choices = [each.choices for each in questions]
    inputs = [each.input for each in questions]
    scored = score_choices(predictor, inputs, choices, normalize, on_progress=on_progress)
    chosen = [each.best for each in scored]
    values = {name: metric(questions, chosen) for name, metric in METRICS[task].items()}
    return values | {"questions": float(len(questions))}
