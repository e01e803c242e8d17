# SPDX-License-Identifier: Apache-2.0
"""python -m t5x_lite.compare: trains and measures encoder-decoder and decoder-only twins."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from t5x_lite.cli import gin_arguments
from t5x_lite.cli.command import Command
from t5x_lite.cli.parser import Parser
from t5x_lite.utils.nearest import suggest
from t5x_lite.utils.paths import is_address, local_path

if TYPE_CHECKING:
    from t5x_lite.config.training_run import ComparisonRun

DESCRIPTION = """\
Trains twins that differ in architecture alone, measures them, and writes one page about it. The
config is a run of the encoder-decoder with config.Run.compare bound (config.Compare names the
twins, what they are matched by, and the number of seeds). The same command again goes on."""

EXAMPLES = """\
examples:
  python -m t5x_lite.compare --gin_file=configs/runs/compare_g2p.gin --dry_run
      the twins, their depth and width, and how near they match; trains nothing
  python -m t5x_lite.compare --gin_file=configs/runs/compare_g2p.gin
      trains every twin with every seed (hours), measures quality, speed and memory
  ... --gin.TRAIN_STEPS=500 --gin.config.Compare.seeds=1
      quickly, to see the report
  ... --gin.config.Compare.seeds=1 \\
      '--gin.config.Compare.trained={"encoder_decoder": ("runs/a",), "causal_decoder": ("runs/b",)}'
      takes trained checkpoints (of any format) instead of training these twins
  python -m t5x_lite.compare --gin_file=configs/runs/compare_sizes.gin
      the same in five sizes, with scaling laws
  python -m t5x_lite.compare --gin_file=configs/runs/compare_claims.gin --quick
      published claims, each decided by a small study; --rows=causal_encoder is one of them

MODEL_DIR:
  <twin>-<seed>/       a run folder each, for eval, infer and convert; predictions
  measured/            quality and speed, one file each; losses by example (.npz)
  report.html          tables, pictures and text in one file; report.json, *.png
  <size or positions>/ a comparison each, of a sweep; sweep.html
  <study>/             a comparison each, of claims; claims.html"""


def parser() -> Parser:
    """Parser of the command."""
    command = Parser("compare", description=DESCRIPTION, epilog=EXAMPLES)
    gin_arguments.add_gin(command)
    command.add_argument("--dry_run", action="store_true", help="print the twins, train nothing")
    command.add_argument(
        "--quick", action="store_true", help="claims with Compare.quick_steps and few examples"
    )
    command.add_argument(
        "--rows", default="", metavar="NAMES", help="rows of the page of claims, with commas"
    )
    return command


def compare(args: argparse.Namespace) -> None:
    """Prints the twins; trains and measures what is left, and writes the report."""
    from t5x_lite import config
    from t5x_lite.comparison import sweep, sweep_report

    run = open_comparison(args.gin_file, args.bindings)
    if run.compare.claims or run.compare.studies:
        compare_claims(args, run)
        return
    config.require(
        not (args.quick or args.rows), "--quick and --rows are for a config with Compare.claims"
    )
    variants = sweep.list_variants(run)
    for variant in variants:
        check_comparison(variant.run)
        print_twins(variant.run, variant.name)
    if args.dry_run:
        return
    records = [sweep.run_variant(variant, args.modules) for variant in variants]
    folder = local_path(run.model_dir)
    page = folder / "report.html"
    if run.compare.is_sweep or run.compare.lengths:
        page = sweep_report.write_sweep(records, run.compare.lengths, folder)
    print(f"The comparison: {page}")


def open_comparison(paths: Sequence[str], bindings: Sequence[str]) -> "ComparisonRun":
    """Reads a comparison, and prepares jax and the mesh for it."""
    from t5x_lite import config, data, sharding
    from t5x_lite.config.training_run import require_comparison
    from t5x_lite.training import host

    run = require_comparison(data.load_run(paths, bindings))
    config.require(
        not is_address(run.model_dir),
        f"MODEL_DIR is {run.model_dir}: the twins and measurements of compare, many small "
        "files that are edited, have to be on a disk of this machine",
    )
    if not run.compare.is_sweep:
        check_comparison(run)
    host.prepare_jax()
    run = host.with_device_dtype(run, paths, bindings)
    sharding.use_mesh(run.mesh)
    return run


def compare_claims(args: argparse.Namespace, run: "ComparisonRun") -> None:
    """Decides the claims of a run and of its studies.

    Args:
      args: arguments of the command.
      run: the run of its .gin files.
    """
    from t5x_lite import config
    from t5x_lite.comparison import claims_page

    folder = local_path(run.model_dir) / ("quick" if args.quick else "")
    rows = [name.strip() for name in args.rows.split(",") if name.strip()]
    runs = {Path(args.gin_file[-1]).stem: run}
    for path in run.compare.studies:
        runs[Path(path).stem] = open_comparison([path], args.bindings)
    known = [name for each in runs.values() for name in each.compare.claims]
    for name in rows:
        config.require(name in known, f"--rows: no row {name!r}; {suggest(name, known)}")
    studies = []
    for name, each in runs.items():
        here = dataclasses.replace(each, model_dir=str(folder / name))
        study = claims_page.select_study(here, name, rows, args.quick)
        if study is not None:
            studies.append(study)
            print_twins(study.run, name)
    if not args.dry_run:
        print(f"The claims: {claims_page.decide_claims(studies, folder, args.modules)}")


def check_comparison(run: "ComparisonRun") -> None:
    """Raises ValueError now for what could not be measured after hours of training."""
    from t5x_lite.comparison import quality

    quality.check_measurements(run)


def print_twins(run: "ComparisonRun", name: str) -> None:
    """Prints the table of the twins of a comparison, under its name."""
    from rich.console import Console
    from rich.table import Column, Table

    from t5x_lite.comparison import measurements, report, twins

    described = [measurements.describe_twin(run, twin) for twin in twins.make_family(run)]
    rows = report.twins_table({"matched": run.compare.matched, "twins": described})
    heads = [Column(head, justify="right") for head in rows[0][1:]]
    table = Table(*rows[0][:1], *heads, title=name or None)
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)


COMMAND = Command("compare", parser, compare, afterwards="the same command goes on from here")
main, run = COMMAND.main, COMMAND.run

if __name__ == "__main__":
    COMMAND.start()
