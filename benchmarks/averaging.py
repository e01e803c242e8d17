# SPDX-License-Identifier: Apache-2.0
"""Is the mean of the last five checkpoints better than the last one? Held-out loss, several seeds.

Adapts decoder-only models that were pretrained on Python's standard library, of about 0.8M, 3M and
13M parameters, as configs/runs/adapt_stdlib_tiny.gin does, with a constant rate and with a cosine,
and measures on the validation split:

  last       the last checkpoint
  mean       the mean of the last five (python -m t5x_lite.average --last=5)
  copy       the exponential copy that the run has kept (config.Train.average, decay 0.99)

A run that is finished is not run again, one that was interrupted continues.

  python benchmarks/averaging.py [--seeds 3] [--steps 300] [--quick] [--json FILE]
"""

import argparse
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import report
import training_runs

from t5x_lite import config, data
from t5x_lite.checkpoints.opening import open_checkpoint
from t5x_lite.checkpoints.run_folder import read_run_config
from t5x_lite.evaluation.evaluate import Evaluator

PACKAGES = ["jax", "jaxlib", "flax", "optax"]
PRETRAIN, ADAPT = "configs/runs/stdlib_gemma2_tiny.gin", "configs/runs/adapt_stdlib_tiny.gin"
# Layers, width and feed-forward width of a tower, in place of those of the file.
SIZES = {"0.8M": (2, 64, 192), "3M": (4, 128, 384), "13M": (6, 256, 768)}
SCHEDULES = {
    "constant": (),
    "cosine": ("config.Schedule.kind='cosine'", "config.Schedule.floor=0.1"),
}
LAST = 5


@dataclass(frozen=True)
class Study:
    """A size, a schedule and a seed.

    Attributes:
      output: folder of all runs.
      size: key of SIZES.
      schedule: key of SCHEDULES.
      seed: seed of weights and data order.
      steps: steps of the adaptation.
      pretraining: steps of the model that it begins with.
    """

    output: Path
    size: str
    schedule: str
    seed: int
    steps: int
    pretraining: int

    @property
    def shape(self) -> list[str]:
        """Bindings of the towers' shape."""
        layers, embed, mlp = SIZES[self.size]
        fields = {"layers": layers, "embed": embed, "mlp": mlp, "head_dim": embed // 4}
        fields["query_scale"] = (embed // 4) ** -0.5
        return [f"config.Stack.{name}={value}" for name, value in fields.items()]

    @property
    def source(self) -> Path:
        """Folder of the pretrained model."""
        return self.output / f"source-{self.size}"

    @property
    def folder(self) -> Path:
        """Folder of the adaptation."""
        return self.output / f"{self.size}-{self.schedule}-{self.seed}"

    def train(self) -> None:
        """Trains what is not trained yet."""
        steps = [f"TRAIN_STEPS={self.pretraining}", f"config.Schedule.warmup={self.warmup}"]
        training_runs.finish(self.source, (PRETRAIN,), [*self.shape, *steps])
        every = max(1, self.steps // 15)
        bindings = [
            *self.shape,
            f"SOURCE={self.source}",
            f"TRAIN_STEPS={self.steps}",
            f"config.Run.seed={self.seed}",
            f"config.Checkpoint.every={every}",
            f"config.Checkpoint.keep={LAST}",
            f"config.Evaluate.every={self.steps}",
            f"config.Schedule.warmup={max(1, self.steps // 15)}",
            "config.Train.average=@config.WeightAverage()",
            "config.WeightAverage.kind='exponential'",
            "config.WeightAverage.decay=0.99",
            *SCHEDULES[self.schedule],
        ]
        training_runs.finish(self.folder, (ADAPT,), bindings)

    @property
    def warmup(self) -> int:
        """Warmup of the pretraining."""
        return max(1, self.pretraining // 18)

    def losses(self) -> dict[str, float]:
        """Held-out loss of the last checkpoint, of the mean of the last ones, and of the copy."""
        folders = {"last": self.folder}
        for name, words in {"mean": [f"--last={LAST}"], "copy": ["--copy"]}.items():
            folders[name] = self.folder.with_name(f"{self.folder.name}-{name}")
            if not folders[name].exists():
                command = [sys.executable, "-m", "t5x_lite.average", f"--from={self.folder}"]
                subprocess.run([*command, *words, f"--to={folders[name]}"], check=True)
        return {name: held_out_loss(folder) for name, folder in folders.items()}


def held_out_loss(folder: Path) -> float:
    """Loss of a run folder on its validation split, in nats per target token."""
    loaded = open_checkpoint(folder).load(config.Mesh())
    evaluator = Evaluator(data.with_run_vocabulary(read_run_config(folder)))
    return evaluator.losses(loaded.params)["loss"]


def rows_of(case: str, losses: list[dict[str, float]]) -> list[report.Row]:
    """Medians over the seeds, and by how much each is below the last checkpoint, seed by seed."""
    rows = []
    for name in losses[0]:
        values = [each[name] for each in losses]
        rows.append(report.Row(case, name, "held-out loss", statistics.median(values)))
        if name == "last":
            continue
        gains = [each["last"] - each[name] for each in losses]
        rows += [
            report.Row(case, name, "below the last, median", statistics.median(gains)),
            report.Row(case, name, "below the last, least", min(gains)),
            report.Row(case, name, "below the last, greatest", max(gains)),
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="runs/averaging", help="folder of the runs")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pretraining", type=int, default=1800, help="steps of the sources")
    parser.add_argument("--quick", action="store_true", help="the smallest model, a few steps")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.schedules, options.seeds = ["0.8M"], ["constant"], 1
        options.steps, options.pretraining = 15, 10
    rows = []
    for size in options.sizes:
        for schedule in options.schedules:
            losses = []
            for seed in range(options.seeds):
                study = Study(
                    Path(options.output),
                    size,
                    schedule,
                    seed,
                    options.steps,
                    options.pretraining,
                )
                study.train()
                losses.append(study.losses())
            rows += rows_of(f"{size}, {schedule}, {options.seeds} seeds", losses)
            if options.json:
                report.write(options.json, rows, PACKAGES)
    print(report.table(rows))


if __name__ == "__main__":
    main()
