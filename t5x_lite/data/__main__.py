# SPDX-License-Identifier: Apache-2.0
"""Shows what a run reads: python -m t5x_lite.data --help."""

import argparse
import logging
import sys

from t5x_lite import gin_arguments

TEACHING = """\
Shows what training reads, before anything is trained: real examples of every denoiser as text, and
tables of rates, noise, lengths and fill beside what the config asks for.

examples
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
      what evaluation reads: the same noise whatever the seed
  ... --layout=joined
      as a decoder alone reads it; without, as the run's model does

what it says
  hidden      share of the text that is asked for; prefix LM hides what comes after the cut
  mean span   tokens of a hidden span; spans are longer than asked where sentinels cap their number
  filled      share of places in the rows that are not padding
  loss        tokens of an example that bear loss
  truncated   examples of an epoch that lost tokens to Data.lengths"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m t5x_lite.data",
        description=TEACHING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    gin_arguments.add(made)
    made.add_argument(
        "--preview", type=int, default=5, metavar="N", help="examples of each denoiser (5)"
    )
    made.add_argument("--split", default="train", metavar="NAME", help="which split (train)")
    made.add_argument(
        "--count", type=int, default=1000, metavar="N", help="examples in the tables (1000)"
    )
    made.add_argument(
        "--layout",
        choices=("pair", "joined", "aligned"),
        help="an encoder-decoder's, a decoder's or an encoder's rows (the model's own)",
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; gives back its exit status."""
    known, extra = parser().parse_known_args(arguments)
    try:
        command(known, gin_arguments.bindings(extra))
    except ValueError as error:
        print(f"t5x_lite.data: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stderr.close()
    return 0


def command(known: argparse.Namespace, bindings: list[str]) -> None:
    if known.preview < 0 or known.count < max(1, known.preview):
        raise ValueError(
            f"--preview={known.preview} --count={known.count}: the tables need at least one "
            "example, and as many as are shown"
        )
    gin_arguments.bring(known.modules)
    from rich.console import Console

    from t5x_lite.data import preview, preview_tables

    cfg, layout, seed = described(known.gin_file, bindings)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    found = preview.denoisers(cfg, known.layout or layout, seed, known.split, known.count)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    for denoiser in found:
        for number in range(known.preview):
            console.print(preview_tables.shown(denoiser, number))
    console.print(preview_tables.rates(found), "", preview_tables.lengths(found), sep="\n")


def described(files: list[str], bindings: list[str]):
    """Data, layout and seed of a run; of config.Data alone, those that need no model."""
    from t5x_lite import config_file

    if config_file.describes_run(files):
        run = config_file.load(files, bindings)
        if run.data is None:
            raise ValueError("the run has no config.Data: it is a checkpoint alone")
        return run.data, run.model.layout, run.seed
    data = config_file.load_data(files, bindings)
    return data, "pair" if "inputs" in data.lengths else "joined", 0


if __name__ == "__main__":
    sys.exit(main())
