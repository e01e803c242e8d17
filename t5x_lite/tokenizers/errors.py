# SPDX-License-Identifier: Apache-2.0
"""Errors of files that cannot be read, and of the libraries that read them."""

import contextlib
from collections.abc import Generator
from pathlib import Path


class SourceError(ValueError):
    """A checkpoint is broken, incomplete or of a kind that is not read."""


@contextlib.contextmanager
def naming_path(path: Path, what: str) -> Generator[None]:
    """Turns errors inside into a SourceError that names the path: libraries raise many kinds.

    Args:
      path: the file or folder.
      what: the part of it that is read, "its tokenizer".
    """
    try:
        with panics_as_errors():
            yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise SourceError(f"{path}: {what} cannot be read: {describe_error(error)}") from error


def describe_error(error: Exception) -> str:
    """Class and beginning of the message of an error."""
    return f"{type(error).__name__}: {str(error)[:200]}"


class GgufError(ValueError):
    """A .gguf file is cut off, or contradicts itself; the message names it."""


@contextlib.contextmanager
def panics_as_errors() -> Generator[None]:
    """Turns a panic of the tokenizers library, which is not an Exception, and its errors, which are
    of no other class than Exception, into ValueErrors."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library fails on it: {str(error)[:200]}") from error
