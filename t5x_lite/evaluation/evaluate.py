# SPDX-License-Identifier: Apache-2.0
"""One split of a run measured: losses, predictions, their metrics, the file they are kept in."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from t5x_lite import config, processes, sharding
from t5x_lite.data import open_batches, open_dataset
from t5x_lite.decoding.tally import Tally
from t5x_lite.evaluation import losses, metrics
from t5x_lite.evaluation.predict import Prediction, Predictor


class Evaluator:
    """Measures any weights of a run on one split, which is opened once.

    kept is where the latest predictions were written; tally what drafting was worth for them.

    Raises:
      ValueError: the split is not there, or a metric's name is unknown.
    """

    def __init__(self, run: config.Run, split: str | None = None):
        self.run = run
        self.split = split or run.data.eval_split
        self.kept: Path | None = None
        self.tally = Tally()
        self.dataset = open_dataset(run.data, self.split)
        for name in run.evaluate.metrics:
            metrics.find(name)
        shards = sharding.batch_shards()
        rows = -(-run.evaluate.batch_size // shards) * shards
        host, hosts = sharding.batch_share()
        self.batches = open_batches(
            run.data,
            run.model.layout,
            rows,
            run.seed,
            split=self.split,
            host=host,
            hosts=hosts,
        )

    def __call__(
        self, params: Any, step: int, told: Callable[[int], None] | None = None
    ) -> dict[str, float]:
        """Every measure of these weights, by name; predictions are kept in the run's folder."""
        return self.losses(params) | self.predictions(params, step, told)

    def losses(self, params: Any) -> dict[str, float]:
        """Loss, perplexity, accuracy and bits per byte."""
        if not self.run.evaluate.batches:
            return {}
        vocabulary = self.dataset.vocabularies[1]
        most = self.run.evaluate.batches
        return losses.measure(self.run.model, params, self.batches, vocabulary, most)

    def predictions(
        self, params: Any, step: int, told: Callable[[int], None] | None = None
    ) -> dict[str, float]:
        """The metrics of decoded text, {} where there is no text to write: a decoder trained on
        running text, an encoder alone, or no metric at all."""
        names = self.run.evaluate.metrics or self.dataset.metrics
        count = min(len(self.dataset), self.run.evaluate.examples)
        if not count or not self.decodes() or not (names or self.own()):
            return {}
        predictor = Predictor(
            self.run.model,
            params,
            self.dataset.vocabularies,
            batch_size=self.run.evaluate.batch_size,
        )
        ids, cut = self.inputs(count)
        found = predictor.continued(ids, self.run.decode, told=told)
        self.tally = predictor.tally
        written = [each.texts[0] for each in found]
        references = [self.dataset.references(i) for i in range(count)]
        numbers = metrics.measure(names, written, references) if names else {}
        if self.own():
            numbers |= self.dataset.score(written)
        texts = [self.dataset.inputs_text(i) for i in range(count)]
        self.kept = self.keep(step, records(texts, found, references))
        counts = {"examples": count, "truncated_inputs": cut}
        return numbers | {name: float(size) for name, size in counts.items() if size}

    def inputs(self, count: int) -> tuple[list[list[int]], int]:
        """The first examples' input ids, cut as in training, and how many had to be cut."""
        most = self.run.data.lengths.get("inputs", 0)
        rows = [self.dataset.ids(i)[0].tolist() for i in range(count)]
        vocabulary = self.dataset.vocabularies[0]
        end = [vocabulary.eos] if vocabulary.ends else []
        fitting = [row if len(row) <= most else [*row[: most - len(end)], *end] for row in rows]
        return fitting, sum(len(row) > most for row in rows)

    def decodes(self) -> bool:
        """Whether the split has inputs that a text can be written for."""
        return self.run.model.decoder is not None and self.dataset.has_inputs

    def own(self) -> bool:
        """Whether no metric is named and the user's seqio task has metric functions of its own."""
        return not self.run.evaluate.metrics and any(task.score for task in self.dataset.tasks)

    def keep(self, step: int, rows: list[dict]) -> Path | None:
        """Writes predictions/<split>-<step>.jsonl; one process does."""
        if not processes.first():
            return None
        folder = Path(self.run.model_dir) / "predictions"
        return write_anew(folder / f"{self.split}-{step}.jsonl", rows)


def evaluate(run: config.Run, params: Any, step: int, split: str | None = None) -> dict[str, float]:
    """Every measure of params on a split: `Evaluator` for once."""
    return Evaluator(run, split)(params, step)


def records(
    texts: Sequence[str], found: Sequence[Prediction], references: Sequence[Sequence[str]]
) -> list[dict]:
    """Predictions as they are kept: input, prediction, references, score, and the n-best."""
    rows = []
    for text, prediction, acceptable in zip(texts, found, references, strict=True):
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
    """Writes rows as JSONL to path, or to path with a number where other content is there.

    The file appears whole or not at all.
    """
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    free, number = path, 1
    while free.exists() and free.read_text(encoding="utf-8") != content:
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    part = free.with_name(f"{free.name}.{os.getpid()}")
    part.write_text(content, encoding="utf-8")
    os.replace(part, free)
    return free
