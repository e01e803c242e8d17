# SPDX-License-Identifier: Apache-2.0
"""Files read as bytes, unpacked where their ending says that they are packed."""

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, cast

# Packed bytes that are read at a time.
BLOCK = 2**16


def open_zstd(content: Any, mode: str) -> io.BufferedReader:
    """The content of an open .zst file; `mode` is "rb"."""
    import pyarrow

    packed: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(content, mode[0]), "zstd")
    return io.BufferedReader(packed)


def unpack_streams(packed: Any, make: Callable[[], Any], padding: bytes = b"") -> Iterator[bytes]:
    """Yields the content of streams of bz2 or xz, one after another to the end of a file.

    bz2.open and lzma.open take what is no stream for the end: where the beginning of one is
    damaged, it and all that follow are left out.

    Args:
      packed: the open file.
      make: returns a decompressor of one stream.
      padding: byte that may stand between streams.

    Raises:
      EOFError: the file ends within a stream.
      OSError: it is damaged; of xz, an LZMAError.
    """
    block = packed.read(BLOCK)
    while block:
        stream = make()
        while not stream.eof:
            block = block or (packed.read(BLOCK) if stream.needs_input else b"")
            if stream.needs_input and not block:
                raise EOFError("it ends within a stream")
            yield stream.decompress(block, BLOCK)
            block = b""
        block = stream.unused_data.lstrip(padding) or packed.read(BLOCK)
        while block and not block.lstrip(padding):
            block = packed.read(BLOCK)
        block = block.lstrip(padding)


class ChunkStream(io.RawIOBase):
    """Chunks of bytes as a stream."""

    def __init__(self, chunks: Iterator[bytes], source: Any):
        self.chunks, self.source, self.left = chunks, source, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.left:
            chunk = next(self.chunks, None)
            if chunk is None:
                return 0
            self.left = chunk
        taken, self.left = self.left[: len(buffer)], self.left[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)

    def close(self) -> None:
        self.source.close()
        super().close()


def open_bz2(content: Any, mode: str) -> io.BufferedReader:
    """The content of an open .bz2 file; `mode` is "rb"."""
    return io.BufferedReader(ChunkStream(unpack_streams(content, bz2.BZ2Decompressor), content))


def open_xz(content: Any, mode: str) -> io.BufferedReader:
    """The content of an open .xz file; `mode` is "rb"."""
    chunks = unpack_streams(content, lzma.LZMADecompressor, padding=b"\0")
    return io.BufferedReader(ChunkStream(chunks, content))


PACKED = {".gz": gzip.open, ".bz2": open_bz2, ".xz": open_xz, ".zst": open_zstd}


def packed_ending(path: Path) -> str:
    """Ending of a packed file, such as ".gz"; "" for one that is not packed."""
    ending = path.suffix.lower()
    return ending if ending in PACKED else ""


def open_binary(path: Path) -> io.BufferedReader:
    """Opens a file for reading bytes, unpacked."""
    content, ending = path.open("rb"), packed_ending(path)
    if ending and not path.stat().st_size:
        content.close()
        raise EOFError("it is empty")
    return cast(io.BufferedReader, PACKED[ending](content, "rb") if ending else content)


@contextlib.contextmanager
def unpacking_errors(path: Path) -> Generator[None]:
    """Raises ValueError for a packed file that is broken."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, OSError) as error:
        ending = packed_ending(path)
        # A file system's errors have a number; those of the libraries have none.
        if not ending or getattr(error, "errno", None) is not None:
            raise
        raise ValueError(
            f"{path} is not a complete {ending} file ({error}): copy it again"
        ) from error
