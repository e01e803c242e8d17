# SPDX-License-Identifier: Apache-2.0
"""--gin_file, --gin.NAME=VALUE and --import."""

import argparse
import importlib
import sys
from typing import Any

from t5x_lite.utils.paths import path_argument

BINDING = "--gin."


def add_gin(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,
    required: bool = True,
    text: str = "a .gin file; several are read in order, later bindings win",
) -> None:
    """Adds --gin_file; with it, the command also takes --gin.NAME=VALUE.

    Args:
      parser: the parser, or a group of its options.
      required: whether the command needs a file.
      text: what the file is for.
    """
    parser.add_argument(
        "--gin_file",
        type=path_argument,
        action="append",
        required=required,
        default=[],
        metavar="FILE",
        help=text,
    )


def add_import(parser: argparse.ArgumentParser, default: Any) -> None:
    """Adds --import; `import_modules` acts on it. The default is [], or none for a subcommand."""
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=default,
        metavar="MODULE",
        help="a Python module to import first (registers seqio tasks)",
    )


def split_bindings(words: list[str]) -> tuple[list[str], list[str]]:
    """Returns the words without --gin.NAME=VALUE, and the "NAME=VALUE" of those.

    --gin.NAME VALUE, in two words, is the same.

    Raises:
      ValueError: one has no value.
    """
    rest, bindings, left = [], [], list(words)
    while left:
        word = left.pop(0)
        if not word.startswith(BINDING):
            rest.append(word)
            continue
        binding = word.removeprefix(BINDING)
        if "=" not in binding:
            if not left:
                raise ValueError(f"{word} needs a value: {word}=VALUE")
            binding = f"{binding}={left.pop(0)}"
        bindings.append(binding)
    return rest, bindings


def import_modules(modules: list[str]) -> None:
    """Imports a user's modules, those of the working folder too.

    Raises:
      ValueError: a module, or one that it imports itself, is not installed.
    """
    if modules and "" not in sys.path:
        sys.path.insert(0, "")
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if module == missing or module.startswith(f"{missing}."):
                why = "there is no such module here or installed"
            else:
                why = str(error)
            raise ValueError(f"--import={module}: {why}") from error
