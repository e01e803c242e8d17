# SPDX-License-Identifier: Apache-2.0
"""python -m t5x_lite, or t5x_lite: lists the commands and runs one of them."""

import importlib
import sys

import t5x_lite
from t5x_lite.utils import exit_status, nearest

# Modules of the commands, and a line about each.
COMMANDS = {
    "train": ("t5x_lite.train", "trains the run of a .gin file"),
    "eval": ("t5x_lite.eval", "measures a trained run on held-out data"),
    "infer": ("t5x_lite.infer", "predicts a text for every line of a file, or scores texts"),
    "convert": ("t5x_lite.convert", "converts checkpoints: ours, Hugging Face, T5X, GGUF"),
    "average": ("t5x_lite.average", "averages the weights of checkpoints into a new one"),
    "adapt": ("t5x_lite.adapt", "makes an encoder-decoder of a pretrained decoder, or the reverse"),
    "distill": ("t5x_lite.distill", "writes a teacher's probabilities or texts for training"),
    "data": ("t5x_lite.data.__main__", "previews what a run reads"),
    "plan": ("t5x_lite.plan", "estimates memory and speed on chips that are not there"),
    "compare": ("t5x_lite.compare", "trains and measures encoder-decoder and decoder-only twins"),
    "tune": ("t5x_lite.tune", "measures block sizes of attention on a TPU"),
    "serve": ("t5x_lite.serve", "serves models with OpenAI's API"),
    "demo": ("t5x_lite.demo.__main__", "serves a local page for one model or several"),
}


def usage() -> str:
    """The commands, one line each."""
    lines = [f"  {name:<9}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: t5x_lite COMMAND ... (or: python -m t5x_lite.COMMAND ...)",
            "",
            *lines,
            "",
            "t5x_lite COMMAND --help explains a command; t5x_lite --version prints the version.",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs a command, or prints the list of them.

    Args:
      arguments: words of the command line; those of the process if None.

    Raises:
      SystemExit: with the exit status of the command, or 2 for one that does not exist.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(usage())
    elif words[0] == "--version":
        print(f"t5x_lite {t5x_lite.__version__}")
    elif words[0] in COMMANDS:
        start_command(words[0], words[1:])
    else:
        hint = nearest.suggest(words[0], COMMANDS)
        print(f"t5x_lite: error: unknown command {words[0]}: {hint}", file=sys.stderr)
        raise SystemExit(exit_status.MISTAKE)


def start_command(name: str, words: list[str]) -> None:
    """Runs a command as this process, with these words as its command line."""
    sys.argv = [f"t5x_lite {name}", *words]
    importlib.import_module(COMMANDS[name][0]).COMMAND.start()


if __name__ == "__main__":
    main()
