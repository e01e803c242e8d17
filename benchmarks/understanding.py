# SPDX-License-Identifier: Apache-2.0
"""Which pretrained model understands functions best: a decoder, or an encoder made of it?

One decoder (configs/runs/stdlib_gemma2_tiny.gin) is pretrained on Python's standard library and
then trained on for equally many steps in three ways, each with the tokens of the others:

  decoder    as before, predicting the next token
  adapted    its layers attend in both directions; masked next-token prediction (LLM2Vec)
  pair       as an encoder-decoder, with UL2's denoisers; then the encoder alone is kept

Each is fine-tuned on three tasks of documented functions of the standard library, with the same
steps, and measured on functions that the tasks were not trained on (a fifth, by a hash):

  module     the module that a function comes from, of those with most functions: accuracy
  match      whether a docstring belongs to a function, or to another of its module: accuracy
  retrieval  the function that a docstring describes, among all: mean reciprocal rank

The functions' text is part of the pretraining of all three. Intervals are bootstraps of 95 % over
the measured functions of all seeds; differences to the decoder are paired. A run that is finished
is not run again, one that was interrupted continues.

  python benchmarks/understanding.py [--quick] [--work FOLDER] [--seeds N] [--json FILE]
      [--pretrain STEPS] [--further STEPS] [--task STEPS]
"""

import argparse
import collections
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import report
import training_runs

from t5x_lite.data import corpora

PACKAGES = ["jax", "jaxlib", "flax", "optax"]
MODULES = 20
RESAMPLES = 2000
MODELS = ("decoder", "adapted", "pair")
TASKS = ("module", "match", "retrieval")
FINETUNE = "configs/runs/finetune.gin"
DECODER = "configs/runs/stdlib_gemma2_tiny.gin"
PAIR = "configs/runs/adapt_stdlib_tiny.gin"


class Sizes(NamedTuple):
    """Steps of pretraining, of what follows, and of each task; the most functions of a task."""

    pretrain: int = 1200
    further: int = 300
    task: int = 300
    functions: int = 10**6


QUICK = Sizes(pretrain=4, further=2, task=2, functions=60)


class Function(NamedTuple):
    """A documented function: its module, source without the docstring, and docstring."""

    module: str
    source: str
    docstring: str

    @property
    def held_out(self) -> bool:
        """True for a fifth of the functions."""
        return hashlib.sha256(self.source.encode()).digest()[0] % 5 == 0


def list_functions(most: int) -> list[Function]:
    """Documented functions of the training files of the standard library, each source once."""
    functions = {}
    for name, path in corpora.stdlib_files("train"):
        module = name.removesuffix(".py").replace("/__init__", "").replace("/", ".")
        for row in corpora.documented_functions(corpora.python_text(path) or ""):
            paragraph = row.targets.partition("\n\n")[0]
            functions.setdefault(row.inputs, Function(module, row.inputs or "", paragraph))
    return list(functions.values())[:most]


def task_rows(task: str, functions: list[Function]) -> list[tuple[Function, dict]]:
    """Examples of a task, each with its function.

    Args:
      task: one of TASKS.
      functions: of the standard library.
    """
    by_module = collections.defaultdict(list)
    for function in functions:
        by_module[function.module].append(function)
    if task == "module":
        largest = sorted(by_module, key=lambda name: (-len(by_module[name]), name))[:MODULES]
        return [
            (each, {"inputs": each.source, "targets": name})
            for name in sorted(largest)
            for each in by_module[name]
        ]
    if task == "retrieval":
        return [(each, {"inputs": each.docstring, "targets": each.source}) for each in functions]
    draw, rows = random.Random(0), []
    for each in functions:
        # Of the same side of the split, so that no held-out docstring is trained on.
        others = [
            other.docstring
            for other in by_module[each.module]
            if other.docstring != each.docstring and other.held_out == each.held_out
        ]
        pairs = [("yes", each.docstring)] + ([("no", draw.choice(others))] if others else [])
        rows += [
            (each, {"inputs": f"{text}\n\n{each.source}", "targets": label})
            for label, text in pairs
        ]
    return rows


def write_tasks(folder: Path, functions: list[Function]) -> None:
    """Writes training and held-out examples of every task as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        rows = task_rows(task, functions)
        for split in ("train", "validation"):
            lines = [
                json.dumps(row) for each, row in rows if each.held_out == (split == "validation")
            ]
            (folder / f"{task}-{split}.jsonl").write_text("\n".join(lines) + "\n")


def make_models(folder: Path, sizes: Sizes) -> dict[str, Path]:
    """Trains the decoder, and what is made of it; returns the checkpoint of each model."""
    base = folder / "base"
    training_runs.finish(base, [DECODER], [f"TRAIN_STEPS={sizes.pretrain}"])
    follow = [f"TRAIN_STEPS={sizes.further}", "config.Evaluate.batches=4"]
    steady = ["config.Schedule.kind='constant'", "config.Schedule.peak=0.0005"]
    steady += ["config.Schedule.warmup=0"]
    begin = [f"INITIAL_CHECKPOINT_PATH={base}", f"config.Vocabulary.path={base}"]
    begin += ["config.Vocabulary.kind='checkpoint'", "config.Vocabulary.size=None"]
    training_runs.finish(folder / "decoder", [DECODER], [*follow, *steady, *begin])
    masked = ["config.Stack.causal=(False,)", "config.Data.objective=@config.SpanCorruption()"]
    masked += ["config.SpanCorruption.noise_density=0.2", "config.SpanCorruption.mean_span=1.0"]
    masked += ["config.SpanCorruption.mask='_'"]
    training_runs.finish(folder / "adapted", [DECODER], [*follow, *steady, *begin, *masked])
    training_runs.finish(folder / "encoder_decoder", [PAIR], [*follow, *steady, f"SOURCE={base}"])
    pair = folder / "pair"
    if not pair.exists():
        command = [sys.executable, "-m", "t5x_lite.adapt", f"--source={folder / 'encoder_decoder'}"]
        subprocess.run([*command, f"--output={pair}", "--to=encoder_only"], check=True)
    return {name: folder / name for name in MODELS}


def fine_tune(folder: Path, model: str, task: str, seed: int, steps: int) -> Path:
    """Fine-tunes a model on a task; returns the folder of the run.

    Args:
      folder: of all runs and data.
      model: one of MODELS.
      task: one of TASKS.
      seed: of the run.
      steps: of the run.
    """
    data, run = folder / "tasks", folder / f"{model}-{task}-{seed}"
    lengths = {"inputs": 64 if task == "retrieval" else 192, "targets": 192}
    bindings = [
        f"INITIAL_CHECKPOINT_PATH={folder / model}",
        f"TRAIN_FILES={data / f'{task}-train.jsonl'}",
        f"VALIDATION_FILES={data / f'{task}-validation.jsonl'}",
        f"TRAIN_STEPS={steps}",
        f"TASK_FEATURE_LENGTHS={lengths if task == 'retrieval' else lengths | {'targets': 8}}",
        f"config.Run.seed={seed}",
        # A decoder's last token has read all of the text, an encoder's tokens all have.
        f"config.Readout.pooling={'last' if model == 'decoder' else 'mean'}",
        "config.Schedule.kind='linear'",
        "config.Schedule.peak=0.0005",
        f"config.Schedule.warmup={steps // 10}",
        "config.Optimizer.name='adamw'",
        "config.Optimizer.clip_norm=1.0",
        "config.Model.dtype='float32'",
        f"config.Evaluate.every={steps}",
        "config.Evaluate.examples=100000",
        "config.Evaluate.batch_size=64",
        "config.Checkpoint.keep=1",
    ]
    files = [FINETUNE]
    if task == "retrieval":
        files.append("configs/adaptation/contrastive.gin")
        bindings += ["BATCH_SIZE=64", "config.Contrastive.symmetric=True"]
    else:
        bindings += ["BATCH_SIZE=32", "config.Model.readout=@config.Readout()"]
        bindings += ["config.Readout.kind='classes'"]
    training_runs.finish(run, files, bindings)
    return run


def scores(run: Path, task: str) -> np.ndarray:
    """A score of every held-out example of a run, in percent: right or not, or 1 / rank."""
    newest = max((run / "predictions").glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
    rows = [json.loads(line) for line in newest.read_text().splitlines()]
    if task == "retrieval":
        return np.array([100 / row["rank"] for row in rows])
    return np.array([100.0 * (row["prediction"] in row["references"]) for row in rows])


def interval(values: np.ndarray) -> tuple[float, float]:
    """Bootstrap interval of 95 % of a mean (Efron, 1979), percentiles."""
    draw = np.random.default_rng(0)
    picked = draw.integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[picked].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def rows_of(task: str, by_model: dict[str, np.ndarray], chance: float) -> list[report.Row]:
    """Rows of a task: each model's score, and its difference to the decoder.

    Args:
      task: one of TASKS.
      by_model: score of every held-out example, the mean over seeds.
      chance: score of guessing.
    """
    metric = "MRR, %" if task == "retrieval" else "accuracy, %"
    case = f"{task}, {len(by_model['decoder'])} held out"
    rows = [report.Row(case, "guessing", metric, chance)]
    for name, values in by_model.items():
        low, high = interval(values)
        note = f"95 % of bootstraps: {low:.1f} to {high:.1f}"
        rows.append(report.Row(case, name, metric, float(values.mean()), note))
        if name != "decoder":
            change = values - by_model["decoder"]
            low, high = interval(change)
            note = f"95 % of bootstraps: {low:+.1f} to {high:+.1f}"
            rows.append(report.Row(case, name, "above the decoder", float(change.mean()), note))
    return rows


def guess(folder: Path, task: str) -> float:
    """Score of guessing, in percent: the most frequent label of training, or a random order."""
    sides = {}
    for split in ("train", "validation"):
        lines = (folder / "tasks" / f"{task}-{split}.jsonl").read_text().splitlines()
        sides[split] = [json.loads(line)["targets"] for line in lines]
    if task == "retrieval":
        size = len(set(sides["validation"]))
        return 100 * sum(1 / rank for rank in range(1, size + 1)) / size
    most = collections.Counter(sides["train"]).most_common(1)[0][0]
    return 100 * float(np.mean([each == most for each in sides["validation"]]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that all runs")
    parser.add_argument("--work", default="runs/understanding", help="folder of runs and data")
    parser.add_argument("--seeds", type=int, default=1)
    for name in ("pretrain", "further", "task"):
        default = Sizes._field_defaults[name]
        parser.add_argument(f"--{name}", type=int, default=default, help=f"steps ({default})")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    sizes = Sizes(options.pretrain, options.further, options.task)
    sizes = QUICK if options.quick else sizes
    folder = Path(options.work + ("_quick" if options.quick else ""))
    write_tasks(folder / "tasks", list_functions(sizes.functions))
    make_models(folder, sizes)
    rows = []
    for task in TASKS:
        by_model = {}
        for model in MODELS:
            runs = [
                fine_tune(folder, model, task, seed, sizes.task) for seed in range(options.seeds)
            ]
            by_model[model] = np.mean([scores(run, task) for run in runs], axis=0)
        rows += rows_of(task, by_model, guess(folder, task))
        if options.json:
            report.write(options.json, rows, PACKAGES)
    print(report.table(rows))
    for row in rows:
        if row.note:
            print(f"{row.case}, {row.system}, {row.metric}: {row.value:.1f}; {row.note}")


if __name__ == "__main__":
    main()
