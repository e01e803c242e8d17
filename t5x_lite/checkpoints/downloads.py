# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other libraries in stores: copies of the files that are read, in the cache."""

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5x_lite.cli.progress import Progress
from t5x_lite.utils.paths import cache_folder, is_address

# Files that stand for themselves.
SINGLE = (".gguf", ".model", ".spm", ".json")


@dataclasses.dataclass(frozen=True)
class StoreFolder:
    """A folder of a store, with copies of its files on this machine.

    Attributes:
      name: its address.
      sizes: bytes of its files by path.
      folder: folder of the copies, of these names, sizes, times and tags: what is written anew is
        copied anew.
      offline: "", as a store is always asked.
    """

    name: Any
    sizes: dict[str, int]
    folder: Path
    offline: str = ""

    @property
    def files(self) -> frozenset[str]:
        return frozenset(self.sizes)

    def fetch(self, files: Sequence[str]) -> Path:
        """Copies files that are not on the disk yet; returns the folder that they are in.

        Raises:
          OSError: the store does not answer, or the disk is full.
        """
        missing = [file for file in files if not (self.folder / file).is_file()]
        if not missing:
            return self.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        with Progress("MB", max(1, sum(self.sizes[file] for file in missing) // 10**6)) as progress:
            done = 0
            for file in missing:
                with tempfile.TemporaryDirectory(prefix=".partial-", dir=self.folder) as partial:
                    (self.name / file).download(Path(partial))
                    (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(Path(partial) / Path(file).name, self.folder / file)
                done += self.sizes[file]
                progress(done // 10**6)
        return self.folder

    def read_range(self, file: str, begin: int, end: int) -> tuple[bytes, int]:
        """As `RemoteFolder.read_range`.

        Args:
          file: path of the file.
          begin: first byte.
          end: byte after the last one.

        Raises:
          OSError: the store does not answer.
        """
        size = self.sizes[file]
        return (self.name / file).read_range(begin, min(end, size)), size


def open_store_folder(path: Any) -> StoreFolder | None:
    """The folder of a checkpoint in a store, whose files are copied to be read.

    Args:
      path: a path of this machine or an address; of a file, its folder has this file alone.

    Returns:
      None for what is read where it is: a path of this machine, a run folder, a T5X checkpoint.

    Raises:
      OSError: the store does not answer.
    """
    if not is_address(path):
        return None
    if path.suffix not in SINGLE and not (path / "config.json").exists():
        return None
    listed = path.list_statuses()
    if path / "config.gin" in listed:
        return None
    root = path.parent if path in listed else path
    listing = repr([(str(each), *status) for each, status in listed.items()])
    digest = hashlib.sha256(listing.encode()).hexdigest()[:16]
    sizes = {each.relative_to(root).as_posix(): status.st_size for each, status in listed.items()}
    return StoreFolder(root, sizes, cache_folder() / "downloads" / digest) if sizes else None
