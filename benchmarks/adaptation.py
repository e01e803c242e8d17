# SPDX-License-Identifier: Apache-2.0
"""Does adaptation pay? And does a teacher? Held-out loss against step, several ways and seeds.

Begins with a decoder-only that was pretrained on Python's standard library
(python -m t5x_lite.train --gin_file=configs/runs/stdlib_gemma2_tiny.gin) and trains
encoder-decoders on the same text with configs/runs/adapt_stdlib_tiny.gin:

  copy      towers copied, cross-attention copied from self-attention, all trained at once
  random    towers copied, cross-attention random, trained alone for the first K steps
  merged    towers copied, one softmax over past and inputs: no new weights
  scratch   nothing copied; twice the steps, and a larger learning rate
  plain     prefix LM from copied towers, cross entropy alone
  taught    the same with the pretrained model as teacher, half cross entropy and half KL

A run that is finished is not run again, one that was interrupted continues. Reports after how many
steps each way reaches the held-out loss that scratch ends with.

  python benchmarks/adaptation.py [--ways copy scratch ...] [--seeds 3] [--json FILE] [--plot FILE]
"""

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

import report
import training_runs

PACKAGES = ["jax", "jaxlib", "flax", "optax"]
CONFIG = "configs/runs/adapt_stdlib_tiny.gin"
CONFIG_RANDOM = "configs/runs/adapt_stdlib_tiny_random.gin"
CONFIG_TAUGHT = "configs/runs/adapt_stdlib_tiny_taught.gin"
PREFIX_LM = "configs/data/objectives/prefix_lm.gin"
MERGED = "configs/models/t5gemma_tiny_merged.gin"


@dataclass(frozen=True)
class Arrangement:
    """A run: the files of its config, bindings, how many times longer it is."""

    study: str
    files: tuple[str, ...] = (CONFIG,)
    bindings: tuple[str, ...] = ()
    longer: int = 1
    color: str = "black"


WAYS = {
    "copy": Arrangement("adaptation", color="#4c78a8"),
    "random": Arrangement("adaptation", (CONFIG_RANDOM,), color="#f58518"),
    "merged": Arrangement("adaptation", (CONFIG, MERGED), color="#54a24b"),
    "scratch": Arrangement(
        "adaptation",
        bindings=("config.Run.adaptation=None", "config.Schedule.peak=0.002"),
        longer=2,
        color="#e45756",
    ),
    "plain": Arrangement("distillation", (CONFIG, PREFIX_LM), color="#4c78a8"),
    "taught": Arrangement("distillation", (CONFIG_TAUGHT,), color="#e45756"),
}


def folder_of(options: argparse.Namespace, way: str, seed: int) -> Path:
    return Path(options.output) / f"{way}-{seed}"


def train(options: argparse.Namespace, name: str, seed: int) -> None:
    """Runs the way with the seed to its end, unless it was."""
    way = WAYS[name]
    bindings = [
        f"SOURCE={options.source}",
        f"TRAIN_STEPS={options.steps * way.longer}",
        f"config.Run.seed={seed}",
        *way.bindings,
    ]
    training_runs.finish(folder_of(options, name, seed), way.files, bindings)


LOSS = "validation/loss"


def steps_to(points: dict[int, float], loss: float) -> float | None:
    """After how many steps the curve is first at or below the loss, between its points linearly."""
    before = None
    for step, value in sorted(points.items()):
        if value <= loss:
            if before is None:
                return step
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (step - before[0])
        before = step, value
    return None


def rows_of(study: str, curves: dict[str, list[dict[int, float]]]) -> list[report.Row]:
    """Last losses, and for each way the steps it takes to where scratch (or plain) ends."""
    rows = []
    reference = "scratch" if "scratch" in curves else "plain"
    for name, points in curves.items():
        ends = [each[max(each)] for each in points]
        starts = [each[min(each)] for each in points]
        case = f"{study}, {len(points)} seeds"
        rows += [
            report.Row(case, name, f"loss at step {min(points[0])}", statistics.median(starts)),
            report.Row(case, name, f"loss at step {max(points[0])}", statistics.median(ends)),
            report.Row(case, name, "spread of that loss", max(ends) - min(ends)),
        ]
        if reference in curves:
            goals = [each[max(each)] for each in curves[reference]]
            found = [steps_to(*pair) for pair in zip(points, goals, strict=False)]
            missed = None in found
            value = None if missed else statistics.median(found)
            note = "not reached" if missed else ""
            rows.append(report.Row(case, name, f"steps to {reference}'s last loss", value, note))
    return rows


def draw(path: str, studies: dict[str, dict[str, list[dict[int, float]]]]) -> None:
    """Held-out loss against step: every seed thin, the median thick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(studies), 4.4), layout="constrained")
    for axes, (study, curves) in zip(
        figure.subplots(1, len(studies), squeeze=False)[0], studies.items(), strict=True
    ):
        for name, points in curves.items():
            color = WAYS[name].color
            for each in points:
                axes.plot(list(each), list(each.values()), color=color, alpha=0.3, linewidth=1)
            steps = sorted(set.intersection(*(set(each) for each in points)))
            middle = [statistics.median(each[step] for each in points) for step in steps]
            axes.plot(steps, middle, "o-", color=color, markersize=3, label=name)
        axes.set(title=study, xlabel="step", ylabel="held-out loss (nats per target token)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default="runs/stdlib_gemma2_tiny", help="what is adapted")
    parser.add_argument("--output", default="runs/adaptation", help="folder of the runs")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--train_only", action="store_true", help="train, and measure later")
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--plot", help="also draw the curves to this file")
    options = parser.parse_args()
    studies: dict[str, dict[str, list]] = {}
    for seed in range(options.seeds):
        for name in options.ways:
            train(options, name, seed)
    if options.train_only:
        return
    for name in options.ways:
        folders = [folder_of(options, name, seed) for seed in range(options.seeds)]
        studies.setdefault(WAYS[name].study, {})[name] = [
            training_runs.curve(folder, LOSS) for folder in folders
        ]
    rows = [row for study, curves in studies.items() for row in rows_of(study, curves)]
    print(report.table(rows))
    if options.json:
        report.write(options.json, rows, PACKAGES)
    if options.plot:
        draw(options.plot, studies)


if __name__ == "__main__":
    main()
