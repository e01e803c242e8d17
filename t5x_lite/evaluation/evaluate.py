# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a run on one split: losses, predictions, their metrics, and their file."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5x_lite import config, processes, sharding
from t5x_lite.config.training_run import DataRun
from t5x_lite.config.windows import length_limits
from t5x_lite.data import Dataset, open_batches, open_dataset
from t5x_lite.data.batches import list_sources
from t5x_lite.decoding.acceptance.stats import AcceptanceStats
from t5x_lite.decoding.request import check_row_lengths
from t5x_lite.evaluation import (
    choosing,
    label_metrics,
    lengths,
    losses,
    metrics,
    readouts,
    retrieval,
)
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.evaluation.prediction import Prediction
from t5x_lite.model.computation import params_for_compute, with_dtype_of
from t5x_lite.tokenizers import languages
from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.not_none import not_none
from t5x_lite.utils.paths import parse_path


class Evaluator:
    """Measures weights of a run on one split, which is opened once.

    Attributes:
      run: config of the run.
      split: name of the split.
      predictions_path: file of the newest predictions; None before there are any.
      tally: acceptance of their drafts.
      label: begins the names of files of predictions, for other weights than a step's own.
      failures: metrics of the newest evaluation that failed or are not computed, with reasons.

    Raises:
      ValueError: an unknown split or metric.
    """

    def __init__(self, run: DataRun, split: str | None = None):
        self.run = run
        self.split = split or run.data.eval_split
        self.label = ""
        self.predictions_path: Path | None = None
        self.tally = AcceptanceStats()
        check_row_lengths(run.model, run.data.lengths, "The model")
        self.dataset = open_dataset(run.data, self.split)
        check_metrics(run, self.dataset)
        self.failures: dict[str, str] = {}
        shards = sharding.batch_shards()
        rows = -(-run.evaluate.batch_size // shards) * shards
        host, hosts = sharding.batch_share()
        self.batches = open_batches(
            run.data,
            run.model.batch_layout,
            rows,
            run.seed,
            split=self.split,
            host=host,
            hosts=hosts,
            model=run.model,
        )

    def __call__(
        self, params: Any, step: int, on_progress: Callable[[int], None] | None = None
    ) -> dict[str, float]:
        """Computes losses and metrics by name; writes predictions to the run's folder.

        Args:
          params: weights of the run's model.
          step: steps that they have trained.
          on_progress: called with the number of examples decoded.
        """
        if retrieval.makes_vectors(self.run.model):
            return self.search(params, step, on_progress)
        values = self.losses(params)
        # A task's own metric called "loss" does not take the place of the loss.
        return values | {
            f"task/{name}" if name in values else name: value
            for name, value in self.predictions(params, step, on_progress).items()
        }

    def search(
        self, params: Any, step: int, on_progress: Callable[[int], None] | None = None
    ) -> dict[str, float]:
        """Computes metrics of retrieval by vectors, and writes the best document of each query.

        Args:
          params: weights of the run's model.
          step: steps that they have trained.
          on_progress: called with the number of examples embedded.
        """
        if not min(len(self.dataset), self.run.evaluate.examples):
            return {}
        result = retrieval.search_split(self.run, params, self.dataset, on_progress)
        self.keep_predictions(step, result.rows)
        return result.values

    def losses(self, params: Any) -> dict[str, float]:
        """Computes loss, perplexity, accuracy and bits per byte."""
        if not self.run.evaluate.batches:
            return {}
        model, params = self.with_compute(params)
        most, vocabulary = self.run.evaluate.batches, self.dataset.vocabularies[1]
        return losses.measure_losses(model, params, self.batches, vocabulary, most)

    def losses_by_length(self, params: Any, ends: Sequence[int]) -> list[lengths.LengthBucket]:
        """Computes losses by the number of targets of a text, as `lengths.measure_lengths`."""
        model, params = self.with_compute(params)
        return lengths.measure_lengths(model, params, self.batches, ends, self.run.evaluate.batches)

    def with_compute(self, params: Any) -> tuple[config.Model, Any]:
        """The model and its weights for `Decode.compute`."""
        model, compute = self.run.model, self.run.decode.compute
        if compute == "auto":
            return model, params
        params = params_for_compute(model, params, compute)
        return with_dtype_of(model, params), params

    def predictions(
        self, params: Any, step: int, on_progress: Callable[[int], None] | None = None
    ) -> dict[str, float]:
        """Computes metrics of decoded text; {} for a decoder trained on running text, for an
        encoder-only model, and without metrics.

        Args:
          params: weights of the run's model.
          step: steps that they have trained.
          on_progress: called with the number of examples decoded.
        """
        if self.run.model.readout is not None:
            return self.readout_values(params, step, on_progress)
        names = self.run.evaluate.metrics or self.dataset.metrics
        self.failures = {} if self.run.evaluate.metrics else self.dataset.unsupported_metrics
        count = min(len(self.dataset), self.run.evaluate.examples)
        if not count or not self.has_predictions() or not (names or self.uses_task_metrics()):
            return {}
        predictor = Predictor(
            self.run.model,
            params,
            self.dataset.vocabularies,
            batch_size=self.run.evaluate.batch_size,
        )
        predictor.find_chooser(self.run.decode)
        ids, cut = self.inputs(count)
        predictions = self.decode_inputs(predictor, self.run.decode, ids, on_progress)
        texts = [not_none(self.dataset.inputs_text(i)) for i in range(count)]
        predictions = predictor.order_texts(texts, predictions, self.run.decode)
        self.tally = predictor.tally
        written = [each.texts[0] for each in predictions]
        references = [self.dataset.references(i) for i in range(count)]
        values = self.measure(names, written, references)
        if self.run.decode.n_best > 1:
            for name in set(names) - self.failures.keys():
                values |= choosing.measure_choice(name, predictions, references)
        self.keep_predictions(step, prediction_rows(texts, predictions, references))
        counts = {"examples": count, "truncated_inputs": cut}
        return values | {name: float(size) for name, size in counts.items() if size}

    def readout_values(
        self, params: Any, step: int, on_progress: Callable[[int], None] | None
    ) -> dict[str, float]:
        """Computes metrics of labels, numbers or tags.

        Args:
          params: weights of the run's model.
          step: steps that they have trained.
          on_progress: called with the number of examples done.
        """
        self.failures, names = {}, label_metric_names(self.run)
        count = min(len(self.dataset), self.run.evaluate.examples)
        if not count or not names:
            return {}
        vocabularies, size = self.dataset.vocabularies, self.run.evaluate.batch_size
        predictor = Predictor(self.run.model, params, vocabularies, batch_size=size)
        ids, cut = self.inputs(count)
        texts = [not_none(self.dataset.inputs_text(i)) for i in range(count)]
        references = [self.dataset.references(i)[0] for i in range(count)]
        predictions = readouts.predict_readouts(predictor, texts, ids, on_progress)
        outputs = readouts.collect_outputs(predictor, predictions, texts, references)
        values, self.failures = label_metrics.measure_labels(names, outputs)
        rows = [
            {"input": text}
            | readouts.prediction_fields(each)
            | {"prediction": readouts.prediction_text(each), "references": [right]}
            for text, right, each in zip(texts, references, predictions, strict=True)
        ]
        self.keep_predictions(step, rows)
        counts = {"examples": count, "truncated_inputs": cut}
        return values | {name: float(size) for name, size in counts.items() if size}

    def measure(
        self, names: Sequence[str], written: list[str], references: list[list[str]]
    ) -> dict[str, float]:
        """Computes metrics of texts; one that fails is noted in `failures`, the others count.

        Args:
          names: keys of metrics.METRICS.
          written: predictions.
          references: acceptable answers of each.
        """
        values: dict[str, float] = {}
        for name in names:
            try:
                values |= metrics.measure_metrics([name], written, references)
            except (Exception, SystemExit) as error:  # in sacrebleu and rouge_score too
                self.failures[name] = processes.describe_error(error)
        if self.uses_task_metrics():
            scores = self.dataset.score(written)
            values |= scores.values
            self.failures |= scores.failures
        return values

    def inputs(self, count: int) -> tuple[list[list[int]], int]:
        """Input ids of the first examples, truncated as in training; counts truncated ones."""
        limits = length_limits(self.run.data.lengths, self.run.model.batch_layout)
        most = limits.row if limits.layout == "encoder_only" else limits.inputs
        rows = [not_none(self.dataset.ids(i)[0]).tolist() for i in range(count)]
        vocabulary = self.dataset.vocabularies[0]
        end = [vocabulary.eos] if vocabulary.ends else []
        fitting = [row if len(row) <= most else [*row[: most - len(end)], *end] for row in rows]
        return fitting, sum(len(row) > most for row in rows)

    def decode_inputs(
        self,
        predictor: Predictor,
        decode: config.Decode,
        ids: Sequence[Sequence[int]],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Prediction]:
        """Predicts from inputs, each in the languages of its task.

        Args:
          predictor: the model.
          decode: config of decoding.
          ids: ids of the first examples.
          on_progress: called with the number of examples decoded.
        """
        predictions: list[Prediction] = []
        for places, task in self.dataset.list_languages(len(ids)):
            first = languages.first_token(task.vocabularies[1])
            spoken = decode
            if first is not None:
                predictor.inputs, predictor.targets = task.vocabularies
                spoken = dataclasses.replace(decode, forced_bos_token_id=first)
            report = on_progress and functools.partial(add_progress, on_progress, places.start)
            rows = [ids[place] for place in places]
            predictions += predictor.predict_ids(rows, spoken, rows=places, on_progress=report)
        return predictions

    def has_predictions(self) -> bool:
        """True if the model writes text and the split has inputs for it."""
        return has_predictions(self.run, self.dataset)

    def uses_task_metrics(self) -> bool:
        """True if no metric is named and the user's seqio task has metric functions."""
        return uses_task_metrics(self.run, self.dataset)

    def keep_predictions(self, step: int, rows: list[dict]) -> None:
        """Writes predictions; a failure is noted, as numbers are worth more than texts."""
        try:
            self.predictions_path = self.write_predictions(step, rows)
        except OSError as error:
            self.failures["predictions"] = f"their file could not be written: {error}"

    def write_predictions(self, step: int, rows: list[dict]) -> Path | None:
        """Writes predictions/<split>-<step>.jsonl, on the first process."""
        if not processes.is_first():
            return None
        folder = parse_path(self.run.model_dir) / "predictions"
        return write_anew(folder / f"{self.label}{self.split}-{step}.jsonl", rows)


def add_progress(on_progress: Callable[[int], None], before: int, count: int) -> None:
    """Reports `count` examples that are done after `before` others.

    Args:
      on_progress: called with the number of examples decoded.
      before: examples of earlier tasks.
      count: examples of this one.
    """
    on_progress(before + count)


def check_metrics(run: config.Run, dataset: Dataset) -> None:
    """Raises ValueError for the name of an unknown metric of the run, or of its task."""
    if retrieval.makes_vectors(run.model):
        retrieval.choose_metrics(run)
        return
    if run.model.readout is not None:
        label_metrics.check_label_metrics(label_metric_names(run), run.model.readout)
        return
    for name in (*run.evaluate.metrics, *dataset.metrics):
        metrics.find_metric(name)


def label_metric_names(run: config.Run) -> list[str]:
    """Names of the metrics of a run with Model.readout: those that it names, or all of its kind."""
    return list(run.evaluate.metrics) or label_metrics.metric_names(not_none(run.model.readout))


def has_predictions(run: config.Run, dataset: Dataset) -> bool:
    """True if the model writes text and the split has inputs for it."""
    writes = run.model.writes and run.model.decoder is not None and run.model.causal_decoder
    return writes and dataset.has_inputs


def uses_task_metrics(run: config.Run, dataset: Dataset) -> bool:
    """True if no metric is named and the user's seqio task has metric functions."""
    return not run.evaluate.metrics and any(task.score for task in dataset.tasks)


def measured_names(run: DataRun, dataset: Dataset) -> list[str] | None:
    """Names of all that `Evaluator` measures; None where functions of the user name it."""
    names = []
    if retrieval.makes_vectors(run.model):
        best = [np.ones(1)]
        return [*retrieval.measure_retrieval(retrieval.choose_metrics(run), best)]
    if run.model.readout is not None:
        names += losses.READOUT_NAMES if run.evaluate.batches else []
        return names + (label_metric_names(run) if run.evaluate.examples else [])
    if run.evaluate.batches:
        names += losses.NAMES
        sources = [source.name for source, _ in list_sources(run.data, dataset.split)]
        names += [f"loss/{name}" for name in sources if len(sources) > 1]
    if run.evaluate.examples and has_predictions(run, dataset):
        if uses_task_metrics(run, dataset):
            return None
        # Each metric names its values itself, those of a single prediction too.
        named = run.evaluate.metrics or dataset.metrics
        names += metrics.measure_metrics(named, ["a"], [["a"]]) if named else []
    return names


def evaluate(run: DataRun, params: Any, step: int, split: str | None = None) -> dict[str, float]:
    """Computes losses and metrics of weights on a split, as `Evaluator` does.

    Args:
      run: config of the run.
      params: weights of its model.
      step: steps that they have trained.
      split: name of the split; Data.eval_split by default.
    """
    return Evaluator(run, split)(params, step)


def prediction_rows(
    texts: Sequence[str], predictions: Sequence[Prediction], references: Sequence[Sequence[str]]
) -> list[dict]:
    """Rows of a predictions file: input, prediction, references, score, and the n-best.

    Args:
      texts: inputs.
      predictions: one for each input.
      references: acceptable answers of each.
    """
    rows = []
    for text, prediction, acceptable in zip(texts, predictions, references, strict=True):
        row = {
            "input": text,
            "prediction": prediction.texts[0],
            "references": list(acceptable),
            "score": round(prediction.scores[0], 4),
        }
        if len(prediction.texts) > 1:
            row["others"] = prediction.texts[1:]
        rows.append(row)
    return rows


def write_anew(path: Path, rows: list[dict]) -> Path:
    """Writes rows as JSONL to path, or to path with a number if it has other content.

    The file is written atomically.
    """
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    free, number = path, 1
    while free.exists() and free.read_text(encoding="utf-8") != content:
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    write_atomically(free, content)
    return free
