# SPDX-License-Identifier: Apache-2.0
"""A command from its command line to its exit status, the same way for all."""

import argparse
import dataclasses
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from t5x_lite.cli import gin_arguments
from t5x_lite.cli.parser import Parser
from t5x_lite.utils import exit_status
from t5x_lite.utils.text_lines import escape_controls


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of t5x_lite: how it is parsed, what it does, how it ends.

    A mistake of the user ends it with one line and status 2, a failure with status 1 (one line
    where the reason is known, else a traceback), a signal with 128 + its number.

    Attributes:
      name: "train"; messages begin with t5x_lite.train.
      parser: makes its parser.
      work: does the work by the parsed options; returns the exit status (None is 0).
      afterwards: how things stand after an interruption or a failure: "nothing was written".
      rewrites_weights: it works on weights in the host's memory and leaves the accelerator to
        those who train; SIGTERM removes what was begun.
    """

    name: str
    parser: Callable[[], Parser]
    work: Callable[[argparse.Namespace], int | None]
    afterwards: str = ""
    rewrites_weights: bool = False

    def main(self, arguments: list[str] | None = None) -> int:
        """Runs the command in this process and returns its exit status.

        Args:
          arguments: words of the command line; those of the process if None.

        Raises:
          SystemExit: it ended with a mistake or a failure, after one line on stderr.
        """
        return self.execute(self.parser().parse(arguments))

    def run(
        self,
        gin_file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
        bindings: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> int:
        """Runs the command by Python values, in a notebook or a script; returns its exit status.

            train.run("configs/runs/g2p.gin", {"MODEL_DIR": "runs/g2p", "TRAIN_STEPS": 500})
            evaluate.run(checkpoint="runs/g2p", split="test", beams=4)

        Args:
          gin_file: a .gin file, or several that are read in order.
          bindings: values by the name of a macro or field: what --gin.NAME=VALUE sets.
          **options: other options of the command, by name: True for one without a value; a list
            for one that may be given again.

        Raises:
          ValueError: a mistake that would end the command with status 2.
        """
        files = [gin_file] if isinstance(gin_file, str | os.PathLike) else gin_file
        words = [f"--gin_file={file}" for file in files]
        words += [f"--gin.{name}={write_value(value)}" for name, value in (bindings or {}).items()]
        for name, value in options.items():
            every = value if isinstance(value, list | tuple) else [value]
            words += [
                f"--{name}" if each is True else f"--{name}={each}"
                for each in every
                if each is not None and each is not False
            ]
        arguments = self.parser().parse(words, raises=True)
        gin_arguments.import_modules(arguments.modules)
        return self.work(arguments) or 0

    def start(self) -> NoReturn:
        """Runs the command as this process, through absl.app."""
        vars(warnings)["formatwarning"] = self.format_warning
        app.run(self.execute, flags_parser=self.parse_flags)

    def parse_flags(self, words: list[str]) -> argparse.Namespace:
        """Options of the command line, with logging set up; `words` begin with the program."""
        # absl's own default is 0 once flags are parsed: orbax would log every file.
        flags.FLAGS.verbosity = logging.WARNING
        options = self.parser().parse(words[1:])
        if logging.get_verbosity() <= logging.WARNING:
            # Warnings are for the user, who does not ask which line of which file says so.
            logging.get_absl_handler().setFormatter(None)
        flags.FLAGS.mark_as_parsed()
        return options

    def format_warning(self, message: Warning | str, category: type, *place: Any) -> str:
        """A warning as a line of the command: without the place in our code, which is no help.

        Args:
          message: the warning.
          category: its class; one of ours is a UserWarning.
          *place: file, line number and source of the line that warns.
        """
        if category is UserWarning:
            return escape_controls(f"t5x_lite.{self.name}: warning: {message}\n")
        return f"{place[0]}:{place[1]}: {category.__name__}: {message}\n"

    def execute(self, options: argparse.Namespace) -> int:
        """Imports the user's modules, does the work, and returns the exit status.

        Raises:
          SystemExit: it ended with a mistake or a failure, after one line on stderr.
        """
        try:
            if self.rewrites_weights:
                prepare_host()
            gin_arguments.import_modules(options.modules)
            return self.work(options) or 0
        except BrokenPipeError:
            # The reader, such as head, has seen enough; the flush at exit must not complain either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except KeyboardInterrupt as error:
            return self.interrupted(error)
        except (ValueError, OSError) as error:
            self.stop(error)
        except (RuntimeError, MemoryError) as error:
            if not exit_status.is_out_of_memory(error):
                raise
            reason = (str(error).splitlines() or ["the host has too little"])[0]
            self.stop(exit_status.OutOfMemoryError(f"Out of memory ({reason})"))

    def interrupted(self, error: KeyboardInterrupt) -> int:
        """Prints that a signal ended the command; returns its exit status."""
        status = getattr(error, "exit_status", 128 + signal.SIGINT)
        self.say(f"stopped by {signal.Signals(status - 128).name}", self.afterwards)
        return status

    def stop(self, error: Exception) -> NoReturn:
        """Ends the command with one line about its error."""
        logging.debug("t5x_lite.%s ends with this error", self.name, exc_info=error)
        status = exit_status.exit_status(error)
        failed = status != exit_status.MISTAKE and isinstance(error, OSError)
        self.say(f"error: {error}", self.afterwards if failed else "")
        raise SystemExit(status)

    def say(self, text: str, more: str = "") -> None:
        """Prints a line of the command on stderr."""
        line = f"t5x_lite.{self.name}: {text}{'; ' + more if more else ''}"
        print(escape_controls(line), file=sys.stderr)


def write_value(value: Any) -> str:
    """A Python value as it stands in a .gin file; references (@name, %NAME) stay as they are."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    reference = isinstance(value, str) and value.startswith(("@", "%"))
    return value if reference else repr(value)


def prepare_host() -> None:
    """Leaves the accelerator alone, and makes SIGTERM an exit that cleans up."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
