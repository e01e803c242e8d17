# SPDX-License-Identifier: Apache-2.0
"""python -m t5x_lite.eval: measures a trained run on held-out data."""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, cast

from t5x_lite import config
from t5x_lite.cli import gin_arguments, options
from t5x_lite.cli.command import Command
from t5x_lite.cli.options import number_parser
from t5x_lite.cli.parser import Parser
from t5x_lite.cli.progress import Progress
from t5x_lite.config.checked import CountOrZero
from t5x_lite.config.training_run import DataRun
from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.exit_status import FAILURE
from t5x_lite.utils.paths import parse_output_path, parse_path, path_argument
from t5x_lite.utils.text_lines import escape_controls

EXAMPLES = """\
examples:
  # loss, perplexity, bits per byte and the task's metrics on the validation split
  python -m t5x_lite.eval --checkpoint=runs/g2p
  # 200 examples of the test split, 4 beams, another metric
  python -m t5x_lite.eval --checkpoint=runs/g2p --split=test --beams=4 --examples=200 --metrics=bleu
  # a checkpoint of another format has no data: name those to measure on
  python -m t5x_lite.eval --checkpoint=smollm2.q8_0.gguf --gin_file=configs/data/jsonl_pairs.gin \\
      --gin.config.Files.validation=pairs.jsonl
  # quality and tokens per second of each of six settings
  python -m t5x_lite.eval --checkpoint=runs/g2p --sweep temperature=0.5,1 top_p=0.8,0.95,1
  # tasks of EleutherAI's lm-evaluation-harness (extra: lm_eval)
  python -m t5x_lite.eval --checkpoint=smollm2.q8_0.gguf --lm_eval=hellaswag,arc_easy
  python -m t5x_lite.eval --checkpoint=flan-t5-small --superglue=SuperGLUE --normalize=tokens

metrics: exact_match, edit_distance, per, wer (of phonemes, of words), bleu, chrf, rouge, squad.
Predictions: DIR/predictions/<split>-<step>.jsonl (of another format's checkpoint: runs/eval_NAME).
"""


def parser() -> Parser:
    """Parser of the command."""
    command = Parser(
        "eval",
        description="Measures a trained run on held-out data: losses, and metrics of its texts.",
        epilog=EXAMPLES,
    )
    options.add_checkpoint(command)
    group = command.add_argument_group("measurements")
    add = group.add_argument
    add("--split", metavar="NAME", help="which split (default: the run's Data.eval_split)")
    add(
        "--examples",
        type=number_parser(CountOrZero),
        metavar="N",
        help="decode the first N examples only; 0 for none",
    )
    add(
        "--batches",
        type=number_parser(CountOrZero),
        metavar="N",
        help="losses over N batches only; 0 for none",
    )
    add("--metrics", metavar="A,B", help="which metrics (default: those of the task)")
    add("--lengths", metavar="A,B", help="losses by targets too: texts of up to A, A to B, over B")
    add("--json", type=path_argument, metavar="FILE", help="write the numbers to FILE as well")
    add(
        "--show",
        type=number_parser(CountOrZero),
        default=5,
        metavar="N",
        help="print N predictions (default 5)",
    )
    grid = "quality and speed of each combination of these settings"
    add("--sweep", nargs="+", metavar="NAME=A,B", help=grid)
    plot = "draw quality over speed of --sweep: .png, .svg or .pdf"
    add("--plot", type=path_argument, metavar="FILE", help=plot)
    add_tasks(group)
    data = (
        "measure on the config.Data of this .gin file, in the vocabulary of the checkpoint; "
        "--gin.NAME=VALUE sets a macro or a field of it"
    )
    gin_arguments.add_gin(group, required=False, text=data)
    options.add_decode(command)
    return command


def add_tasks(group: Any) -> None:
    """Adds tasks that bring their own data to a group of options."""
    add = group.add_argument
    tasks = "in place of data: tasks of lm-evaluation-harness, .yaml files"
    add("--lm_eval", metavar="A,B", help=tasks)
    shots = "examples before each question of --lm_eval"
    add("--few_shot", type=number_parser(CountOrZero), metavar="N", help=shots)
    folder = "in place of data: DIR/BoolQ/val.jsonl, DIR/CB/val.jsonl ..."
    add("--superglue", type=path_argument, metavar="DIR", help=folder)
    measures = "choices by likelihood: none, tokens, characters, prior"
    add("--normalize", choices=options.NORMALIZATIONS, metavar="HOW", help=measures)
    kinds = "of --superglue: t5, or plain for decoders"
    add("--prompts", choices=options.PROMPT_STYLES, metavar="KIND", help=kinds)


def measure(args: argparse.Namespace) -> int:
    """Restores, evaluates, prints and writes; returns the exit status."""
    check_options(args)
    requested = requested_data(args)
    from t5x_lite.adaptation.vocabulary_compatibility import describe_pair_difference
    from t5x_lite.checkpoints.opening import open_checkpoint
    from t5x_lite.evaluation.evaluate import Evaluator
    from t5x_lite.training import host

    host.prepare_jax()
    opened = open_checkpoint(args.checkpoint, args.step, args.best)
    restored = opened.load(args.mesh, args.quantize)
    if args.lm_eval:
        return measure_harness_tasks(args, opened, restored)
    if args.superglue:
        return measure_superglue_tasks(args, restored)
    run = with_options(with_data(restored.run, requested, args.checkpoint), args)
    evaluator = Evaluator(run, args.split)
    difference = describe_pair_difference(restored.vocabularies, evaluator.dataset.vocabularies)
    config.require(
        difference is None,
        f"{args.checkpoint} has another vocabulary than {evaluator.dataset.name}: {difference}. "
        "It can be measured only on data in its own",
    )
    if args.sweep:
        return sweep_settings(args, run, restored)
    total = min(len(evaluator.dataset), run.evaluate.examples)
    with Progress("examples", total) as progress:
        numbers = evaluator(restored.params, restored.step, progress)
    print(f"{args.checkpoint}, step {restored.step}, {evaluator.dataset.name} {evaluator.split}")
    for name, number in numbers.items():
        print(f"  {name:<16}{number:>14,.4f}")
    by_length = measure_lengths(evaluator, restored.params, args.lengths)
    for name, reason in evaluator.failures.items():
        print(f"  {name} not computed: {reason}")
    if evaluator.tally.steps:
        print(evaluator.tally)
    if evaluator.predictions_path is not None:
        show(evaluator.predictions_path, args.show)
    if args.json:
        write_report(args, run, evaluator, restored.step, numbers, by_length)
    failed = evaluator.failures.keys() - evaluator.dataset.unsupported_metrics.keys()
    return FAILURE if failed else 0


def measure_lengths(evaluator: Any, params: Any, text: str | None) -> list[dict]:
    """Prints the losses of --lengths; returns its rows, none without the option.

    Args:
      evaluator: `evaluation.evaluate.Evaluator`.
      params: weights of its model.
      text: value of the option.
    """
    from t5x_lite.evaluation import lengths

    if text is None:
        return []
    rows = evaluator.losses_by_length(params, lengths.parse_lengths(text))
    print(lengths.format_lengths(rows))
    return [row._asdict() for row in rows]


def write_report(
    args: argparse.Namespace,
    run: DataRun,
    evaluator: Any,
    step: int,
    numbers: dict[str, float],
    by_length: list[dict],
) -> None:
    """Writes the numbers of an evaluation to the file of --json.

    Args:
      args: options of the command.
      run: config of the run, with the options.
      evaluator: `evaluation.evaluate.Evaluator` that measured them.
      step: training step of the weights.
      numbers: the values by name.
      by_length: rows of --lengths; empty without it.
    """
    report = {
        "checkpoint": args.checkpoint,
        "step": step,
        "split": evaluator.split,
        "quantize": args.quantize,
        "decode": dataclasses.asdict(run.decode),
        "metrics": numbers,
        "by_length": by_length,
        "not_computed": evaluator.failures,
        "drafting": evaluator.tally.report(),
    }
    write_atomically(parse_output_path(args.json), json.dumps(report, indent=1) + "\n")


def check_options(args: argparse.Namespace) -> None:
    """Raises ValueError for options that contradict each other, before anything is loaded."""
    from t5x_lite.evaluation import lengths, sweep

    config.require(args.sweep or not args.plot, "--plot draws a --sweep: name settings to try")
    endings = (".png", ".svg", ".pdf")
    config.require(
        not args.plot or args.plot.endswith(endings),
        f"--plot {args.plot}: the name must end in one of {', '.join(endings)}",
    )
    sweep.parse_grid(args.sweep or [])
    if args.lengths is not None:
        lengths.parse_lengths(args.lengths)
    config.require(
        not (args.sweep and args.lengths), "--lengths and --sweep: measure them one by one"
    )
    config.require(
        args.lm_eval or args.few_shot is None,
        "--few_shot is about tasks of the lm-evaluation-harness: name some with --lm_eval",
    )
    for name in ("normalize", "prompts"):
        config.require(
            args.superglue or getattr(args, name) is None,
            f"--{name} is about the choices of --superglue: name its folder",
        )
    option = "lm_eval" if args.lm_eval else "superglue"
    data = [
        name for name in ("split", "metrics", "sweep", "lengths", "gin_file") if getattr(args, name)
    ]
    data = [name for name in data if option == "lm_eval" or name != "split"]
    config.require(
        not (args.lm_eval or args.superglue) or not data,
        f"--{option} measures tasks of their own data and metrics: leave out --{data and data[0]}",
    )


def measure_harness_tasks(args: argparse.Namespace, opened: Any, restored: Any) -> int:
    """Measures the tasks of --lm_eval, prints and writes their numbers; returns the exit status.

    Args:
      args: options of the command.
      opened: the checkpoint.
      restored: its weights and vocabularies.
    """
    from t5x_lite import processes
    from t5x_lite.evaluation import lm_harness

    decode = dataclasses.replace(restored.run.decode, **options.decode_fields(args))
    restored = restored._replace(run=dataclasses.replace(restored.run, decode=decode))
    model = lm_harness.make_harness_model(opened, restored, args.batch_size)
    tasks = args.lm_eval.split(",")
    results = lm_harness.measure_tasks(model, tasks, args.few_shot, args.examples)
    if not processes.is_first():
        return 0
    print(f"{args.checkpoint}, step {restored.step}")
    print(lm_harness.format_results(results))
    if args.json:
        kept = {name: results[name] for name in ("results", "versions", "n-shot", "n-samples")}
        text = json.dumps(kept, indent=1, default=str)
        write_atomically(parse_output_path(args.json), text + "\n")
    return 0


def measure_superglue_tasks(args: argparse.Namespace, restored: Any) -> int:
    """Measures the tasks in the folder of --superglue, prints and writes their numbers; returns the
    exit status.

    Args:
      args: options of the command.
      restored: the checkpoint.
    """
    from t5x_lite.evaluation import superglue
    from t5x_lite.evaluation.predict import Predictor, has_inputs

    files = superglue.find_files(parse_path(args.superglue), args.split or "val")
    run, ended = restored.run, has_inputs(restored.run)
    rows = args.batch_size or run.evaluate.batch_size
    parts = run.model, restored.params, restored.vocabularies
    predictor = Predictor(*parts, ended=ended, batch_size=rows)
    style = args.prompts or ("t5" if ended else "plain")
    normalize, report = args.normalize or "none", {}
    print(f"{args.checkpoint}, step {restored.step}, {style} prompts, normalized by {normalize}")
    for file in files:
        questions = superglue.read_questions(file, style, args.examples)
        with Progress(file.task, sum(len(each.choices) for each in questions)) as progress:
            numbers = superglue.measure_questions(
                predictor, file.task, questions, normalize, progress
            )
        report[file.task] = numbers
        text = ", ".join(f"{name} {number:,.2f}" for name, number in numbers.items())
        print(f"  {file.task:<10}{text}")
    if args.json:
        write_atomically(parse_output_path(args.json), json.dumps(report, indent=1) + "\n")
    return 0


def sweep_settings(args: argparse.Namespace, run: DataRun, restored: Any) -> int:
    """Measures the combinations of --sweep, prints and writes them; returns the exit status.

    Args:
      args: options of the command.
      run: config of the run, with the options.
      restored: the checkpoint.
    """
    from t5x_lite.evaluation import sweep

    grid = sweep.parse_grid(args.sweep)
    total = math.prod(map(len, grid.values()))
    with Progress("settings", total) as progress:
        points = sweep.run_sweep(run, restored.params, args.split, grid, progress)
    print(sweep.format_table(points))
    if args.json:
        rows = [point._asdict() for point in points]
        write_atomically(parse_output_path(args.json), json.dumps(rows, indent=1) + "\n")
    if args.plot:
        sweep.draw_plot(points, parse_output_path(args.plot))
    return 0


def requested_data(args: argparse.Namespace) -> config.Data | None:
    """Data that the command line names; None to measure on those of the checkpoint."""
    from t5x_lite.config import gin_file

    if not args.gin_file and not args.bindings:
        return None
    return gin_file.load_data(args.gin_file, args.bindings)


def with_data(run: config.Run, requested: config.Data | None, checkpoint: str) -> DataRun:
    """A run with other data, in the vocabulary of its checkpoint.

    Args:
      run: config of the checkpoint.
      requested: the data to measure on; None for those of the run.
      checkpoint: path of the checkpoint.

    Raises:
      ValueError: there are no data.
    """
    from t5x_lite import data

    path = parse_path(checkpoint)
    if requested is not None:
        vocabulary = config.Vocabulary(kind="checkpoint", path=checkpoint)
        run = dataclasses.replace(run, data=data.in_vocabulary(requested, vocabulary))
    if run.data is None:
        raise ValueError(
            f"{path} has no data of its own: name some with --gin_file=FILE, such as "
            "configs/data/cmudict_g2p.gin, or with --gin.config.Data.task=... and "
            "--gin.config.Data.lengths=..."
        )
    if (path / "config.gin").exists():
        run = data.with_run_vocabulary(dataclasses.replace(run, model_dir=checkpoint))
        return cast(DataRun, run)
    # Nothing is written into a checkpoint of another format, nor into a run of its name.
    outputs = Path("runs", f"eval_{path.stem}")
    return cast(DataRun, dataclasses.replace(run, model_dir=str(outputs)))


def with_options(run: DataRun, args: argparse.Namespace) -> DataRun:
    """A run with the options of the command line; without --examples, all of the split."""
    everything = 2**31 - 1
    evaluate = dataclasses.replace(
        run.evaluate,
        examples=everything if args.examples is None else args.examples,
        batches=everything if args.batches is None else args.batches,
        batch_size=args.batch_size or run.evaluate.batch_size,
        metrics=tuple(args.metrics.split(",")) if args.metrics else run.evaluate.metrics,
    )
    decode = dataclasses.replace(run.decode, **options.decode_fields(args))
    return dataclasses.replace(run, evaluate=evaluate, decode=decode)


def show(path: Path, count: int) -> None:
    """Prints the first predictions of a file, and where the rest is."""
    with path.open(encoding="utf-8") as lines:
        for _, line in zip(range(count), lines, strict=False):
            row = json.loads(line)
            right = row["prediction"] in row["references"]
            text = f"  {'=' if right else ' '} {row['input']!s:.60} -> {row['prediction']:.100}"
            if not right:
                text += f"\n      {' | '.join(row['references']):.160}"
            print(escape_controls(text))
    print(f"All predictions: {path}")


COMMAND = Command("eval", parser, measure)
main, run = COMMAND.main, COMMAND.run

if __name__ == "__main__":
    COMMAND.start()
