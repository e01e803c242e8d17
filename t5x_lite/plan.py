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
from t5x_lite.config.checked import Count, NotNegative, Share, ShareAboveZero
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
  ... --gin_file=configs/models/t5_1_1_base.gin --chips=v5ex1 --serve --inputs=512 --quantize=int8
      rows that fit, time to the first token, tokens per second, price of 10^6 tokens; --topology
      compiles the decode step; --phases is encode, prefill and decode on the chip's roofline
  ... --topology=v5e:4x4 --parameters
      where every parameter is placed, and its bytes on each chip

FLOPs and bytes are read from the optimized program, loops counted as often as they run. Times are
rooflines, not measurements: FLOPs over the peak, bytes of HBM over its bandwidth, collectives over
the links that their chips have. A real step takes longer: the second column is --efficiency times
the speed at best.

Exit status: 0 it fits, 1 it does not, 2 the request is refused with a reason."""

# Rows at once, and ids of an input where neither an option nor a run has them.
ROWS, INPUTS = 64, 512
# Bits of a key or a value.
CACHES = {"int8": 8, "int4": 4}
# Options that plan decoding.
KINDS = {
    "decode": "a step of decoding",
    "serve": "a server: rows that fit, speed, price of a token",
    "phases": "encode, prefill and decode on one roofline",
}
# Share of draft tokens that are accepted, where nothing was measured.
ACCEPTANCE = 0.7


def parser() -> Parser:
    """Parser of the command."""
    command = Parser("plan", description=DESCRIPTION, epilog=EXAMPLES)
    gin_arguments.add_gin(command)
    chips = command.add_mutually_exclusive_group(required=True)
    chips.add_argument("--topology", help="a TPU slice to compile for: v5e:4x4, v5p:4x4x4 ...")
    chips.add_argument("--chips", help="chips to calculate for, without compiling: h100x8 ...")
    add = command.add_argument
    add_decoding(command)
    add(
        "--efficiency",
        type=number_parser(ShareAboveZero),
        default=0.4,
        help="share of the speed at best that a real step is assumed to reach (0.4; PaLM 540B used "
        "0.46 of the peak, arXiv 2204.02311, table 3; measure yours)",
    )
    dated = "price of one chip for an hour; --serve names the source and date of its own"
    add("--price", type=number_parser(NotNegative), help=dated)
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


def add_decoding(command: Parser) -> None:
    """Adds the options of decoding in place of training."""
    group = command.add_argument_group("decoding, in place of training")
    add = group.add_argument
    what = group.add_mutually_exclusive_group()
    for name, text in KINDS.items():
        what.add_argument(f"--{name}", action="store_true", help=text)
    what.add_argument(
        "--draft", metavar="SIZES", help="draft models that pay, LAYERSxWIDTH: 1x256,2x512"
    )
    add(
        "--acceptance",
        type=number_parser(Share),
        help="share of draft tokens accepted, as eval reports it (--draft; 0.7)",
    )
    add(
        "--decode_rows",
        type=number_parser(Count),
        help="rows at once (64; --serve: as many as fit)",
    )
    add(
        "--decode_length",
        type=number_parser(Count),
        help="new tokens of a row (Decode.max_new_tokens)",
    )
    add("--inputs", type=number_parser(Count), help="ids of an input (Data.lengths)")
    add("--quantize", metavar="KIND", help="layers in int8, int4, int4:32, ...")
    add("--cache_dtype", choices=CACHES, help="format of caches, by arithmetic")
    add("--plot", type=path_argument, metavar="FILE", help="draw --phases or --serve")


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
    if args.draft:
        return plan_drafts(run, slice_, args)
    if args.serve or args.phases:
        return plan_serving(run, slice_, args)
    if args.parameters:
        return print_placement(run, slice_)
    if args.search:
        return rank_plans(run, slice_, args)
    return report_plan(run, slice_, args)


def check_options(args: argparse.Namespace, run: config.Run) -> None:
    """Raises ValueError for what cannot be planned."""
    decoded = next((f"--{name}" for name in (*KINDS, "draft") if getattr(args, name)), None)
    if args.acceptance is not None and not args.draft:
        raise ValueError("--acceptance is of draft models: add --draft")
    check_decoding(args, decoded)
    if args.chips and (args.search or args.parameters):
        raise ValueError("--search and --parameters are for a --topology, not for --chips")
    if decoded is None:
        require_training(run, ", or plan --decode")
    if run.distillation is not None and decoded is None:
        raise ValueError(
            "A plan knows of no teacher: --gin.config.Run.distillation=None plans the student alone"
        )


def check_decoding(args: argparse.Namespace, decoded: str | None) -> None:
    """Raises ValueError for options of decoding that contradict each other.

    Args:
      args: options of the command.
      decoded: the option that plans decoding; None for training.
    """
    if args.decode and args.chips:
        raise ValueError(
            "--decode is compiled for a --topology; --phases is arithmetic for --chips"
        )
    if decoded and (args.search or args.parameters):
        raise ValueError(f"{decoded} plans decoding: --search and --parameters are of training")
    for name in ("inputs", "quantize", "cache_dtype", "plot"):
        if getattr(args, name) is not None and decoded is None:
            raise ValueError(f"--{name} is of decoding: add --serve, --phases or --decode")
    if args.cache_dtype is not None and (args.decode or args.serve and args.topology):
        raise ValueError(
            "--cache_dtype is not compiled: take --chips (v5ex1) in place of --topology"
        )
    if args.plot is not None and args.decode:
        raise ValueError("--plot draws --phases and --serve")


def plan_serving(run: config.Run, slice_: Any, args: argparse.Namespace) -> int:
    """Reports on a server, or its phases; returns 0 if it fits, else 1.

    Args:
      run: config of the run.
      slice_: the chips.
      args: options of the command.
    """
    from t5x_lite.planning import phases, serving, serving_report

    sizes = text_sizes(run, args)
    known = phases.serving_arithmetic(run, slice_, sizes)
    if args.phases:
        listed = serving_report.show_phases(known, args.decode_rows or ROWS * known.shards)
        record: dict[str, Any] = {"phases": [serving.record_phase(phase) for phase in listed]}
        fits = True
    else:
        price = slice_.chip.price if args.price is None else args.price
        plan = serving.plan_server(known, price, args.decode_rows)
        if args.topology and plan.memory.fits:
            stderr_console().print(f"compiling for {slice_.count} chips, which can take minutes")
            plan = serving.compile_server(run, slice_, plan)
        serving_report.show_server(plan, args.efficiency)
        listed, record, fits = plan.phases, serving.record_plan(plan), plan.memory.fits
    write_json(args.json, record)
    if args.plot is not None:
        serving_report.draw_roofline(listed, parse_output_path(args.plot))
    return 0 if fits else exit_status.FAILURE


def text_sizes(run: config.Run, args: argparse.Namespace) -> Any:
    """Sizes of a served text, and formats, that options or a run have."""
    from t5x_lite.planning import phases

    inputs = args.inputs or (run.data.lengths.get("inputs") if run.data else None)
    return phases.TextSizes(
        inputs=inputs or INPUTS,
        new_tokens=args.decode_length or run.decode.max_new_tokens,
        quantize=args.quantize,
        cache_bits=CACHES[args.cache_dtype] if args.cache_dtype else None,
    )


def plan_drafts(run: config.Run, slice_: Any, args: argparse.Namespace) -> int:
    """Ranks draft models by arithmetic; returns 0.

    Args:
      run: config of the target.
      slice_: the chips.
      args: options of the command.
    """
    from rich.table import Table

    from t5x_lite.planning import drafts, report

    acceptance = ACCEPTANCE if args.acceptance is None else args.acceptance
    plans = drafts.rank_drafts(
        run,
        slice_,
        text_sizes(run, args),
        drafts.parse_sizes(args.draft),
        rows=args.decode_rows or 1,
        acceptance=acceptance,
    )
    heads, *rows = drafts.draft_table(plans)
    table = Table(*heads, title=f"{slice_.name}: draft models at an acceptance of {acceptance:.2f}")
    for row in rows:
        table.add_row(*row)
    report.console().print(table)
    write_json(args.json, {"drafts": [plan._asdict() for plan in plans]})
    return 0


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
                args.decode_rows or ROWS,
                args.decode_length or run.decode.max_new_tokens,
                args.inputs,
                args.quantize,
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
