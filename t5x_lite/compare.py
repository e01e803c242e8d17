# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoder or decoder-only, for a task of yours: python -m t5x_lite.compare --help."""

import argparse
import dataclasses
import json
import platform
import sys
from pathlib import Path

from t5x_lite import config, gin_arguments

TEACHING = """\
Trains twins that differ in architecture alone, measures them, and writes one page about it. The
config is a run of the encoder-decoder with config.Run.compare bound (config.Compare says which
twins, matched by what, with how many seeds). The same command again goes on where it stopped.

examples
  python -m t5x_lite.compare --gin_file=configs/runs/compare_g2p.gin --dry_run
      the twins, their depth and width, and how near they match; trains nothing
  python -m t5x_lite.compare --gin_file=configs/runs/compare_g2p.gin
      trains every twin with every seed (hours), measures quality, speed and memory
  ... --gin.TRAIN_STEPS=500 --gin.config.Compare.seeds=1
      a quick look
  ... --gin.config.Compare.seeds=1 \\
      '--gin.config.Compare.trained={"encoder_decoder": ("runs/a",), "causal_decoder": ("runs/b",)}'
      takes checkpoints that are there (of any make) instead of training these twins

what MODEL_DIR holds
  <twin>-<seed>/       a run folder each, for eval, infer and convert; predictions
  measured/            quality and speed, piece by piece
  report.html          tables, pictures and words in one file; report.json, *.png"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m t5x_lite.compare",
        description=TEACHING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    gin_arguments.add(made)
    made.add_argument("--dry_run", action="store_true", help="print the twins, train nothing")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; gives back its exit status."""
    known, extra = parser().parse_known_args(arguments)
    try:
        return compare(known, gin_arguments.bindings(extra))
    except (ValueError, OSError) as error:
        print(f"t5x_lite.compare: {error}", file=sys.stderr)
        return 1


def compare(known: argparse.Namespace, bindings: list[str]) -> int:
    gin_arguments.bring(known.modules)
    from t5x_lite import config_file

    run = config_file.load(known.gin_file, bindings)
    config.require(
        run.compare is not None and run.train is not None,
        "the config compares nothing: bind config.Run.compare = @config.Compare(), as "
        "configs/runs/compare_g2p.gin does, in a run that trains",
    )
    from t5x_lite import quantization, sharding
    from t5x_lite.comparison import report, twins
    from t5x_lite.training import compilation

    for name in run.compare.quantised:  # a misspelt one is told now, not after hours of training
        quantization.kind(name)
    compilation.keep_compiled()
    sharding.use_mesh(run.mesh)
    family = twins.family(run)
    record = {"matched": run.compare.matched, "twins": [described(run, each) for each in family]}
    print_twins(report.twins(record))
    if not known.dry_run:
        page = report.write(measured(run, family, record, known.modules), Path(run.model_dir))
        print(f"The comparison: {page}")
    return 0


def print_twins(rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(*rows[0][:1], *(Column(head, justify="right") for head in rows[0][1:]))
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)


def described(run: config.Run, twin) -> dict:
    from t5x_lite.comparison import costs

    lengths = costs.Lengths(*costs.lengths_of(run.data).mean(axis=0).tolist())
    model = twin.model
    return {
        "name": twin.name,
        "encoder_layers": model.encoder.layers if model.encoder else 0,
        "decoder_layers": model.decoder.layers,
        "mlp": model.decoder.mlp,
        "parameters": twin.parameters,
        "off": twin.off,
        "steps": twin.steps,
        "taken": list(twin.taken),
        "training_flops": costs.training(model, lengths),
        "inference_flops": costs.inference(model, lengths),
    }


def measured(run: config.Run, family: list, record: dict, modules: list[str]) -> dict:
    """The whole record: trains what is not trained, measures what is not measured."""
    from t5x_lite import data
    from t5x_lite.comparison import costs, twins

    asked = run.compare
    runs = {
        (twin.name, seed): twins.run_of(run, twin, seed)
        for seed in range(asked.seeds)
        for twin in family
    }
    trained = train(asked, runs, modules)
    names = [twin.name for twin in family]
    found = {
        name: [quality_of(run, runs[name, seed], name, seed) for seed in range(asked.seeds)]
        for name in names
    }
    lengths, most = costs.lengths_of(run.data), run.data.lengths
    task = data.open_dataset(run.data, asked.split)
    return record | {
        "task": task.name,
        "split": asked.split,
        "examples": min(asked.examples, len(task)),
        "seeds": asked.seeds,
        "machine": machine(),
        "versions": versions(),
        "training": trained,
        "curves": {
            name: [curve(runs[name, seed].model_dir) for seed in range(asked.seeds)]
            for name in names
        },
        "quality": found,
        "metrics": shown_metrics(found),
        "speed": speed_of(run, [runs[name, 0] for name in names], names),
        "memory": memory_of(family, asked),
        "padding": costs.padding(lengths, (most["inputs"], most["targets"]), 32),
    }


def train(asked: config.Compare, runs: dict, modules: list[str]) -> list[dict]:
    """Trains each run by (twin, seed) that is not taken; how long that took, None where unknown."""
    from t5x_lite.comparison import taken, training

    trained = []
    for number, ((name, seed), each) in enumerate(runs.items(), 1):
        print(f"{number} of {len(runs)}: {each.model_dir}", flush=True)
        here = name not in asked.trained
        report = training.train(each, modules) if here else taken.report(each.model_dir)
        trained.append({"twin": name, "seed": seed, "seconds": report.get("train_seconds")})
    return trained


def quality_of(run: config.Run, trained: config.Run, name: str, seed: int) -> dict:
    """The measures of a twin, kept in measured/ once they are made; its own folder is only read."""
    from t5x_lite.comparison import quality
    from t5x_lite.training import restore

    kept = Path(run.model_dir) / "measured" / f"{name}-{seed}.json"
    cfg = run.compare
    asked = [cfg.split, cfg.examples, list(cfg.drafters), list(cfg.quantised)]
    asked += [trained.model_dir] if name in cfg.trained else []
    if kept.exists() and (found := json.loads(kept.read_text()))["asked"] == asked:
        return found
    print(f"measuring {trained.model_dir}", flush=True)
    best = trained.checkpoint.metric is not None and name not in cfg.trained
    restored = restore.restore(trained.model_dir, best=best)
    folder = str(Path(run.model_dir) / f"{name}-{seed}")
    here = dataclasses.replace(trained, model_dir=folder)
    found = quality.measure(here, restored.params, restored.step, run.compare)
    found["drafted"] = quality.drafted(here, restored.params, run.compare)
    found["quantised"] = quality.quantised(here, restored.params, restored.step, run.compare)
    return keep(kept, {"asked": asked, "step": restored.step, **found})


def keep(path: Path, found: dict) -> dict:
    from t5x_lite.comparison import report

    path.parent.mkdir(parents=True, exist_ok=True)
    report.replace(path, json.dumps(found, indent=1) + "\n")
    return found


def speed_of(run: config.Run, trained: list[config.Run], names: list[str]) -> list[dict]:
    """The speed table, case by case, kept in measured/ as it is made."""
    from t5x_lite import decoding
    from t5x_lite.comparison import speed
    from t5x_lite.training import restore

    kept = Path(run.model_dir) / "measured" / "speed.json"
    asked = dataclasses.asdict(run.compare) | {"twins": names}
    table = {"asked": json.loads(json.dumps(asked)), "rows": []}
    if kept.exists() and (before := json.loads(kept.read_text()))["asked"] == table["asked"]:
        table = before
    cases = list(speed.cases(run.compare))
    done = len(table["rows"]) // len(names)
    if done < len(cases):
        models = []
        for name, each in zip(names, trained, strict=True):
            restored = restore.restore(each.model_dir)
            params = decoding.prepare(each.model, restored.params)
            models.append(speed.Model(name, each.model, params))
        for number, case in enumerate(cases[done:], done + 1):
            print(f"speed {number} of {len(cases)}: {case}", flush=True)
            table["rows"] += speed.measure(models, case, run.compare.repeats)
            keep(kept, table)
    return table["rows"]


def memory_of(family: list, asked: config.Compare) -> list[dict]:
    """Bytes of weights and of a text's cache in the dtype of activations."""
    import jax.numpy as jnp

    from t5x_lite.comparison import costs

    rows = []
    for twin in family:
        size = jnp.dtype(twin.model.activations).itemsize
        for inputs in asked.input_lengths:
            outputs = max(asked.output_lengths)
            cache = costs.cache_bytes(twin.model, inputs, outputs, size)
            about = {"twin": twin.name, "inputs": inputs, "outputs": outputs}
            rows.append(about | {"weights": size * twin.parameters, "cache": cache})
    return rows


def shown_metrics(found: dict[str, list[dict]]) -> list[str]:
    """The numbers that are measures of quality and that every run has."""
    every = [set(each["metrics"]) for runs in found.values() for each in runs]
    counts = {"examples", "truncated_inputs", "batches", "tokens", "target_tokens", "perplexity"}
    return sorted(set.intersection(*every) - counts)


def curve(folder: str) -> list[list[float]]:
    """The held-out loss of a run by step."""
    from t5x_lite.training import records

    values = records.read(Path(folder))
    losses = [
        points for name, points in values.items() if name.endswith("/loss") and "train/" not in name
    ]
    return [[step, loss] for step, loss in losses[0].items()] if losses else []


def machine() -> str:
    import jax

    kind = jax.devices()[0].device_kind
    return f"{len(jax.devices())} x {kind}, {platform.machine()}"


def versions() -> str:
    from importlib import metadata

    return ", ".join(f"{name} {metadata.version(name)}" for name in ("t5x_lite", "jax", "flax"))


if __name__ == "__main__":
    sys.exit(main())
