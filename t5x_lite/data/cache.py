# SPDX-License-Identifier: Apache-2.0
"""Tokens kept on disk: for each feature one flat array and the offsets of its examples.

A folder is written once, under a name that depends on the task, its source and its vocabularies,
and never changed. Its digests are checked when it is opened; a damaged folder is replaced.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from t5x_lite.data import content
from t5x_lite.data.corpora import TextExample
from t5x_lite.data.token_writer import META, CacheEntry, checksum, write_folder
from t5x_lite.utils.paths import cache_folder

log = logging.getLogger(__name__)

FORMAT = 4  # raised when the same source gives other ids or another order, and for other files
# Errors of JSON that is not what was written.
MALFORMED = (ValueError, KeyError, AttributeError, TypeError, RecursionError)
KEY = 20  # hexadecimal digits of a folder's key


class DamagedTokens(ValueError):
    """A folder of the cache does not hold what was written to it."""


@dataclass(frozen=True)
class Feature:
    """Token ids of all examples end to end.

    Attributes:
      tokens: ids of all examples [total], uint16 or int32.
      offsets: example i is tokens[offsets[i] : offsets[i + 1]], int64 [examples + 1].
      eos: id of the end.
      ends: true if every example finishes with `eos`, which then also survives truncation.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    eos: int
    ends: bool

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def count_ended(self) -> int:
        """Counts the examples that finish with `eos`."""
        full = self.lengths > 0
        return int((self.tokens[self.offsets[1:][full] - 1] == self.eos).sum())

    def __getitem__(self, i: int) -> np.ndarray:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class Tokens:
    """A split in tokens.

    Attributes:
      name: of task and split.
      inputs: feature of the inputs; None for text alone.
      targets: feature of the targets.
      digest: of all ids.
      rows: text of the examples where it was kept.
      counts: counts of the reader (broken lines), by name.
      negatives: feature of the hard negatives; None without them.
    """

    name: str
    inputs: Feature | None
    targets: Feature
    digest: str
    rows: "Rows | None"
    counts: dict[str, int]
    negatives: Feature | None = None

    def __len__(self) -> int:
        return len(self.targets)


class Rows:
    """Text of examples, one JSON line each, read on access."""

    def __init__(self, path: Path, offsets: np.ndarray):
        self.offsets = offsets
        # Stays open, so that a folder that is replaced meanwhile is still read.
        self.file = open(path, "rb")  # noqa: SIM115

    def __getitem__(self, i: int) -> TextExample:
        begin, end = int(self.offsets[i]), int(self.offsets[i + 1])
        inputs, targets, references = json.loads(os.pread(self.file.fileno(), end - begin, begin))
        return TextExample(inputs, targets, tuple(references))

    def __iter__(self) -> Iterator[TextExample]:
        return (self[i] for i in range(len(self.offsets) - 1))

    def __del__(self):
        file = getattr(self, "file", None)
        if file is not None:
            file.close()


def open_tokens(cache_dir: str, entry: CacheEntry) -> Tokens:
    """Opens the tokens of an entry; they are written first if the cache lacks them, and again if
    they are damaged.

    Raises ValueError if there are no examples, or if the folder cannot be read or written.
    """
    root = cache_folder(cache_dir)
    folder = root / f"{prefix_of(entry)}{key_of(entry)}"
    if folder.exists():
        there = folder_state(folder)
        try:
            tokens = read_folder(folder, entry.name)
            log.info(
                "%s: tokens of %s; what they were read from is the same",
                entry.name,
                date_of(folder),
            )
            return tokens
        except DamagedTokens as error:
            log.warning("The tokens in %s are damaged (%s): they are written again", folder, error)
            remove_folder(folder, there)
        write_folder(root, folder, entry)
    else:
        write_folder(root, folder, entry)
        report_older(root, folder, entry)
    return read_folder(folder, entry.name)


def prefix_of(entry: CacheEntry) -> str:
    """Begin of the names of the folders of an entry's task and split."""
    return f"{entry.name.replace('/', '_')}-"


def key_of(entry: CacheEntry) -> str:
    """Digest of an entry's identity, the end of its folder's name."""
    whole = json.dumps({"format": FORMAT, **entry.identity}, sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:KEY]


def find_similar(cache_dir: str, entry: CacheEntry, but: str) -> Path | None:
    """Finds the newest folder whose identity differs from the entry's in one field alone.

    Args:
      cache_dir: folder of cached tokens.
      entry: the entry, which has no folder.
      but: the field.

    Returns:
      The folder; None if there is none, or the entry has one.
    """
    root = cache_folder(cache_dir)
    if (root / f"{prefix_of(entry)}{key_of(entry)}").exists():
        return None
    wanted = entry.identity | {but: None}
    similar = [
        folder
        for folder, identity in list_folders(root, entry)
        if identity is not None and identity | {but: None} == wanted
    ]
    return max(similar, key=lambda folder: folder.stat().st_mtime, default=None)


def list_folders(root: Path, entry: CacheEntry) -> list[tuple[Path, dict | None]]:
    """Folders of an entry's task and split with their identities; None for one that this version
    does not read."""
    prefix, folders = prefix_of(entry), []
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if folder.name.startswith(prefix) and len(folder.name) == len(prefix) + KEY:
            try:
                identity = read_meta(folder)["identity"]
            except (DamagedTokens, OSError):
                identity = None
            folders.append((folder, identity))
    return folders


def report_older(root: Path, folder: Path, entry: CacheEntry) -> None:
    """Lists the folders that hold the same task and split of another source.

    They are not removed: another run may read them, or its data may come back.

    Args:
      root: folder of the cache.
      folder: the new folder.
      entry: its identity.
    """
    same = ("task", "split", "vocabularies")
    older = [
        each
        for each, identity in list_folders(root, entry)
        if each != folder
        and (identity is None or all(identity.get(k) == entry.identity.get(k) for k in same))
    ]
    if older:
        size = sum(path.stat().st_size for each in older for path in each.iterdir())
        log.warning(
            "%s was tokenized again: its data, or the code that reads them, are not those of %s. "
            "Older copies take %.1f MB; delete those that no run needs: %s",
            entry.name,
            date_of(max(older, key=lambda each: each.stat().st_mtime)),
            size / 1e6,
            ", ".join(map(str, older)),
        )


def date_of(folder: Path) -> str:
    """Date and time at which a folder was written."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(folder.stat().st_mtime))


def folder_state(folder: Path) -> tuple[int, int] | None:
    """Values that differ between a folder and another one in its place; None if it is gone."""
    try:
        status = folder.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def remove_folder(folder: Path, state: tuple[int, int] | None) -> None:
    """Removes a damaged folder, at once for all who would open it.

    Of several processes that find the damage, the first one writes the folder again; the others
    leave what is there then.

    Args:
      folder: the folder.
      state: of the damaged one.

    Raises:
      ValueError: it cannot be removed.
    """
    if folder_state(folder) != state:
        return
    aside = folder.with_name(f".{folder.name}-damaged-{os.getpid()}")
    try:
        folder.rename(aside)
    except FileNotFoundError:  # another process was faster
        return
    except OSError as error:
        raise ValueError(
            f"The cached tokens in {folder} are damaged and cannot be removed ({error}): delete "
            "that folder, or bind another Data.cache_dir"
        ) from error
    shutil.rmtree(aside, ignore_errors=True)


def read_meta(folder: Path) -> dict:
    """Reads the metadata of a finished folder.

    Raises:
      DamagedTokens: they are not those that were written.
      OSError: they cannot be read.
    """
    try:
        meta = json.loads((folder / META).read_text())
        expected = meta.pop("checksum")
    except (FileNotFoundError, *MALFORMED) as error:
        raise DamagedTokens(f"{META}: {type(error).__name__} {error}") from error
    if checksum(meta) != expected:
        raise DamagedTokens(f"{META} has changed")
    return meta


def check_files(folder: Path, meta: dict) -> None:
    """Checks the files of a folder by their digests, once for each state of a file.

    Raises:
      DamagedTokens: one is missing or has changed.
      OSError: one cannot be read.
    """
    paths = [folder / name for name in meta["files"]]
    absent = [path.name for path in paths if not path.exists()]
    if absent:
        raise DamagedTokens(f"{absent[0]} is missing")
    digests = content.digest_files(paths, folder.parent)
    for path in paths:
        if digests[str(path)] != meta["files"][path.name]:
            raise DamagedTokens(f"{path.name} has changed")


def read_folder(folder: Path, name: str) -> Tokens:
    """Maps the tokens of a finished folder into memory.

    Raises:
      DamagedTokens: the folder does not hold what was written to it.
      ValueError: it cannot be read.
    """
    try:
        meta = read_meta(folder)
        check_files(folder, meta)
        features = {
            side: map_feature(folder, side, feature) for side, feature in meta["features"].items()
        }
        offsets = folder / "rows_offsets.npy"
        rows = Rows(folder / "rows.jsonl", np.load(offsets)) if offsets.exists() else None
    except OSError as error:
        raise ValueError(
            f"The cached tokens in {folder} cannot be read now ({error}): run again, or bind "
            "another Data.cache_dir"
        ) from error
    digests = "".join(feature["digest"] for feature in meta["features"].values())
    return Tokens(
        name=name,
        inputs=features.get("inputs"),
        targets=features["targets"],
        digest=hashlib.sha256(digests.encode()).hexdigest()[:20],
        rows=rows,
        counts=meta["counts"],
        negatives=features.get("negatives"),
    )


def map_feature(folder: Path, name: str, meta: dict) -> Feature:
    """Maps one feature of a finished folder into memory.

    Args:
      folder: of the entry.
      name: "inputs", "targets" or "negatives".
      meta: what `FeatureWriter.close` returned.
    """
    offsets = np.load(folder / f"{name}_offsets.npy")
    path, dtype = folder / f"{name}.bin", np.dtype(meta["dtype"])
    empty = meta["tokens"] == 0
    # A plain array on the mapped memory: numpy's memmap class makes every access slower.
    ids = np.zeros(0, dtype) if empty else np.asarray(np.memmap(path, dtype, mode="r"))
    return Feature(ids, offsets, meta["eos"], meta["ends"])
