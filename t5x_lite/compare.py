# SPDX-License-Identifier: Apache-2.0
"""python -m t5x_lite.compare: trains and measures encoder-decoder and decoder-only twins."""

import argparse

from t5x_lite.cli import gin_arguments
from t5x_lite.cli.command import Command
from t5x_lite.cli.parser import Parser
from t5x_lite.utils.paths import is_address, local_path

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

MODEL_DIR:
  <twin>-<seed>/       a run folder each, for eval, infer and convert; predictions
  measured/            quality and speed, one file each
  report.html          tables, pictures and text in one file; report.json, *.png"""


def parser() -> Parser:
    """Parser of the command."""
    command = Parser("compare", description=DESCRIPTION, epilog=EXAMPLES)
    gin_arguments.add_gin(command)
    command.add_argument("--dry_run", action="store_true", help="print the twins, train nothing")
    return command


def compare(args: argparse.Namespace) -> None:
    """Prints the twins; trains and measures what is left, and writes the report."""
    from t5x_lite import config, data
    from t5x_lite.config.training_run import require_comparison

    run = require_comparison(data.load_run(args.gin_file, args.bindings))
    from t5x_lite import sharding
    from t5x_lite.comparison import measurements, quality, report, twins
    from t5x_lite.training import host

    config.require(
        not is_address(run.model_dir),
        f"MODEL_DIR is {run.model_dir}: the twins and measurements of compare, many small "
        "files that are edited, have to be on a disk of this machine",
    )
    folder = local_path(run.model_dir)
    quality.check_measurements(run)
    host.prepare_jax()
    run = host.with_device_dtype(run, args.gin_file, args.bindings)
    sharding.use_mesh(run.mesh)
    family = twins.make_family(run)
    rows = [measurements.describe_twin(run, twin) for twin in family]
    record = {"matched": run.compare.matched, "twins": rows}
    print_twins(report.twins_table(record))
    if not args.dry_run:
        record = measurements.measure_twins(run, family, record, args.modules)
        page = report.write_report(record, folder)
        print(f"The comparison: {page}")


def print_twins(rows: list[list[str]]) -> None:
    """Prints the table of twins, its first row being the heads."""
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(*rows[0][:1], *(Column(head, justify="right") for head in rows[0][1:]))
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)


COMMAND = Command("compare", parser, compare, afterwards="the same command goes on from here")
main, run = COMMAND.main, COMMAND.run

if __name__ == "__main__":
    COMMAND.start()
