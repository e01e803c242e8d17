# SPDX-License-Identifier: Apache-2.0
"""Reading of files that somebody else wrote: regular ones, of a bounded size, JSON of any depth."""

import json
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from t5x_lite.utils.paths import parse_path

# The largest index of safetensors shards that is published has 9 MB. Parsed, JSON takes up to 20
# times its bytes.
MOST_JSON = 2**25


class UnreadableFileError(ValueError):
    """A file that is not what its name says; the message names it."""


def check_regular(path: str | Path, most: int | None = None) -> None:
    """Checks that a path is a file with an end; a pipe or a device would be waited for.

    Args:
      path: the file.
      most: its bytes at most; None for any number.

    Raises:
      UnreadableFileError: it is another kind of file, or larger.
      OSError: it is missing.
    """
    status = parse_path(path).stat()
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableFileError(f"{path} is not a regular file")
    if most is not None and status.st_size > most:
        raise UnreadableFileError(
            f"{path} has {status.st_size:,} bytes; at most {most:,} are read of such a file"
        )


def parse_json(text: str | bytes, pairs_hook: Callable[[list], Any] | None = None) -> Any:
    """The value of a JSON text.

    Args:
      text: the text; bytes are UTF-8.
      pairs_hook: makes an object of its pairs; None for a dict.

    Raises:
      ValueError: it is not JSON, or nests deeper than Python's stack.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs_hook)
    except RecursionError as error:
        raise ValueError("it nests too deep") from error


def repeated_name(pairs: list[tuple[str, Any]]) -> str | None:
    """The first name that a JSON object has twice; None where all differ. Takes linear time."""
    names = [name for name, _ in pairs]
    if len(set(names)) == len(names):
        return None
    counts = Counter(names)
    return next(name for name in names if counts[name] > 1)


def read_json(path: str | Path, most: int = MOST_JSON) -> Any:
    """The value in a .json file.

    Args:
      path: the file.
      most: its bytes at most.

    Raises:
      UnreadableFileError: it is not a regular file, too large, or not JSON.
      OSError: it is missing, or cannot be read.
    """
    check_regular(path, most)
    try:
        return parse_json(parse_path(path).read_bytes().decode("utf-8"))
    except ValueError as error:
        raise UnreadableFileError(f"{path} is not JSON: {error}") from error


def read_json_object(path: str | Path, most: int = MOST_JSON) -> dict[str, Any]:
    """The object in a .json file, with the errors of `read_json`.

    Args:
      path: the file.
      most: its bytes at most.
    """
    content = read_json(path, most)
    if not isinstance(content, dict):
        raise UnreadableFileError(
            f"{path} should hold an object of JSON; it holds {type(content).__name__}"
        )
    return content
