# SPDX-License-Identifier: Apache-2.0
"""python -m t5x_lite.tune: measures and remembers block sizes of attention on a TPU."""

import argparse

from t5x_lite.cli import gin_arguments
from t5x_lite.cli.command import Command
from t5x_lite.cli.options import number_parser
from t5x_lite.cli.parser import Parser
from t5x_lite.config.checked import Count

DESCRIPTION = """\
Measures which blocks make flash attention fastest on the TPU at hand, and remembers them. For every
kind of attention of the run (encoder, decoder, cross) it times forward and backward passes with
each pair of blocks, in turns, and takes medians."""

EXAMPLES = """\
examples:
  python -m t5x_lite.tune --gin_file=configs/runs/pretrain.gin
      the attention of a run
  ... --blocks 256 512 1024 --repeats 20
      these lengths of a block, 20 passes each

The fastest go to ~/.cache/t5x_lite/tiles.json (or where T5X_LITE_TILES points), which every later
run on such a chip reads. Without it, blocks are as large as the chip's fast memory allows."""


def parser() -> Parser:
    """Parser of the command."""
    command = Parser("tune", description=DESCRIPTION, epilog=EXAMPLES)
    gin_arguments.add_gin(command)
    add = command.add_argument
    blocks = "lengths of a block to try, multiples of 128 (256 512 1024)"
    add(
        "--blocks",
        type=number_parser(Count),
        nargs="+",
        default=[256, 512, 1024],
        metavar="N",
        help=blocks,
    )
    add(
        "--repeats",
        type=number_parser(Count),
        default=10,
        metavar="N",
        help="passes of each pair, in turns (10)",
    )
    return command


def tune(args: argparse.Namespace) -> None:
    """Measures the blocks of a run and adds them to the table."""
    from t5x_lite import config, data
    from t5x_lite.config.training_run import require_training

    run = require_training(data.load_run(args.gin_file, args.bindings))
    config.require(
        all(block >= 128 and block % 128 == 0 for block in args.blocks),
        "--blocks must be multiples of 128",
    )
    from t5x_lite.kernels import api as kernels
    from t5x_lite.kernels import tile_table
    from t5x_lite.training import tune_attention

    backend, device = kernels.select_backend("auto"), kernels.target_device()
    config.require(
        kernels.has_kernels(backend),
        f"there is no TPU here ({device.kind}), and blocks are a TPU's: nothing to tune. On a TPU "
        "the same command measures and remembers them",
    )
    assert backend is not None
    path = tile_table.table_path()
    measured = tune_attention.tune_run(run, args.blocks, args.repeats, backend)
    tile_table.write_table(path, measured)
    print(f"written to {path}")


COMMAND = Command("tune", parser, tune)
main, run = COMMAND.main, COMMAND.run

if __name__ == "__main__":
    COMMAND.start()
