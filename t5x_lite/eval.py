# SPDX-License-Identifier: Apache-2.0
"""python -m t5x_lite.eval: measures a trained run on held-out data."""

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path

from t5x_lite import config
from t5x_lite.evaluation import options

EXAMPLES = """\
examples:
  # loss, perplexity, bits per byte and the task's metrics on the validation split
  python -m t5x_lite.eval --checkpoint=runs/g2p
  # the test split with 4 beams, from the best checkpoint
  python -m t5x_lite.eval --checkpoint=runs/g2p --split=test --beams=4 --best
  # a quick look: 200 examples, other metrics, the numbers as JSON too
  python -m t5x_lite.eval --checkpoint=runs/g2p --examples=200 --metrics=exact_match,bleu \\
      --json=runs/g2p/test.json
  # a checkpoint of another make has no data of its own: say what it is measured on
  python -m t5x_lite.eval --checkpoint=smollm2.q8_0.gguf --gin_file=configs/data/jsonl_pairs.gin \\
      --gin.config.Files.validation=pairs.jsonl
  # a seqio task of your own: import the module that registers it
  python -m t5x_lite.eval --checkpoint=runs/mine --import=my_tasks

metrics: exact_match, edit_distance, per and wer (phoneme and word error rate), bleu, chrf, rouge.
Predictions are kept as JSONL in DIR/predictions/<split>-<step>.jsonl (of a checkpoint of another
make in runs/NAME): input, prediction, references, score.
"""


def parser() -> options.Parser:
    made = options.Parser(
        prog="python -m t5x_lite.eval",
        description="Measures a trained run on held-out data: losses, and metrics of its texts.",
        epilog=EXAMPLES,
    )
    options.add_checkpoint(made)
    group = made.add_argument_group("what is measured")
    add = group.add_argument
    add("--split", metavar="NAME", help="which split (default: the run's Data.eval_split)")
    add("--examples", type=int, metavar="N", help="write texts for the first N only; 0 for none")
    add("--batches", type=int, metavar="N", help="losses over N batches only; 0 for none")
    add("--metrics", metavar="A,B", help="which metrics (default: those of the task)")
    add("--json", metavar="FILE", help="write the numbers to FILE as well")
    add("--show", type=int, default=5, metavar="N", help="print N predictions (default 5)")
    modules = "import MODULE first: it registers seqio tasks"
    add("--import", dest="modules", action="append", default=[], metavar="MODULE", help=modules)
    add(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="measure on the config.Data of this .gin file, in the vocabulary of the checkpoint; "
        "--gin.NAME=VALUE sets a macro or a field of it",
    )
    options.add_decode(made)
    return made


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        plain, bindings = options.split_gin(arguments)
        given = parser().parse(plain)
        given.bindings = bindings
        sys.path.insert(0, "")
        for module in given.modules:
            importlib.import_module(module)
        measure(given)
    except (ValueError, OSError, ImportError) as error:
        options.stop("t5x_lite.eval", error)


def measure(given: argparse.Namespace) -> None:
    """Restores, evaluates, prints and writes."""
    from t5x_lite.evaluation.evaluate import Evaluator
    from t5x_lite.evaluation.progress import Progress
    from t5x_lite.training import compilation, restore

    compilation.keep_compiled()
    asked = asked_data(given)
    which = given.step, given.best, given.mesh, given.quantize
    restored = restore.restore(given.checkpoint, *which)
    run = settled(with_data(restored.run, asked, given.checkpoint), given)
    evaluator = Evaluator(run, given.split)
    total = min(len(evaluator.dataset), run.evaluate.examples)
    numbers = evaluator(restored.params, restored.step, Progress("examples", total))
    print(f"{given.checkpoint}, step {restored.step}, {evaluator.dataset.name} {evaluator.split}")
    for name, number in numbers.items():
        print(f"  {name:<16}{number:>14,.4f}")
    if evaluator.tally.calls:
        print(evaluator.tally)
    if evaluator.kept is not None:
        show(evaluator.kept, given.show)
    if given.json:
        about = {"checkpoint": given.checkpoint, "step": restored.step, "split": evaluator.split}
        about["quantize"] = given.quantize
        decode = dataclasses.asdict(run.decode)
        report = about | {"decode": decode, "metrics": numbers}
        report["drafting"] = evaluator.tally.report()
        Path(given.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def asked_data(given: argparse.Namespace) -> config.Data | None:
    """What the command line says to measure on; None if that is the checkpoint's own data."""
    from t5x_lite import config_file

    if not given.gin_file and not given.bindings:
        return None
    return config_file.load_data(given.gin_file, given.bindings)


def with_data(run: config.Run, asked: config.Data | None, checkpoint: str) -> config.Run:
    """run with the data asked for, tokenised as the checkpoint wants it.

    Raises:
      ValueError: there are no data.
    """
    path = Path(checkpoint)
    if asked is not None:
        vocabulary = config.Vocabulary(kind="checkpoint", path=checkpoint)
        run = dataclasses.replace(run, data=in_vocabulary(asked, vocabulary))
    if run.data is None:
        raise ValueError(
            f"{path} has no data of its own: name some with --gin_file=FILE, such as "
            "configs/data/cmudict_g2p.gin, or with --gin.config.Data.task=... and "
            "--gin.config.Data.lengths=..."
        )
    # Nothing is written into a checkpoint of another make.
    folder = path if (path / "config.gin").exists() else Path("runs") / path.stem
    return dataclasses.replace(run, model_dir=str(folder))


def in_vocabulary(data: config.Data, vocabulary: config.Vocabulary) -> config.Data:
    """data with this vocabulary; a seqio task keeps its own."""
    from t5x_lite.data import tasks

    def changed(task):
        if isinstance(task, config.Mixture):
            return dataclasses.replace(task, tasks=tuple(map(changed, task.tasks)))
        if isinstance(task, config.Files):
            return dataclasses.replace(task, vocabulary=vocabulary)
        return task

    own = vocabulary if isinstance(data.task, str) and data.task in tasks.BUILT_IN else None
    return dataclasses.replace(data, task=changed(data.task), vocabulary=own)


def settled(run: config.Run, given: argparse.Namespace) -> config.Run:
    """run with what the command line asks for; without a number, all of the split."""
    everything = 2**31 - 1
    evaluate = dataclasses.replace(
        run.evaluate,
        examples=everything if given.examples is None else given.examples,
        batches=everything if given.batches is None else given.batches,
        batch_size=given.batch_size or run.evaluate.batch_size,
        metrics=tuple(given.metrics.split(",")) if given.metrics else run.evaluate.metrics,
    )
    decode = dataclasses.replace(run.decode, **options.chosen(given))
    return dataclasses.replace(run, evaluate=evaluate, decode=decode)


def show(path: Path, count: int) -> None:
    """Prints the first predictions of a file, and where the rest is."""
    with path.open(encoding="utf-8") as lines:
        for _, line in zip(range(count), lines, strict=False):
            row = json.loads(line)
            right = row["prediction"] in row["references"]
            print(f"  {'=' if right else ' '} {row['input']!s:.60} -> {row['prediction']:.100}")
            if not right:
                print(f"      {' | '.join(row['references']):.160}")
    print(f"All predictions: {path}")


if __name__ == "__main__":
    main()
