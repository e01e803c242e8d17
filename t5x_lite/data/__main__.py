# SPDX-License-Identifier: Apache-2.0
"""python -m t5x_lite.data: previews what a run reads."""

import argparse

from t5x_lite import config
from t5x_lite.cli import gin_arguments
from t5x_lite.cli.command import Command
from t5x_lite.cli.options import number_parser
from t5x_lite.cli.parser import Parser
from t5x_lite.config.checked import Count, CountOrZero

DESCRIPTION = """\
Shows what training reads, before anything is trained: real examples of every denoiser as text, and
tables of rates, noise, lengths and fill beside those of the config."""

EXAMPLES = """\
examples:
  python -m t5x_lite.data --gin_file=configs/runs/stdlib_spans.gin
      five examples and the tables, of a run
  python -m t5x_lite.data --gin_file=configs/data/stdlib_ul2.gin --preview=2
      two examples of each of UL2's denoisers; a file of configs/data needs no model
  ... --gin_file=configs/data/objectives/fill_in_the_middle.gin
      after the file of a run: its text by another objective
  ... --gin.config.SpanCorruption.noise_density=0.5
      --gin.NAME=VALUE sets any macro or field of the config
  ... --preview=0 --count=10000
      the tables alone, over more examples
  ... --split=validation
      what evaluation reads: the same noise for every seed
  ... --layout=decoder_only
      rows of a decoder-only model (default: those of the run's model)

columns:
  hidden      share of the text to predict; prefix LM hides what comes after the cut
  mean span   tokens of a hidden span; longer than in the config where sentinels cap the number
  filled      share of places in the rows that are not padding
  loss        tokens of an example that bear loss
  truncated   examples of an epoch that lost tokens to Data.lengths"""


def parser() -> Parser:
    """Parser of the command."""
    command = Parser("data", description=DESCRIPTION, epilog=EXAMPLES)
    gin_arguments.add_gin(command)
    add = command.add_argument
    add(
        "--preview",
        type=number_parser(CountOrZero),
        default=5,
        metavar="N",
        help="examples of each denoiser (5)",
    )
    add("--split", default="train", metavar="NAME", help="which split (train)")
    add(
        "--count",
        type=number_parser(Count),
        default=1000,
        metavar="N",
        help="examples in the tables (1000)",
    )
    layouts = ("encoder_decoder", "decoder_only", "encoder_only")
    add("--layout", choices=layouts, help="rows for this kind of model (that of the run)")
    return command


def show_preview(args: argparse.Namespace) -> None:
    """Prints examples of each denoiser, and the tables."""
    if args.preview < 0 or args.count < max(1, args.preview):
        raise ValueError(
            f"--preview={args.preview} --count={args.count}: the tables need at least one "
            "example, and as many as are shown"
        )
    cfg, layout, seed = load_data(args.gin_file, args.bindings)
    from rich.console import Console

    from t5x_lite.data import preview
    from t5x_lite.data.preview import tables

    denoisers = preview.denoisers(cfg, args.layout or layout, seed, args.split, args.count)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    for denoiser in denoisers:
        for number in range(args.preview):
            console.print(tables.example_panel(denoiser, number))
    console.print(tables.rates_table(denoisers), "", tables.lengths_table(denoisers), sep="\n")


def load_data(files: list[str], bindings: list[str]) -> tuple[config.Data, str, int]:
    """Data, layout and seed of a run, or of config.Data alone.

    Args:
      files: paths of .gin files.
      bindings: NAME=VALUE of the command line.

    Raises:
      ValueError: the run has no data, or the config is not valid.
    """
    from t5x_lite.config import gin_file
    from t5x_lite.data import derived
    from t5x_lite.data.tasks import with_run_vocabulary

    if gin_file.describes_run(files):
        run = with_run_vocabulary(derived.load_run(files, bindings))
        if run.data is None:
            raise ValueError("the run has no config.Data: it is a checkpoint alone")
        return run.data, run.model.batch_layout, run.seed
    data = gin_file.load_data(files, bindings)
    return data, "encoder_decoder" if "inputs" in data.lengths else "decoder_only", 0


COMMAND = Command("data", parser, show_preview)
main, run = COMMAND.main, COMMAND.run

if __name__ == "__main__":
    COMMAND.start()
