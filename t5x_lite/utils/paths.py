# SPDX-License-Identifier: Apache-2.0
"""Paths as people type them, in a config, on a command line or in Python, and the user's cache."""

import argparse
import functools
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

from t5x_lite.utils import remote_paths
from t5x_lite.utils.extras import install_command

CACHE = "~/.cache/t5x_lite"
# Stores that fsspec's list has and that are reached in a better way.
REMEDIES = {
    "file": "leave out file://",
    "hf": "a model of the hub can be read as a checkpoint, and not written",
}
ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# An address that lost a slash would be a folder of this machine.
ONE_SLASH = re.compile(r"(gs|s3|hf|https?|file):/", re.IGNORECASE)


def is_address(text: str | os.PathLike) -> bool:
    """True for an address such as gs://bucket/run, false for a path of this machine."""
    return ADDRESS.match(os.fspath(text)) is not None


def check_local(text: str) -> str:
    """Returns the text of a path of this machine; raises ValueError for an address."""
    if is_address(text):
        raise ValueError(
            f"{text} is an address, and this has to be on a disk of this machine: name a folder or "
            "file here"
        )
    return text


def check_path(text: str) -> str:
    """Returns the text of a path or of an address that can be read; raises ValueError for others,
    with the remedy."""
    check_slashes(text)
    if is_address(text):
        parse_path(text)
    return text


def check_slashes(text: str) -> None:
    """Raises ValueError for an address with a slash too few."""
    if (short := ONE_SLASH.match(text)) and not is_address(text):
        rest = text[short.end() :]
        raise ValueError(f"{text} has one slash; an address has two: {short[1]}://{rest}")


def local_path(text: str | os.PathLike) -> Path:
    """The path of this machine that a person typed, with ~ as the home folder.

    Raises:
      ValueError: it is an address such as gs://bucket/run, or one with a slash too few, or empty.
    """
    text = os.fspath(text)
    if not text.strip():
        raise ValueError("the path is empty")
    check_slashes(text)
    try:
        return Path(check_local(text)).expanduser()
    except RuntimeError as error:  # no home folder, or none of that user
        raise ValueError(f"{text}: {error}") from error


def parse_path(text: str | os.PathLike) -> Path:
    """The path that a person typed: of this machine, or the address of something in a bucket.

    Returns:
      A Path, or for an address a `remote_paths.RemotePath`, which has the same methods.

    Raises:
      ValueError: it is empty, or an address of a store that cannot be read here.
    """
    text = os.fspath(text)
    address = ADDRESS.match(text)
    if not address:
        return local_path(text)
    scheme, rest = address[1].lower(), text[address.end() :]
    check_store(text, scheme)
    if not rest.strip("/"):
        raise ValueError(f"{text} names no bucket: {scheme}://BUCKET/NAME")
    return cast(Path, remote_paths.RemotePath(f"{scheme}://{rest}"))


@functools.cache
def check_store(text: str, scheme: str) -> None:
    """Raises ValueError where no installed library reads a store, with the remedy.

    Args:
      text: the address.
      scheme: its beginning, in lower case: "gs".
    """
    if scheme in REMEDIES:
        raise ValueError(f"{text} is an address that is not read: {REMEDIES[scheme]}")
    try:
        import fsspec

        remote_paths.prepare_stores()
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        raise ValueError(
            f"{text} is of no known store: name a path of this machine, gs://BUCKET/NAME or "
            "s3://BUCKET/NAME"
        ) from None
    except ImportError as error:
        extra = f"the extra buckets ({install_command('buckets')})"
        needed = extra if scheme in ("gs", "s3", "http", "https") else f"a library ({error})"
        raise ValueError(f"{text} is in a store: reading it needs {needed}") from error


def parse_output_path(text: str | os.PathLike) -> Path:
    """`parse_path` of something that is written; raises ValueError too for a store that is only
    read."""
    path: Any = parse_path(text)
    if is_address(text):
        path.check_writable()
    return path


def expand_output_path(text: str) -> str:
    """The text of `parse_output_path`."""
    return str(parse_output_path(text))


def path_argument(text: str) -> str:
    """The path or address of an option, for `type=` of argparse; "-" is a stream.

    Raises:
      argparse.ArgumentTypeError: as ValueError of `parse_path`.
    """
    try:
        return text if text == "-" else str(parse_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def local_argument(text: str) -> str:
    """The path of an option that has to be on this machine, for `type=` of argparse.

    Raises:
      argparse.ArgumentTypeError: as ValueError of `local_path`.
    """
    try:
        return str(local_path(text))
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
