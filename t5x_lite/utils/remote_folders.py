# SPDX-License-Identifier: Apache-2.0
"""Folders of files that are elsewhere, in the hub or in a store, and are downloaded when needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

# Bytes of the first request for a header: most are shorter, and it takes no longer than one byte.
FIRST_BYTES = 100_000


class RemoteFolder(Protocol):
    """A folder of a model of the hub, or of a store.

    Attributes:
      name: its name or address, for messages.
      files: paths of its files.
      folder: folder of this machine that has the files that were downloaded.
      offline: the reason why nothing more is downloaded; "" if it is.
    """

    @property
    def name(self) -> Any: ...
    @property
    def files(self) -> frozenset[str]: ...
    @property
    def folder(self) -> Path: ...
    @property
    def offline(self) -> str: ...

    def fetch(self, files: Sequence[str]) -> Path:
        """Downloads files that are not on the disk yet; returns the folder that they are in."""
        ...

    def read_range(self, file: str, begin: int, end: int) -> tuple[bytes, int]:
        """Bytes [begin, end) of a file, fewer where it ends, and the size of the file.

        Args:
          file: path of the file.
          begin: first byte.
          end: byte after the last one.
        """
        ...


class RemoteBytes:
    """The bytes of a remote file, of which no more are downloaded than the beginning that is read.

    Each request doubles what is there, so that a header of 10 MB takes eight.
    """

    def __init__(self, repository: RemoteFolder, file: str):
        self.repository, self.file = repository, file
        first, self.size = repository.read_range(file, 0, FIRST_BYTES)
        self.begun = bytearray(first)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> bytes:
        begin, end, _ = part.indices(self.size)
        if end > len(self.begun):
            until = min(self.size, max(end, 2 * len(self.begun)))
            self.begun += self.repository.read_range(self.file, len(self.begun), until)[0]
        return bytes(self.begun[begin:end])
