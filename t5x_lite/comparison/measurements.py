# SPDX-License-Identifier: Apache-2.0
"""The record of a comparison: twins trained and measured; finished parts are kept."""

import dataclasses
import json
import platform
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp

from t5x_lite import config, data, decoding
from t5x_lite.checkpoints import averaging, weights
from t5x_lite.checkpoints.opening import open_checkpoint
from t5x_lite.cli.progress import format_duration
from t5x_lite.comparison import costs, quality, speed, taken, train_twins, twins
from t5x_lite.config import aliases
from t5x_lite.config.training_run import ComparisonRun, TrainingRun
from t5x_lite.training.reporting import metric_writers
from t5x_lite.training.reporting.run_report import REPORT
from t5x_lite.utils import bounded_files
from t5x_lite.utils.atomic_files import write_atomically


def describe_twin(run: ComparisonRun, twin: twins.Twin) -> dict:
    """The row of a twin in the report: its size, steps and FLOPs."""
    lengths = costs.Lengths(*costs.example_lengths(run.data).mean(axis=0).tolist())
    model = twin.model
    assert model.decoder is not None
    return {
        "name": twin.name,
        "encoder_layers": model.encoder.layers if model.encoder else 0,
        "decoder_layers": model.decoder.layers,
        "mlp": model.decoder.mlp,
        "parameters": twin.parameters,
        "off": twin.off,
        "steps": twin.steps,
        "pretraining_steps": twin.pretraining_steps,
        "matched": twin.matched,
        "taken": list(twin.taken),
        "training_flops": costs.training_flops(model, lengths),
        "inference_flops": costs.inference_flops(model, lengths),
    }


def measure_twins(
    run: ComparisonRun, family: list[twins.Twin], record: dict, modules: list[str]
) -> dict:
    """Trains and measures the twins, except for finished parts.

    Args:
      run: config of the comparison.
      family: the twins.
      record: the beginning of the record, with a row per twin.
      modules: Python modules that training imports first.

    Returns:
      The complete record, the input of `report.write_report`.
    """
    cfg = run.compare
    pairs = [(twin, seed) for seed in range(cfg.seeds) for twin in family]
    runs = {(twin.name, seed): twins.twin_run(run, twin, seed) for twin, seed in pairs}
    before = [twins.pretraining_run(run, *pair) for pair in pairs]
    trained = train_runs(cfg, [each for each in before if each is not None], runs, modules)
    names = [twin.name for twin in family]
    stages = Stages("measuring", len(runs))
    qualities = {
        name: [
            measure_quality(run, runs[name, seed], name, seed, stages) for seed in range(cfg.seeds)
        ]
        for name in names
    }
    lengths, most = costs.example_lengths(run.data), run.data.lengths
    task = data.open_dataset(run.data, cfg.split)
    return record | {
        "task": task.name,
        "split": cfg.split,
        "examples": min(cfg.examples, len(task)),
        "seeds": cfg.seeds,
        "machine": machine(),
        "versions": versions(),
        "training": trained,
        "curves": {
            name: [loss_curve(runs[name, seed].model_dir) for seed in range(cfg.seeds)]
            for name in names
        },
        "quality": qualities,
        "metrics": shown_metrics(qualities),
        "speed": measure_speed(run, [runs[name, 0] for name in names], names)
        if cfg.repeats
        else [],
        "memory": memory_table(family, cfg),
        "padding": costs.padding_shares(lengths, (most["inputs"], most["targets"]), 32),
    }


def train_runs(
    cfg: config.Compare, before: list[TrainingRun], runs: dict, modules: list[str]
) -> list[dict]:
    """Trains the runs of twins, but for those whose checkpoints are taken.

    Args:
      cfg: config of the comparison.
      before: runs of pretraining, which come first.
      runs: runs by (twin, seed).
      modules: Python modules that training imports first.

    Returns:
      A row per run with its seconds, None where these are unknown.
    """
    stages = Stages("training", len(before) + len(runs))

    def train(name: str, each: TrainingRun) -> dict:
        here = name not in cfg.trained
        stages.begin(each.model_dir, here and not (Path(each.model_dir) / REPORT).exists())
        return train_twins.train_twin(each, modules) if here else taken.read_report(each.model_dir)

    map_side_by_side(train, [("", each) for each in before], cfg.processes)
    reports = map_side_by_side(train, [(key[0], runs[key]) for key in runs], cfg.processes)
    return [
        {"twin": name, "seed": seed, "seconds": report.get("train_seconds")}
        for (name, seed), report in zip(runs, reports, strict=True)
    ]


def map_side_by_side(
    work: Callable[..., dict], pieces: Sequence[tuple], at_once: int
) -> list[dict]:
    """Results of work(*piece) in the order of the pieces; a failure ends what has not begun.

    Args:
      work: a function that waits for a process.
      pieces: arguments of each call.
      at_once: calls at once, each in a thread; 1 is this thread.
    """
    if at_once == 1:
        return [work(*piece) for piece in pieces]
    pool = futures.ThreadPoolExecutor(at_once)
    try:
        pending = [pool.submit(work, *piece) for piece in pieces]
        futures.wait(pending, return_when=futures.FIRST_EXCEPTION)
        failed = [each for each in pending if each.done() and each.exception()]
        return [each.result() for each in failed or pending]
    finally:
        pool.shutdown(cancel_futures=True)


def measure_quality(
    run: ComparisonRun, trained: TrainingRun, name: str, seed: int, stages: "Stages"
) -> dict:
    """Metrics of a trained twin, kept in measured/; the folder of the twin is only read.

    Args:
      run: config of the comparison.
      trained: config of the twin's run.
      name: name of the twin.
      seed: its seed.
      stages: reports what is measured.
    """
    path = Path(run.model_dir) / "measured" / f"{name}-{seed}.json"
    cfg = run.compare
    request = [cfg.split, cfg.examples, cfg.decoded, list(cfg.drafters), list(cfg.quantized)]
    request += [cfg.inspected]
    request += [trained.model_dir] if name in cfg.trained else []
    kept = read_measured(path)
    stages.begin(trained.model_dir, kept.get("asked") != request)
    if kept.get("asked") == request:
        return kept
    best = trained.checkpoint.metric is not None and name not in cfg.trained
    opened = open_checkpoint(trained.model_dir, best=best)
    restored = opened.load()
    params, step = restored.params, restored.step
    if name == "averaged":
        copies = averaging.select_weights(opened, averaged=True)
        params = weights.place_weights(copies, opened.model)
    folder = str(Path(run.model_dir) / f"{name}-{seed}")
    here = dataclasses.replace(data.with_run_vocabulary(trained), model_dir=folder)
    keep = losses_path(run, name, seed)
    metrics = quality.evaluate_twin(here, params, step, cfg, keep)
    metrics["drafted"] = quality.measure_drafters(here, params, cfg)
    metrics["quantized"] = quality.measure_quantized(here, params, step, cfg)
    metrics["inside"] = quality.inspect_twin(here, params, cfg)
    return write_measured(path, {"asked": request, "step": step, **metrics})


def losses_path(run: ComparisonRun, name: str, seed: int) -> Path:
    """File of a trained twin's losses by example.

    Args:
      run: config of the comparison.
      name: name of the twin.
      seed: its seed.
    """
    return Path(run.model_dir) / "measured" / f"{name}-{seed}.npz"


def read_measured(path: Path) -> dict:
    """The content of a file of measured/, names of earlier versions replaced; {} without one.

    Raises:
      ValueError: it is another file.
    """
    if not path.exists():
        return {}
    kept = aliases.rename_keys(bounded_files.read_json_object(path), "Compare")
    if "asked" not in kept:
        raise ValueError(f"{path} is not a file of measurements: remove it to measure again")
    if isinstance(kept["asked"], dict):
        kept["asked"] = aliases.rename_keys(kept["asked"], "Compare")
    return kept


def write_measured(path: Path, content: dict) -> dict:
    """Writes a file of measured/; returns its content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    return content


def measure_speed(run: ComparisonRun, trained: list[TrainingRun], names: list[str]) -> list[dict]:
    """The speed table, kept in measured/ case by case.

    Args:
      run: config of the comparison.
      trained: configs of the twins' runs.
      names: names of the twins.
    """
    path = Path(run.model_dir) / "measured" / "speed.json"
    request = dataclasses.asdict(run.compare) | {"twins": names}
    table = {"asked": json.loads(json.dumps(request)), "rows": []}
    if (kept := read_measured(path)).get("asked") == table["asked"]:
        table = kept
    cases = list(speed.speed_cases(run.compare))
    done = len(table["rows"]) // len(names)
    if done < len(cases):
        models = []
        for name, each in zip(names, trained, strict=True):
            restored = open_checkpoint(each.model_dir).load()
            params = decoding.prepare_params(each.model, restored.params)
            models.append(speed.TwinModel(name, each.model, params))
        stages = Stages("speed", len(cases), done)
        for case in cases[done:]:
            stages.begin(f"{case.rows} x ({case.inputs} ids in, {case.outputs} out)")
            table["rows"] += speed.time_twins(models, case, run.compare.repeats)
            write_measured(path, table)
    return table["rows"]


class Stages:
    """Prints which of several long pieces of work begins, and how long the rest may take.

    Attributes:
      what: what is done to each: "training".
      total: number of pieces.
      number: number of the one in progress, from 1.
      seconds: seconds of those that were done here.
      began: when the one in progress began; None where it was done already.
      lock: held by `begin`, which several threads may call.
    """

    def __init__(self, what: str, total: int, done: int = 0):
        self.what, self.total, self.number = what, total, done
        self.seconds: list[float] = []
        self.began: float | None = None
        self.lock = threading.Lock()

    def begin(self, name: str, needed: bool = True) -> None:
        """Ends the piece before, and begins the next; one that is done already prints nothing.

        Args:
          name: what is printed of it.
          needed: false for one that is done already.
        """
        with self.lock:
            now = time.monotonic()
            if self.began is not None:
                self.seconds.append(now - self.began)
            self.number += 1
            self.began = now if needed else None
            if needed:
                left = ""
                if self.seconds:
                    mean = sum(self.seconds) / len(self.seconds)
                    rest = format_duration(mean * (self.total - self.number + 1))
                    left = f"; all of {self.what} ends in about {rest}"
                print(f"{self.what} {self.number} of {self.total}: {name}{left}", flush=True)


def memory_table(family: list[twins.Twin], cfg: config.Compare) -> list[dict]:
    """Bytes of weights and of a text's cache in the dtype of computation."""
    rows = []
    for twin in family:
        size = jnp.dtype(twin.model.dtype).itemsize
        for inputs in cfg.input_lengths:
            outputs = max(cfg.output_lengths)
            cache = costs.cache_bytes(twin.model, inputs, outputs, size)
            about = {"twin": twin.name, "inputs": inputs, "outputs": outputs}
            rows.append(about | {"weights": size * twin.parameters, "cache": cache})
    return rows


def shown_metrics(qualities: dict[str, list[dict]]) -> list[str]:
    """Names of the metrics of quality that every run has."""
    every = [set(each["metrics"]) for runs in qualities.values() for each in runs]
    counts = {"examples", "truncated_inputs", "batches", "tokens", "target_tokens", "perplexity"}
    return sorted(set.intersection(*every) - counts)


def loss_curve(folder: str) -> list[list[float]]:
    """The held-out loss of a run by step."""
    values = metric_writers.read_metrics(Path(folder))
    losses = [
        points for name, points in values.items() if name.endswith("/loss") and "train/" not in name
    ]
    return [[step, loss] for step, loss in losses[0].items()] if losses else []


def machine() -> str:
    """Devices and processor of this machine."""
    kind = jax.devices()[0].device_kind
    return f"{len(jax.devices())} x {kind}, {platform.machine()}"


def versions() -> str:
    """Versions of this package, of jax and of flax."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("t5x_lite", "jax", "flax"))
