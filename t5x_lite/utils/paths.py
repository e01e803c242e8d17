# SPDX-License-Identifier: Apache-2.0
"""Paths as people type them, in a config, on a command line or in Python, and the user's cache."""

import argparse
import functools
import os
import re
import sys
import tempfile
from pathlib import Path

CACHE = "~/.cache/t5x_lite"
BUCKET = "mount the bucket first and name the folder"
REMEDIES = {
    "file": "leave out file://",
    "hf": "a model of the hub can be read as a checkpoint, and not written",
    "http": "download it first",
    "https": "download it first",
}
ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def check_local(text: str) -> str:
    """Returns the text of a path; raises ValueError for an address.

    Only mounted file systems are read and written: gs://bucket/run would be the folder `gs:` of
    the working folder.
    """
    if address := ADDRESS.match(text):
        remedy = REMEDIES.get(address[1].lower(), BUCKET)
        raise ValueError(f"{text} is an address, not a path of this machine: {remedy}")
    return text


def local_path(text: str | os.PathLike) -> Path:
    """The path that a person typed, with ~ as the home folder.

    Raises:
      ValueError: it is an address such as gs://bucket/run, or empty.
    """
    text = os.fspath(text)
    if not text.strip():
        raise ValueError("the path is empty")
    try:
        return Path(check_local(text)).expanduser()
    except RuntimeError as error:  # no home folder, or none of that user
        raise ValueError(f"{text}: {error}") from error


def expand_home(text: str) -> str:
    """The text of `local_path`."""
    return str(local_path(text))


def path_argument(text: str) -> str:
    """The path of an option, for `type=` of argparse; "-" is a stream.

    Raises:
      argparse.ArgumentTypeError: as ValueError of `local_path`.
    """
    try:
        return text if text == "-" else str(local_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def cache_folder(text: str = CACHE) -> Path:
    """A folder for what can be made again; a temporary one if the home folder cannot be written.

    Args:
      text: as a person typed it. A folder outside of the home folder is taken as it is: an error
        of writing there has its remedy in another one.

    Raises:
      ValueError: as `local_path`.
    """
    if not text.startswith("~"):
        return local_path(text)
    try:
        folder = local_path(text)
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        return temporary_cache(text, getattr(error, "strerror", None) or str(error))
    return folder if os.access(folder, os.W_OK | os.X_OK) else temporary_cache(text, "read-only")


def explain_unwritable(folder: Path) -> str:
    """The reason why files cannot be written below a folder, which may not exist yet; "" if none.

    It makes nothing: what is there already, the nearest folder above, decides.
    """
    try:
        nearest = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    except (OSError, ValueError, StopIteration) as error:
        return getattr(error, "strerror", None) or str(error)
    if not nearest.is_dir():
        return f"{nearest} is not a folder"
    return "" if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} is read-only"


@functools.cache
def temporary_cache(text: str, reason: str) -> Path:
    """A temporary folder in place of a cache, which one line on stderr reports."""
    folder = Path(tempfile.mkdtemp(prefix="t5x_lite-"))
    print(f"{text} cannot be written ({reason}): cached in {folder} instead", file=sys.stderr)
    return folder
