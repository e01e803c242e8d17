# SPDX-License-Identifier: Apache-2.0
"""What a run would need and how fast it would be on chips that are not there:
python -m t5x_lite.plan --help."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from t5x_lite import config, gin_arguments

TEACHING = """\
Compiles the training step of a run, or a step of decoding, for a TPU slice that is not there, and
tells from the compiler's program whether it fits, what every chip computes, moves and sends, and
how long that takes at best. Needs no chip; libtpu comes with pip install 't5x_lite[plan]'.

examples
  python -m t5x_lite.plan --gin_file=configs/runs/pretrain.gin --topology=v5e:4x4
      the run as its files say
  ... --gin_file=configs/models/t5_1_1_xxl.gin --topology=v5e:16x16 --gin.config.Mesh.data=1
      --gin.config.Mesh.fsdp=256 --gin.BATCH_SIZE=2048 --price=1.2
      another model, weights split over all chips, and what 10^9 tokens cost at 1.2 per chip-hour
  ... --topology=v6e:8x8 --search
      tries meshes, microbatches and rematerialisation, and ranks what fits
  ... --topology=v5e:2x4 --decode --decode_rows=64 --decode_length=256
      one token for each of 64 rows, over a cache of 256 slots
  ... --chips=h100x8
      by arithmetic alone, for chips that nothing here compiles for
  ... --topology=v5e:4x4 --parameters
      where every parameter lives, and its bytes on each chip

What the numbers are: FLOPs and bytes are read from the optimized program, loops counted as often
as they run. Times are rooflines, no measurements: FLOPs over the peak, bytes of HBM over its
bandwidth, collectives over the links that their chips have. A real step takes longer.

Exit status: 0 it fits, 1 it does not, or the request is refused with a reason."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m t5x_lite.plan",
        description=TEACHING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    gin_arguments.add(made)
    where = made.add_mutually_exclusive_group(required=True)
    where.add_argument("--topology", help="a TPU slice to compile for: v5e:4x4, v5p:4x4x4 ...")
    where.add_argument("--chips", help="chips to calculate for, without compiling: h100x8 ...")
    made.add_argument("--decode", action="store_true", help="a step of decoding instead")
    made.add_argument("--decode_rows", type=int, default=64, help="rows at once (64)")
    made.add_argument("--decode_length", type=int, help="new tokens of a row (Decode.length)")
    made.add_argument("--price", type=float, help="of one chip for an hour")
    made.add_argument("--parameters", action="store_true", help="where every parameter lives")
    made.add_argument("--search", action="store_true", help="look for what fits and is fast")
    made.add_argument("--compiles", type=int, default=3, help="how many --search is to find (3)")
    made.add_argument(
        "--cache",
        type=Path,
        default=Path("~/.cache/t5x_lite/plans.json"),
        help="where --search keeps what it compiled",
    )
    made.add_argument("--json", type=Path, help="write everything to this file too")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; gives back its exit status."""
    known, extra = parser().parse_known_args(arguments)
    try:
        return command(known, gin_arguments.bindings(extra))
    except ValueError as error:
        print(f"t5x_lite.plan: {error}", file=sys.stderr)
        return 1


def command(known: argparse.Namespace, bindings: list[str]) -> int:
    gin_arguments.bring(known.modules)
    from t5x_lite import config_file

    run = config_file.load(known.gin_file, bindings)
    check(known, run)
    # Before jax is imported: libtpu reads its environment once.
    from t5x_lite.planning import preparing

    if known.topology:
        preparing.prepare()
    else:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from t5x_lite.planning import chips

    slice_ = chips.topology(known.topology) if known.topology else chips.counted(known.chips)
    if known.parameters:
        return parameters(run, slice_)
    if known.search:
        return search(run, slice_, known)
    return plan(run, slice_, known)


def check(known: argparse.Namespace, run: config.Run) -> None:
    """Raises ValueError for what cannot be planned."""
    if known.price is not None and known.price < 0:
        raise ValueError(f"--price={known.price} cannot be negative")
    if known.decode_rows < 1 or (known.decode_length or 1) < 1 or known.compiles < 1:
        raise ValueError("--decode_rows, --decode_length and --compiles must be at least 1")
    if known.decode and (known.search or known.chips):
        raise ValueError("--decode is compiled for a --topology, without --search")
    if known.chips and (known.search or known.parameters):
        raise ValueError("--search and --parameters are for a --topology, not for --chips")
    if not known.decode and (run.train is None or run.data is None or run.schedule is None):
        raise ValueError(
            "The config does not train (no Run.train, Run.data or Run.schedule): add a file of "
            "configs/runs such as --gin_file=configs/runs/pretrain.gin, or plan --decode"
        )
    if run.distillation is not None and not known.decode:
        raise ValueError(
            "A plan knows of no teacher: --gin.config.Run.distillation=None plans the student alone"
        )


def plan(run: config.Run, slice_: Any, known: argparse.Namespace) -> int:
    """Tells of one run on one slice."""
    from t5x_lite.planning import arithmetic, compiled, report, steps
    from t5x_lite.training import bar

    if known.chips:
        figures = arithmetic.figures(run, slice_, arithmetic.parts(run))
    else:
        decoding = None
        if known.decode:
            decoding = steps.Decoding(known.decode_rows, known.decode_length or run.decode.length)
        told = f"compiling for {slice_.count} chips, which can take minutes"
        bar.console().print(told)
        figures = compiled.figures(run, slice_, decoding)
    report.show(figures, known.price)
    written(known.json, report.record(figures, known.price))
    return 0 if figures.memory.fits else 1


def parameters(run: config.Run, slice_: Any) -> int:
    """Prints where every parameter lives."""
    from t5x_lite.planning import placement

    print(placement.text(run, slice_))
    return 0


def search(run: config.Run, slice_: Any, known: argparse.Namespace) -> int:
    """Ranks the ways to run on a slice that fit."""
    from t5x_lite.planning import compiled, report, searching
    from t5x_lite.training import bar

    console = bar.console()
    ways = searching.candidates(run, slice_)
    if not ways:
        raise ValueError(
            f"Nothing fits {slice_.name} by arithmetic, on any mesh: take more chips or "
            "fewer rows (BATCH_SIZE), and see that BATCH_SIZE is a multiple of data x fsdp"
        )
    console.print(f"{len(ways)} ways may fit by arithmetic; the first {known.compiles} that do")
    found = searching.search(
        ways,
        known.compiles,
        lambda way: compiled.figures(way, slice_),
        known.cache.expanduser(),
        console,
    )
    if not found:
        raise ValueError(f"None of {3 * known.compiles} ways fits {slice_.name}: take more chips")
    report.console().print(report.search_table(found, known.price, slice_.count))
    print(f"\nthe first of them: {found[0]['bindings']}")
    written(known.json, {"search": found})
    return 0


def written(path: Path | None, record: dict[str, Any]) -> None:
    """Writes a record where one is asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
