# SPDX-License-Identifier: Apache-2.0
"""python -m t5x_lite.plan: memory and speed of a run on chips that are not there."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from t5x_lite import config
from t5x_lite.cli import gin_arguments
from t5x_lite.cli.command import Command
from t5x_lite.cli.options import number_parser
from t5x_lite.cli.parser import Parser
from t5x_lite.cli.progress import stderr_console
from t5x_lite.config.checked import Count, NotNegative, ShareAboveZero
from t5x_lite.config.training_run import require_training
from t5x_lite.utils import exit_status
from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.paths import (
    CACHE,
    cache_folder,
    local_argument,
    parse_output_path,
    path_argument,
)

DESCRIPTION = """\
Compiles the training step of a run, or a step of decoding, for a TPU slice that is not there, and
reports from the compiler's program whether it fits, what each chip computes, moves and sends, and
how long that takes at best. Needs no chip, but libtpu: the extra "plan"."""

EXAMPLES = """\
examples:
  python -m t5x_lite.plan --gin_file=configs/runs/pretrain.gin --topology=v5e:4x4
      the run as its files say
  ... --gin_file=configs/models/t5_1_1_xxl.gin --topology=v5e:16x16 --gin.config.Mesh.data=1
      --gin.config.Mesh.fsdp=256 --gin.BATCH_SIZE=2048 --price=1.2
      another model, weights split over all chips, and what 10^9 tokens cost at 1.2 per chip-hour
  ... --topology=v6e:8x8 --search
      tries meshes, microbatches and rematerialization, and ranks what fits
  ... --topology=v5e:2x4 --decode --decode_rows=64 --decode_length=256
      one token for each of 64 rows, over a cache of 256 slots
  ... --chips=h100x8
      by arithmetic alone, for chips that nothing here compiles for
  ... --topology=v5e:4x4 --parameters
      where every parameter is placed, and its bytes on each chip

FLOPs and bytes are read from the optimized program, loops counted as often as they run. Times are
rooflines, not measurements: FLOPs over the peak, bytes of HBM over its bandwidth, collectives over
the links that their chips have. A real step takes longer: the second column is --efficiency times
the speed at best.

Exit status: 0 it fits, 1 it does not, 2 the request is refused with a reason."""


def parser() -> Parser:
    """Parser of the command."""
    command = Parser("plan", description=DESCRIPTION, epilog=EXAMPLES)
    gin_arguments.add_gin(command)
    chips = command.add_mutually_exclusive_group(required=True)
    chips.add_argument("--topology", help="a TPU slice to compile for: v5e:4x4, v5p:4x4x4 ...")
    chips.add_argument("--chips", help="chips to calculate for, without compiling: h100x8 ...")
    add = command.add_argument
    add("--decode", action="store_true", help="plan a step of decoding instead")
    add("--decode_rows", type=number_parser(Count), default=64, help="rows at once (64)")
    add(
        "--decode_length",
        type=number_parser(Count),
        help="new tokens of a row (Decode.max_new_tokens)",
    )
    add(
        "--efficiency",
        type=number_parser(ShareAboveZero),
        default=0.4,
        help="share of the speed at best that a real step is assumed to reach (0.4; PaLM 540B used "
        "0.46 of the peak, arXiv 2204.02311, table 3; measure yours)",
    )
    add("--price", type=number_parser(NotNegative), help="price of one chip for an hour")
    add("--parameters", action="store_true", help="list where every parameter is placed")
    ranked = "rank meshes, microbatches and rematerialization that fit"
    add("--search", action="store_true", help=ranked)
    add(
        "--compiles",
        type=number_parser(Count),
        default=3,
        help="how many that fit --search finds (3)",
    )
    kept = f"where --search keeps its results ({CACHE}/plans.json)"
    add("--cache", type=local_argument, metavar="FILE", help=kept)
    add("--json", type=path_argument, metavar="FILE", help="write the report to this file too")
    return command


def run_plan(args: argparse.Namespace) -> int:
    """Plans or searches, as the options say; returns the exit status."""
    from t5x_lite import data

    run = data.load_run(args.gin_file, args.bindings)
    check_options(args, run)
    # Before jax is imported: libtpu reads its environment once.
    from t5x_lite.planning import preparing

    if args.topology:
        preparing.prepare()
    else:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from t5x_lite.planning import chips

    slice_ = chips.parse_topology(args.topology) if args.topology else chips.parse_chips(args.chips)
    if args.parameters:
        return print_placement(run, slice_)
    if args.search:
        return rank_plans(run, slice_, args)
    return report_plan(run, slice_, args)


def check_options(args: argparse.Namespace, run: config.Run) -> None:
    """Raises ValueError for what cannot be planned."""
    if args.decode and (args.search or args.chips):
        raise ValueError("--decode is compiled for a --topology, without --search")
    if args.chips and (args.search or args.parameters):
        raise ValueError("--search and --parameters are for a --topology, not for --chips")
    if not args.decode:
        require_training(run, ", or plan --decode")
    if run.distillation is not None and not args.decode:
        raise ValueError(
            "A plan knows of no teacher: --gin.config.Run.distillation=None plans the student alone"
        )


def report_plan(run: config.Run, slice_: Any, args: argparse.Namespace) -> int:
    """Reports on one run on one slice; returns 0 if it fits, else 1.

    Args:
      run: config of the run.
      slice_: the chips.
      args: options of the command.
    """
    from t5x_lite.planning import arithmetic, compiled, report, steps

    if args.chips:
        training = require_training(run)
        figures = arithmetic.figures(training, slice_, arithmetic.step_shapes(training))
    else:
        decoding = None
        if args.decode:
            decoding = steps.Decoding(
                args.decode_rows, args.decode_length or run.decode.max_new_tokens
            )
        waiting = f"compiling for {slice_.count} chips, which can take minutes"
        if run.grpo is not None and not args.decode:
            waiting += "; samples are another program, of which --decode plans a step"
        stderr_console().print(waiting)
        figures = compiled.figures(run, slice_, decoding)
    report.show(figures, args.price, args.efficiency)
    write_json(args.json, report.record(figures, args.price, args.efficiency))
    return 0 if figures.memory.fits else exit_status.FAILURE


def print_placement(run: config.Run, slice_: Any) -> int:
    """Prints where every parameter is placed; returns 0."""
    from t5x_lite.planning import report

    print(report.placement_text(run, slice_))
    return 0


def rank_plans(run: config.Run, slice_: Any, args: argparse.Namespace) -> int:
    """Ranks the ways to run on a slice that fit; returns 1 if none does.

    Args:
      run: config of the run.
      slice_: the chips.
      args: options of the command.
    """
    from t5x_lite.planning import compiled, report, searching

    console = stderr_console()
    ways = searching.candidates(require_training(run), slice_)
    if not ways:
        COMMAND.say(
            f"nothing fits {slice_.name} by arithmetic, on any mesh: take more chips or "
            "fewer rows (BATCH_SIZE), and see that BATCH_SIZE is a multiple of data x fsdp"
        )
        return exit_status.FAILURE
    console.print(f"{len(ways)} ways may fit by arithmetic; the first {args.compiles} that do")
    results = searching.search(
        ways,
        args.compiles,
        lambda way: compiled.figures(way, slice_),
        Path(args.cache) if args.cache else cache_folder() / "plans.json",
        console,
    )
    if not results:
        COMMAND.say(f"none of {3 * args.compiles} ways fits {slice_.name}: take more chips")
        return exit_status.FAILURE
    report.console().print(report.search_table(results, args.price, slice_.count))
    print(f"\nthe first of them: {results[0]['bindings']}")
    write_json(args.json, {"search": results})
    return 0


def write_json(file: str | None, record: dict[str, Any]) -> None:
    """Writes a record if there is a file for it."""
    if file is not None:
        path = parse_output_path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(record, indent=1) + "\n")


COMMAND = Command("plan", parser, run_plan)
main, run = COMMAND.main, COMMAND.run

if __name__ == "__main__":
    COMMAND.start()
