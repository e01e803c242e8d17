# SPDX-License-Identifier: Apache-2.0
"""The parser of every command: unknown options first, near names, one line for a mistake."""

import argparse
import contextlib
import re
import sys
from collections.abc import Generator
from typing import NoReturn

from absl import app, flags, logging
from absl.flags import argparse_flags

from t5x_lite import config
from t5x_lite.cli import gin_arguments
from t5x_lite.config import aliases
from t5x_lite.utils import exit_status, nearest


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps descriptions as they are written, and has room for long options on a line."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, max_help_position=35, **kwargs)


class MistakeError(ValueError):
    """A mistake among the options of a command that is called from Python."""


class Parser(argparse_flags.ArgumentParser):
    """argparse with absl's flags for logging and debugging, and with `.gin` bindings.

    Help keeps descriptions and examples as they are written. Of absl's flags it shows --verbosity
    alone; the rest, such as --pdb and --log_dir, are accepted.

    Attributes:
      command: name of the command, which begins its messages.
    """

    def __init__(self, command: str, **kwargs):
        """Makes a parser with --help, --verbosity and --import.

        Args:
          command: name of the command, such as "train".
          **kwargs: as of argparse.ArgumentParser: description, epilog, and prog.
        """
        self.command = command
        self.raises = False
        subcommand = "prog" in kwargs
        super().__init__(
            prog=kwargs.pop("prog", f"python -m t5x_lite.{command}"),
            formatter_class=HelpFormatter,
            allow_abbrev=False,
            inherited_absl_flags=absl_flags(),
            **kwargs,
        )
        self._option_string_actions["--helpfull"].help = argparse.SUPPRESS
        verbosity = self._option_string_actions["--verbosity"]
        verbosity.metavar = "N"
        verbosity.help = "log warnings (-1, the default), 0: also steps, 1: also details"
        # A default of the subcommand would replace what stands before it.
        gin_arguments.add_import(self, default=argparse.SUPPRESS if subcommand else [])

    def parse(self, arguments: list[str] | None = None, raises: bool = False) -> argparse.Namespace:
        """Options of the command line; `bindings` are the NAME=VALUE of its --gin.NAME=VALUE.

        Unknown options are reported before required ones that are missing: --chckpoint=x is a
        misspelled --checkpoint. Options of earlier versions (`config.aliases`) are taken by their
        old names too.

        Args:
          arguments: words of the command line; those of the process if None.
          raises: raise ValueError for a mistake, for callers in Python.

        Raises:
          SystemExit: after --help (status 0), or after one line about a mistake (status 2).
          ValueError: a mistake, if `raises`.
        """
        self.raises = raises
        words = sys.argv[1:] if arguments is None else list(arguments)
        bindings = []
        try:
            words = aliases.rename_options(words, self.option_names())
            if "--gin_file" in self.option_names():
                words, bindings = gin_arguments.split_bindings(words)
            with nothing_required(self):
                unknown = self.parse_known_args(words)[1]
            if unknown:
                self.error(self.unknown(unknown[0]))
            options = self.parse_args(words)
        except MistakeError:
            raise
        except (ValueError, flags.Error) as error:
            self.error(str(error))
        options.bindings = bindings
        return options

    def format_help(self) -> str:
        """The text of --help. Options are not listed twice: the first line only says [options]."""
        if self.usage is None and not any(subparsers(action) for action in self._actions):
            positional = " ".join(each.dest.upper() for each in self._get_positional_actions())
            self.usage = f"%(prog)s [options] {positional}".rstrip()
        return super().format_help()

    def option_names(self) -> list[str]:
        """Options that --help shows, those of subcommands included."""
        names = []
        for action in self._actions:
            if action.help != argparse.SUPPRESS:
                names += action.option_strings
            for parser in subparsers(action):
                names += parser.option_names()
        return names

    def unknown(self, word: str) -> str:
        """Message about a word of the command line that is not an option."""
        if not word.startswith("-"):
            return f"unknown argument {word!r} (--help lists the options)"
        option = word.partition("=")[0]
        name = option.lstrip("-")
        names = {each.lstrip("-") for each in self.option_names() if each.startswith("--")}
        if "beams" in names and ("Decode", name) in aliases.ELSEWHERE:
            hint = aliases.suggest_field(name, "Decode", names, "--")
            return f"unknown option {option}: {hint}"
        if "beams" in names and name in config.Decode.__dataclass_fields__:
            return (
                f"unknown option {option}: this field of config.Decode has none; set it in the "
                f"run's config, or pass {name}=... to session.generate"
            )
        near = nearest.near_names(name, names)
        if not near:
            return f"unknown option {option} (--help lists the options)"
        return f"unknown option {option}: did you mean {' or '.join('--' + each for each in near)}?"

    def error(self, message: str) -> NoReturn:
        """Ends the process with one line about a mistake of the command line, or raises it."""
        message = re.sub(r"^argument (\S+): (?=must be )", r"\1 ", message)
        if self.raises:
            raise MistakeError(message)
        print(f"t5x_lite.{self.command}: error: {message}", file=sys.stderr)
        raise SystemExit(exit_status.MISTAKE)


def absl_flags() -> flags.FlagValues:
    """Flags of absl.app and absl.logging.

    Those of other modules are left out: a library that is imported could define --seed.
    """
    values = flags.FlagValues()
    defined = flags.FLAGS.flags_by_module_dict()
    for module in (logging, app):
        for flag in defined.get(module.__name__, ()):
            values[flag.name] = flag
    return values


def subparsers(action: argparse.Action) -> list["Parser"]:
    """Parsers of the subcommands that an argument chooses from."""
    if isinstance(action, argparse._SubParsersAction):
        return [parser for parser in action.choices.values() if isinstance(parser, Parser)]
    return []


@contextlib.contextmanager
def nothing_required(parser: argparse.ArgumentParser) -> Generator[None]:
    """Makes every option of a parser and of its subcommands optional for a while."""
    with contextlib.ExitStack() as inside:
        for action in parser._actions:
            for each in subparsers(action):
                inside.enter_context(nothing_required(each))
        parts = [
            part for part in (*parser._actions, *parser._mutually_exclusive_groups) if part.required
        ]
        for part in parts:
            part.required = False
        try:
            yield
        finally:
            for part in parts:
                part.required = True
