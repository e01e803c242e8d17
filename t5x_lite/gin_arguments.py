# SPDX-License-Identifier: Apache-2.0
"""What commands that read .gin files have in common: --gin_file, --gin.NAME=VALUE and --import."""

import argparse
import importlib
import sys


def add(parser: argparse.ArgumentParser) -> None:
    """Adds --gin_file and --import; `bindings` reads the rest."""
    parser.add_argument(
        "--gin_file",
        action="append",
        required=True,
        metavar="FILE",
        help="a .gin file; several are read in order, later bindings win",
    )
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="a Python module to import first (registers seqio tasks)",
    )


def bindings(extra: list[str]) -> list[str]:
    """ "NAME=VALUE" of every --gin.NAME=VALUE, also written --gin.NAME VALUE.

    Raises ValueError for anything else.
    """
    found, words = [], list(extra)
    while words:
        word = words.pop(0)
        if not word.startswith("--gin."):
            raise ValueError(f"unknown argument {word!r} (see --help)")
        binding = word.removeprefix("--gin.")
        if "=" not in binding:
            if not words:
                raise ValueError(f"{word} needs a value: {word}=VALUE")
            binding = f"{binding}={words.pop(0)}"
        found.append(binding)
    return found


def bring(modules: list[str]) -> None:
    """Imports a user's modules, those of the working folder too; raises ValueError where one is
    not found."""
    sys.path.insert(0, "")
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module.partition(".")[0]:
                raise
            raise ValueError(
                f"--import={module}: there is no such module here or installed"
            ) from error
