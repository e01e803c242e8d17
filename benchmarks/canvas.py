# SPDX-License-Identifier: Apache-2.0
"""Masked blocks beside text that is written from left to right: error, passes and time.

The model of configs/runs/g2p.gin is trained autoregressively, with draft heads, and with canvases:
the whole word (masked diffusion), blocks of 4 (E2D2-like) and in one pass; with --docstrings also
that of configs/runs/stdlib_docstrings.gin and its canvases. All train with equal parameters and
steps. Each then writes held-out texts, canvases in 1, 2, 4 and 8 passes over a block and by
confidence. The loss of a canvas is a bound of the negative log-likelihood.

  python benchmarks/canvas.py [--folder runs/canvas] [--steps 20000] [--texts 1000] [--seeds 1]
      [--systems autoregressive canvas ...] [--docstrings] [--json FILE]

What was trained or measured before is not done again: the same command goes on after an
interruption. t5x_lite has to be installed (`pip install -e .`).
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import jax
import report
import training_runs

from t5x_lite import config, data, interactive
from t5x_lite.checkpoints.opening import open_checkpoint
from t5x_lite.checkpoints.run_folder import read_run_config
from t5x_lite.evaluation import metrics
from t5x_lite.evaluation.evaluate import Evaluator

PACKAGES = ["jax", "jaxlib", "flax", "optax"]
CANVAS = "config.Model.canvas=@config.Canvas()"
ONE_PASS = "config.Canvas.rates=(1.0, 1.0)"
BATCHES, TURNS = (1, 32), 5


class Task(NamedTuple):
    """A run file, and the systems that train with it: files and bindings by name.

    Attributes:
      file: the autoregressive run.
      block: tokens of the whole canvas.
      metrics: names of the metrics.
    """

    file: str
    block: int
    metrics: tuple[str, ...]

    def systems(self) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """Files and bindings of each system."""
        whole = (CANVAS, f"config.Canvas.block={self.block}")
        plain = ((self.file,), ())
        heads = ((self.file, "configs/heads/multi_token.gin"), ())
        return {
            "autoregressive": plain,
            "draft heads": heads,
            "canvas": ((self.file,), whole),
            "blocks": ((self.file,), (CANVAS, "config.Canvas.block=4")),
            "one pass": ((self.file,), (*whole, ONE_PASS)),
        }


TASKS = {
    "g2p": Task("configs/runs/g2p.gin", 24, ("per", "wer")),
    "docstrings": Task("configs/runs/stdlib_docstrings.gin", 256, ("chrf",)),
}
SYSTEMS = tuple(TASKS["g2p"].systems())


class Study(NamedTuple):
    """A system of a task with a seed.

    Attributes:
      task: key of TASKS.
      system: one of SYSTEMS.
      seed: of weights and data order.
    """

    task: str
    system: str
    seed: int

    @property
    def case(self) -> str:
        """The case of its rows."""
        return f"{self.task}, seed {self.seed}"

    def folder(self, options: argparse.Namespace) -> Path:
        """Folder of the run."""
        name = f"{self.task}-{self.system.replace(' ', '_')}-{options.steps}-{self.seed}"
        return options.folder / name

    def train(self, options: argparse.Namespace) -> Path:
        """Trains the run to its end, unless it was; returns its folder."""
        folder, task = self.folder(options), TASKS[self.task]
        files, bindings = task.systems()[self.system]
        bound = [f"TRAIN_STEPS={options.steps}", f"config.Run.seed={self.seed}"]
        bound += [f"config.Schedule.warmup={max(1, options.steps // 20)}"]
        bound += ["config.Evaluate.every=0", "config.Checkpoint.metric=None"]
        training_runs.finish(folder, files, [*bound, *bindings])
        return folder


def policies(cfg: config.Model, whole: int) -> dict[str, dict]:
    """Fields of Decode by name: the numbers of passes of a canvas.

    Args:
      cfg: config of the model.
      whole: tokens of the whole canvas of the task.
    """
    if cfg.canvas is None:
        return {"": {}}
    block = cfg.canvas.block
    if cfg.canvas.rates[0] == 1:
        return {"": {"commit": f"top:{whole}"}}
    passes = [count for count in (1, 2, 4, 8) if count <= block]
    fixed = {f", {count} passes": {"commit": f"top:{-(-block // count)}"} for count in passes}
    return fixed | {", threshold 0.9": {"commit": "threshold:0.9"}}


def measure_study(study: Study, folder: Path, options: argparse.Namespace) -> list[report.Row]:
    """The rows of one run: loss, errors, passes and time of each policy."""
    task = TASKS[study.task]
    session = interactive.load(folder)
    run = data.with_run_vocabulary(read_run_config(folder))
    losses = Evaluator(run).losses(open_checkpoint(folder).load(config.Mesh()).params)
    rows = [
        report.Row(study.case, study.system, f"{name} of the validation split", losses[name])
        for name in ("loss", "bits_per_byte")
    ]
    examples = data.open_dataset(run.data, "test")
    count = min(options.texts, len(examples))
    inputs = [examples.inputs_text(i) for i in range(count)]
    references = [examples.references(i) for i in range(count)]
    for name, fields in policies(run.model, task.block).items():
        decode = dataclasses.replace(session.decode, **fields)
        predictions = session.predictor.predict(inputs, decode)
        texts = [each.texts[0] for each in predictions]
        values = metrics.measure_metrics(task.metrics, texts, references)
        # The pass that wrote the last token; of a text without tokens there is none.
        values["passes per text"] = statistics.mean(
            1 + max(each.calls, default=0) for each in predictions
        )
        values |= measure_time(session.predictor, inputs, decode)
        system = f"{study.system}{name}"
        rows += [report.Row(study.case, system, metric, value) for metric, value in values.items()]
    return rows


def measure_time(predictor, inputs, decode: config.Decode) -> dict[str, float]:
    """Median milliseconds per text, and tokens per second, at each size of a batch."""
    values = {}
    for size in BATCHES:
        predictor.batch_size = size
        some, times = list(inputs[:size]), []
        count = sum(len(each.tokens[0]) for each in predictor.predict(some, decode))
        for _ in range(TURNS):
            begin = time.perf_counter()
            predictor.predict(some, decode)
            times.append(time.perf_counter() - begin)
        taken = statistics.median(times)
        values[f"ms per text, batch {size}"] = 1000 * taken / len(some)
        values[f"tokens per second, batch {size}"] = count / taken
    predictor.batch_size = 64
    return values


def kept_rows(study: Study, options: argparse.Namespace) -> list[report.Row]:
    """The rows of a study, measured once: the file beside its run has them from then on."""
    folder = study.train(options)
    file = folder / f"canvas_{options.texts}.json"
    if not file.exists():
        report.write(file, measure_study(study, folder, options), PACKAGES)
        jax.clear_caches()
    return [report.Row(**row) for row in json.loads(file.read_text())["rows"]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/canvas"), help="where to train")
    parser.add_argument("--steps", type=int, default=20000, help="steps of each training")
    parser.add_argument("--texts", type=int, default=1000, help="held-out texts that are written")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each system")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--docstrings", action="store_true", help="functions to docstrings too")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    rows: list[report.Row] = []
    for task in ("g2p", "docstrings") if options.docstrings else ("g2p",):
        for system in options.systems:
            for seed in range(options.seeds):
                rows += kept_rows(Study(task, system, seed), options)
                if options.json:
                    report.write(options.json, rows, PACKAGES)
    print(report.table(rows))


if __name__ == "__main__":
    main()
