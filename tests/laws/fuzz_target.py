# SPDX-License-Identifier: Apache-2.0
"""A reader with whole files to begin with, and small texts that many of them contain."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

WORDS = ["the dog", "naïve café 東京", "numbers 12 67.8", "a  b\tc", ""]


class Target(NamedTuple):
    """A reader to attack.

    Attributes:
      make: make(folder) writes whole files there.
      read: read(folder) reads them as a command would.
      names: what an error may name besides the files: the source of content that is no file.
      repairs: the reader may write there: it replaces what is broken.
    """

    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    names: tuple[str, ...] = ()
    repairs: bool = False


def write_json(folder: Path, **objects: Any) -> None:
    """Writes each keyword as a JSON file."""
    for name, content in objects.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def write_jsonl(path: Path, rows: list[Any]) -> None:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def refill(folder: Path, write: Callable[[Path], Any]) -> None:
    """Writes into a folder that exists, by way of one that does not."""
    write(folder / "made")
    for path in (folder / "made").iterdir():
        path.rename(folder / path.name)
    (folder / "made").rmdir()
