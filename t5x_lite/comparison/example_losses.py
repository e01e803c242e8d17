# SPDX-License-Identifier: Apache-2.0
"""Losses of a trained twin example by example, which intervals and fits draw from."""

import io
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from t5x_lite.cli.progress import Progress
from t5x_lite.config.windows import length_limits
from t5x_lite.evaluation.evaluate import Evaluator
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.not_none import not_none

# Raised by numpy for a file that is missing, truncated or none of its own.
UNREADABLE = (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


class ExampleLosses(NamedTuple):
    """Losses with teacher forcing; examples stand in the order of the split.

    Attributes:
      nats: [n] cross entropy of all targets of an example.
      tokens: [n] number of its targets.
      right: [n] 1 where the model predicts every one of them, else 0.
    """

    nats: np.ndarray
    tokens: np.ndarray
    right: np.ndarray

    def loss(self) -> float:
        """Nats per target over all examples; NaN without any."""
        count = self.tokens.sum()
        return float(self.nats.sum() / count) if count else math.nan

    def accuracy(self) -> float:
        """Percentage of examples of which every target is predicted; NaN without any."""
        return float(100 * self.right.mean()) if len(self.right) else math.nan

    def choose(self, index: Any) -> "ExampleLosses":
        """The losses of the examples that an index of numpy chooses."""
        return ExampleLosses(*(each[index] for each in self))

    def between(self, least: float, most: float) -> "ExampleLosses":
        """The losses of the examples with at least `least` and at most `most` targets."""
        return self.choose((self.tokens >= least) & (self.tokens <= most))


def example_ids(evaluator: Evaluator, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of the inputs and the targets of the first examples, truncated as in training."""
    run, vocabulary = evaluator.run, evaluator.dataset.vocabularies[1]
    inputs, _ = evaluator.inputs(count)
    most = length_limits(run.data.lengths, run.model.batch_layout).targets
    end = [vocabulary.eos] if vocabulary.ends else []
    targets = [evaluator.dataset.ids(i)[1].tolist() for i in range(count)]
    fitting = [row if len(row) <= most else [*row[: most - len(end)], *end] for row in targets]
    return inputs, fitting


def measure_examples(evaluator: Evaluator, params: Any, count: int) -> ExampleLosses:
    """Measures the first examples of a split, each in a row of its own, truncated as in training.

    Args:
      evaluator: the split, and the run whose model is measured.
      params: weights of the model.
      count: number of examples.
    """
    run, dataset = evaluator.run, evaluator.dataset
    inputs, targets = example_ids(evaluator, count)
    predictor = Predictor(
        run.model, params, dataset.vocabularies, batch_size=run.evaluate.batch_size
    )
    with Progress("losses", count) as progress:
        scores = predictor.score_ids(inputs, targets, progress)
    return ExampleLosses(
        -np.array([each.log_probability for each in scores]),
        np.array([len(row) for row in targets]),
        np.array([each.greedy for each in scores], int),
    )


def write_losses(path: Path, losses: ExampleLosses) -> None:
    """Writes losses as a .npz file."""
    file = io.BytesIO()
    np.savez_compressed(file, **losses._asdict())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, file.getvalue())


def read_losses(path: Path) -> ExampleLosses:
    """Reads what `write_losses` has written.

    Raises:
      ValueError: it is another file, or none.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return ExampleLosses(*(not_none(arrays[name]) for name in ExampleLosses._fields))
    except UNREADABLE as error:
        raise ValueError(
            f"{path} has no losses by example ({error}): remove {path.with_suffix('.json').name} "
            "beside it to measure again"
        ) from error
