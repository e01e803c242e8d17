# SPDX-License-Identifier: Apache-2.0
"""python -m t5x_lite.average: averages the weights of checkpoints into a new one."""

import argparse
import sys
from typing import Any

from t5x_lite.cli.command import Command
from t5x_lite.cli.options import number_parser
from t5x_lite.cli.parser import Parser
from t5x_lite.config.checked import Count, ShareAboveZero
from t5x_lite.utils.hub_names import source_argument
from t5x_lite.utils.paths import parse_output_path, path_argument

EXAMPLES = """\
examples:
  # the last five checkpoints of a run (which has config.Checkpoint.keep = 5 or more)
  python -m t5x_lite.average --from=runs/adapted --last=5 --to=runs/adapted_mean
  # those of some steps
  python -m t5x_lite.average --from=runs/g2p --steps=6000,8000,10000 --to=runs/g2p_mean
  # the newest counts most: each older one half as much as the one after it
  python -m t5x_lite.average --from=runs/g2p --last=5 --decay=0.5 --to=runs/g2p_mean
  # several runs of one model (a soup), also of Hugging Face folders and .gguf files
  python -m t5x_lite.average --from=runs/seed0 --from=runs/seed1 --weights=2,1 --to=runs/soup
  # the averaged copy that a run keeps with config.Train.average
  python -m t5x_lite.average --from=runs/g2p --copy --to=runs/g2p_copy

The output is a run folder for train, eval, infer and convert; its average.json names the
checkpoints. Models and vocabularies must be the same. One layer is in memory at a time, sums are in
float64. Of adapters (LoRA) over one base, these alone are averaged. Nothing is replaced.
"""


def parser() -> Parser:
    """Parser of the command."""
    command = Parser(
        "average",
        description="Averages the weights of checkpoints of one model.",
        epilog=EXAMPLES,
    )
    add = command.add_argument
    add(
        "--from",
        dest="origins",
        action="append",
        type=source_argument,
        required=True,
        metavar="PATH",
        help="a run folder, a Hugging Face folder, a .gguf file or a model of the hub; again for "
        "another one",
    )
    add("--to", type=path_argument, required=True, metavar="PATH", help="the run folder to write")
    chosen = command.add_mutually_exclusive_group()
    last = "the newest N checkpoints of the one run"
    chosen.add_argument("--last", type=number_parser(Count), metavar="N", help=last)
    steps = "its checkpoints of these steps (default: the newest of each --from)"
    chosen.add_argument("--steps", type=parse_steps, metavar="N,N", help=steps)
    copy = "the averaged copy that each run keeps (config.Train.average), not its weights"
    add("--copy", action="store_true", help=copy)
    factors = command.add_mutually_exclusive_group()
    weights = "factors of the checkpoints in their order (default: all alike)"
    factors.add_argument("--weights", type=parse_factors, metavar="W,W", help=weights)
    decay = "factor from each checkpoint to the one before it, in (0, 1]"
    factors.add_argument("--decay", type=number_parser(ShareAboveZero), metavar="D", help=decay)
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the mean (default: that of the checkpoints)",
    )
    add("--dry_run", action="store_true", help="print the checkpoints and shares, write nothing")
    return command


def parse_steps(text: str) -> list[int]:
    """Steps of "1000,2000".

    Raises:
      argparse.ArgumentTypeError: the text is not a list of steps, or one is named twice.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and word.isascii() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of steps such as 1000,2000")
    steps = [int(word) for word in words]
    if len(set(steps)) < len(steps):
        raise argparse.ArgumentTypeError(f"{text!r} names a step twice")
    return steps


def parse_factors(text: str) -> list[float]:
    """Positive numbers of "2,1".

    Raises:
      argparse.ArgumentTypeError: the text is not a list of positive numbers.
    """
    try:
        factors = [float(word) for word in text.split(",")]
    except ValueError:
        factors = []
    if not factors or not all(1e-30 < factor < 1e30 for factor in factors):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive numbers such as 2,1")
    return factors


def average(args: argparse.Namespace) -> None:
    """Opens and compares all checkpoints before anything is written."""
    import jax

    from t5x_lite.checkpoints import averaging, outputs, unfinished
    from t5x_lite.utils.hub import source_identity

    to = parse_output_path(args.to)
    if not args.dry_run:
        unfinished.check_output_folder(to)
    opened = open_all(args)
    kind, factors = choose_factors(args, len(opened))
    parts = [
        averaging.AveragedPart(
            source_identity(source), each.step, averaging.select_weights(each, args.copy), factor
        )
        for (source, each), factor in zip(opened, factors, strict=True)
    ]
    dtype = None if args.dtype is None else jax.numpy.dtype(args.dtype)
    weights = averaging.AveragedWeights(parts, dtype)
    newest, described = opened[-1][1], averaging.describe_average(kind, parts, args.copy)
    contents = outputs.CheckpointContents(
        newest.run,
        newest.text,
        newest.step,
        newest.kept,
        base=newest.adapters.base_digests() if newest.adapters and not args.dry_run else {},
        average=described,
    )
    output = outputs.RunFolderOutput(contents, to, outputs.OutputSettings("ours"))
    shares = [each["share"] for each in described["checkpoints"]]
    table = [f"{share:8.4f}  {part.name}" for share, part in zip(shares, parts, strict=True)]
    target = sys.stdout if args.dry_run else sys.stderr
    print("\n".join(["   share  checkpoint", *table]), file=target)
    if args.dry_run:
        print(f"{output.size(weights) / 1e9:,.3f} GB. Nothing was written.")
        return
    outputs.write_output(output, weights, to)
    print(to, file=sys.stderr)


def open_all(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """The checkpoints that the options name, oldest first, each with its source.

    Raises:
      ValueError: one is not there, or they are not of one model.
    """
    from t5x_lite.adaptation.vocabulary_compatibility import describe_pair_difference
    from t5x_lite.checkpoints import averaging
    from t5x_lite.checkpoints.opening import open_checkpoint
    from t5x_lite.utils.not_none import not_none

    steps = choose_steps(args)
    opened = [(source, open_checkpoint(source, step)) for source, step in steps]
    (_, first), *others = opened
    for _, other in others:
        averaging.check_same_model(first, other)
        there, here = not_none(first.text).vocabularies, not_none(other.text).vocabularies
        difference = describe_pair_difference(there, here)
        for one, two in zip(there, here, strict=True):
            if difference is None and one.size != two.size:
                difference = f"there are {one.size:,} ids there and {two.size:,} here"
        if difference is not None:
            raise ValueError(
                f"{first.path} (there) and {other.path} (here) have different vocabularies: "
                f"{difference}"
            )
    return opened


def choose_steps(args: argparse.Namespace) -> list[tuple[str, int | None]]:
    """Source and step of each checkpoint; no step for the newest or only one.

    Raises:
      ValueError: --last or --steps with several sources, or of more checkpoints than there are.
    """
    from t5x_lite.checkpoints.step_folders import list_steps

    flag = "--last" if args.last is not None else "--steps"
    if args.last is None and args.steps is None:
        return [(source, None) for source in args.origins]
    if len(args.origins) > 1:
        raise ValueError(f"{flag} chooses among the checkpoints of one run: give one --from")
    source = args.origins[0]
    if args.steps is not None:
        return [(source, step) for step in args.steps]
    steps = list_steps(source)
    if len(steps) < args.last:
        raise ValueError(
            f"--last={args.last}: {source} has {len(steps)} checkpoints"
            + (f" (steps {', '.join(map(str, steps))})" if steps else "")
            + ". A run keeps more of them with config.Checkpoint.keep"
        )
    return [(source, step) for step in steps[-args.last :]]


def choose_factors(args: argparse.Namespace, count: int) -> tuple[str, list[float]]:
    """Kind of the mean, and the factor of each checkpoint.

    Raises:
      ValueError: there are not as many factors as checkpoints, or one checkpoint alone.
    """
    if count == 1 and not args.copy:
        raise ValueError(
            "One checkpoint is its own mean: name several with --from, --last or --steps, or the "
            "averaged copy of a run with --copy"
        )
    if args.weights is not None:
        if len(args.weights) != count:
            raise ValueError(
                f"--weights has {len(args.weights)} factors, but there are {count} checkpoints"
            )
        return "weighted", args.weights
    if args.decay is not None:
        return "exponential", [args.decay ** (count - 1 - number) for number in range(count)]
    return "copy" if count == 1 else "uniform", [1.0] * count


COMMAND = Command(
    "average", parser, average, afterwards="nothing was written", rewrites_weights=True
)
main, run = COMMAND.main, COMMAND.run

if __name__ == "__main__":
    COMMAND.start()
