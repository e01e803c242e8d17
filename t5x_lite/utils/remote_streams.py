# SPDX-License-Identifier: Apache-2.0
"""Streams of objects in stores: read by ranges, written to a local file that is uploaded.

Their `path` is a `remote_paths.RemotePath`.
"""

import contextlib
import io
import os
import sys
import tempfile
import time
from typing import Any

# Bytes that one request reads at least, and seconds between two uploads of a file that grows.
READ_BYTES, UPLOAD_SECONDS = 2**22, 30.0
# The next upload waits this many times as long as the last one took.
UPLOAD_REST = 10


def open_reader(path: Any) -> io.BufferedReader:
    """A stream of the bytes of an object."""
    return io.BufferedReader(ObjectReader(path), READ_BYTES)


class ObjectReader(io.RawIOBase):
    """An object as a raw stream; each read is a request of a range.

    A site that does not send ranges, or does not say the size, is read once, as a whole.
    """

    def __init__(self, path: Any):
        super().__init__()
        self.path, self.position, self.size = path, 0, path.stat().st_size
        self.whole = path.read_bytes() if not self.size else None
        self.size = self.size if self.whole is None else len(self.whole)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = origin + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        end = min(self.position + len(buffer), self.size)
        if end <= self.position:
            return 0
        content = self.read_until(end)
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)

    def read_until(self, end: int) -> bytes:
        """The bytes from the position up to `end`."""
        if self.whole is None:
            content = self.path.read_range(self.position, end)
            if len(content) <= end - self.position:
                return content
            self.whole = content
        return self.whole[self.position : end]


class UploadedFile(io.BufferedWriter):
    """A local temporary file that is uploaded when it is closed, and when it is flushed if the last
    upload is long enough ago: a store takes whole objects, so each upload sends all of it."""

    def __init__(self, path: Any, append: bool):
        """Creates the temporary file.

        Args:
          path: address of the object.
          append: begin with the object's content, if it exists.
        """
        number, self.local = tempfile.mkstemp(prefix="t5x_lite-upload-")
        super().__init__(io.FileIO(number, "wb"))
        self.path, self.uploaded, self.again = path, -1, 0.0
        if append and path.exists():
            self.write(path.read_bytes())
            super().flush()
            self.uploaded = self.tell()

    def flush(self) -> None:
        super().flush()
        if time.monotonic() >= self.again:
            self.upload()

    def upload(self) -> None:
        """Uploads what was written since the last upload, with all before it."""
        super().flush()
        size = self.tell()
        if size == self.uploaded:
            return
        began = time.monotonic()
        self.path.put_file(self.local)
        self.uploaded, ended = size, time.monotonic()
        self.again = ended + max(UPLOAD_SECONDS, UPLOAD_REST * (ended - began))

    def close(self) -> None:
        if self.closed:
            return
        try:
            if not sys.is_finalizing():
                self.upload()
        finally:
            super().close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.local)


def upload_stream(stream: Any) -> None:
    """Flushes a stream; one of a bucket is uploaded at once."""
    stream.flush()
    inner = getattr(stream, "buffer", stream)
    if isinstance(inner, UploadedFile):
        inner.upload()
