# SPDX-License-Identifier: Apache-2.0
"""Tokens kept on disk: for each feature one flat array and the offsets of its examples.

A folder is written once, under a name that depends on the task, its source and its vocabularies,
and never changed: it is filled under another name and moved into place, so that a reader sees all
of it or nothing, and two processes may write it at once.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from t5x_lite.data.corpora import TextExample
from t5x_lite.utils.paths import cache_folder

FORMAT = 3  # raised when the same source gives other ids or another order


class Chunk(NamedTuple):
    """Consecutive examples.

    Attributes:
      inputs: token ids of each; None for text alone.
      targets: token ids of each.
      rows: their text, if known.
    """

    inputs: list[np.ndarray] | None
    targets: list[np.ndarray]
    rows: list[TextExample] | None = None


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
    """

    name: str
    inputs: Feature | None
    targets: Feature
    digest: str
    rows: "Rows | None"
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.targets)


class Rows:
    """Text of examples, one JSON line each, read on access."""

    def __init__(self, path: Path, offsets: np.ndarray):
        self.path, self.offsets = path, offsets

    def __getitem__(self, i: int) -> TextExample:
        with open(self.path, "rb") as lines:
            lines.seek(self.offsets[i])
            inputs, targets, references = json.loads(lines.readline())
        return TextExample(inputs, targets, tuple(references))

    def __iter__(self) -> Iterator[TextExample]:
        with open(self.path, "rb") as lines:
            for line in lines:
                inputs, targets, references = json.loads(line)
                yield TextExample(inputs, targets, tuple(references))


class FeatureWriter:
    """Appends ids to a file and remembers where each example ends."""

    def __init__(self, folder: Path, name: str, dtype: type[np.integer], eos: int):
        self.folder, self.name, self.dtype, self.eos = folder, name, np.dtype(dtype), eos
        self.file = open(folder / f"{name}.bin", "wb")
        self.lengths: list[np.ndarray] = []
        self.ends, self.digest = True, hashlib.sha256()

    def write(self, examples: list[np.ndarray]) -> None:
        lengths = np.array([len(example) for example in examples], np.int64)
        flat = np.concatenate(examples).astype(self.dtype)
        last = np.cumsum(lengths) - 1
        self.ends &= bool((lengths > 0).all() and (flat[last] == self.eos).all())
        self.lengths.append(lengths)
        self.digest.update(lengths.tobytes() + flat.tobytes())
        self.file.write(flat.tobytes())

    def close(self) -> dict:
        self.file.close()
        lengths = np.concatenate([np.zeros(1, np.int64), *self.lengths])
        offsets = np.cumsum(lengths)
        np.save(self.folder / f"{self.name}_offsets.npy", offsets)
        return {
            "dtype": self.dtype.name,
            "tokens": int(offsets[-1]),
            "eos": self.eos,
            "ends": self.ends,
            "digest": self.digest.hexdigest(),
        }


class RowWriter:
    """Appends rows of text as JSON lines."""

    def __init__(self, folder: Path):
        self.folder, self.offsets = folder, [0]
        self.file = open(folder / "rows.jsonl", "wb")

    def write(self, rows: list[TextExample]) -> None:
        for row in rows:
            line = json.dumps([row.inputs, row.targets, row.references]).encode() + b"\n"
            self.file.write(line)
            self.offsets.append(self.offsets[-1] + len(line))

    def close(self) -> None:
        self.file.close()
        np.save(self.folder / "rows_offsets.npy", np.array(self.offsets, np.int64))


@dataclass(frozen=True)
class CacheEntry:
    """Identity of a folder of the cache, and the examples that fill it.

    Attributes:
      name: of task and split.
      identity: everything that determines the ids, as JSON.
      chunks: the examples.
      sizes: of the vocabularies (inputs, targets).
      eos: their ids of the end.
      counts: counts of the reader (broken lines), complete after the last chunk.
      keep_rows: true to keep the text too.
    """

    name: str
    identity: dict
    chunks: Iterable[Chunk]
    sizes: tuple[int, int]
    eos: tuple[int, int]
    counts: dict[str, int]
    keep_rows: bool


def open_tokens(cache_dir: str, entry: CacheEntry) -> Tokens:
    """Opens the tokens of an entry, written first if they are not in the cache.

    Raises ValueError if there are no examples, or if a folder of the cache is damaged.
    """
    whole = json.dumps({"format": FORMAT, **entry.identity}, sort_keys=True)
    key = hashlib.sha256(whole.encode()).hexdigest()[:20]
    root = cache_folder(cache_dir)
    folder = root / f"{entry.name.replace('/', '_')}-{key}"
    if not folder.exists():
        write_folder(root, folder, entry)
    return read_folder(folder, entry.name)


def write_folder(root: Path, folder: Path, entry: CacheEntry) -> None:
    """Fills a temporary folder and moves it into place, unless another process was faster.

    Args:
      root: folder of the cache.
      folder: final folder of the entry.
      entry: identity and examples.

    Raises:
      ValueError: the cache cannot be written.
    """
    partial = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
        partial.chmod(0o755)  # mkdtemp keeps others out, but a cache may be shared
        write_chunks(partial, entry)
        os.rename(partial, folder)
    except OSError as error:
        if not folder.exists():
            raise ValueError(
                f"Cannot keep tokens under Data.cache_dir ({root}): {error}. Free space there, "
                "name another folder, or set Data.stream = True"
            ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def write_chunks(folder: Path, entry: CacheEntry) -> None:
    """Writes every chunk and, last, meta.json."""
    writers: dict[str, FeatureWriter] = {}
    rows = RowWriter(folder) if entry.keep_rows else None
    examples = 0
    for chunk in entry.chunks:
        for position, name in enumerate(("inputs", "targets")):
            ids: list[np.ndarray] | None = getattr(chunk, name)
            if ids is None:
                continue
            if name not in writers:
                dtype: type[np.integer] = np.uint16 if entry.sizes[position] <= 2**16 else np.int32
                writers[name] = FeatureWriter(folder, name, dtype, entry.eos[position])
            writers[name].write(ids)
        if rows is not None and chunk.rows is not None:
            rows.write(chunk.rows)
        examples += len(chunk.targets)
    if rows is not None:
        rows.close()
    if examples == 0:
        raise ValueError(
            f"{entry.name} has no examples: is the file empty, or every line left out?"
        )
    meta = {
        "examples": examples,
        "features": {name: writer.close() for name, writer in writers.items()},
        "counts": entry.counts,
        "identity": entry.identity,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def read_folder(folder: Path, name: str) -> Tokens:
    """Maps the tokens of a finished folder into memory."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        features = {
            side: map_feature(folder, side, feature) for side, feature in meta["features"].items()
        }
        offsets = folder / "rows_offsets.npy"
        rows = Rows(folder / "rows.jsonl", np.load(offsets)) if offsets.exists() else None
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"The cached tokens in {folder} are damaged ({error}); delete that folder and they "
            "are written again"
        ) from error
    digests = "".join(feature["digest"] for feature in meta["features"].values())
    return Tokens(
        name=name,
        inputs=features.get("inputs"),
        targets=features["targets"],
        digest=hashlib.sha256(digests.encode()).hexdigest()[:20],
        rows=rows,
        counts=meta["counts"],
    )


def map_feature(folder: Path, name: str, meta: dict) -> Feature:
    """Maps one feature of a finished folder into memory.

    Args:
      folder: of the entry.
      name: "inputs" or "targets".
      meta: what `FeatureWriter.close` returned.

    Raises:
      ValueError: the files have other sizes.
    """
    offsets = np.load(folder / f"{name}_offsets.npy")
    path, dtype = folder / f"{name}.bin", np.dtype(meta["dtype"])
    if path.stat().st_size != meta["tokens"] * dtype.itemsize or offsets[-1] != meta["tokens"]:
        raise ValueError(
            f"{path.name} should hold {meta['tokens']} tokens, but has {path.stat().st_size} bytes "
            f"and offsets up to {offsets[-1]}"
        )
    empty = meta["tokens"] == 0
    # A plain array on the mapped memory: numpy's memmap class makes every access slower.
    ids = np.zeros(0, dtype) if empty else np.asarray(np.memmap(path, dtype, mode="r"))
    return Feature(ids, offsets, meta["eos"], meta["ends"])
