# SPDX-License-Identifier: Apache-2.0
"""Paths of objects in buckets (gs://, s3://) with the methods of pathlib.Path, through fsspec.

A store of objects has no folders, no renaming and no appending: a folder is a common beginning of
names, renaming copies, and a file that is appended to is uploaded as a whole, now and then. An
object is replaced as a whole: readers see the old content or the new.
"""

import contextlib
import errno
import functools
import glob
import io
import os
import stat
from collections.abc import Collection, Generator, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from t5x_lite.utils import remote_streams
from t5x_lite.utils.remote_streams import UploadedFile

# Stores that are written as well; whatever else fsspec knows is only read.
WRITABLE = ("gs", "s3")
# Errors that say something about an object; after any other one nothing is known.
NUMBERS = {
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    IsADirectoryError: errno.EISDIR,
    NotADirectoryError: errno.ENOTDIR,
}


class RemoteStatus(NamedTuple):
    """The fields of os.stat_result that an object has.

    Attributes:
      st_mode: kind of the file.
      st_size: its bytes.
      st_mtime: time of its writing, in seconds since 1970; 0 where the store does not say.
      etag: text of the store that differs where contents do; "" where it has none.
    """

    st_mode: int
    st_size: int
    st_mtime: float
    etag: str = ""

    @property
    def st_mtime_ns(self) -> int:
        return int(self.st_mtime * 1e9)


@contextlib.contextmanager
def naming_store(path: PurePosixPath) -> Generator[None]:
    """Context whose errors of a store's library become OSErrors with a number and the address."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # each library has errors of its own, or leaves out their numbers
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        for kind, number in NUMBERS.items():
            if isinstance(error, kind):
                raise kind(number, reason, str(path)) from error
        raise OSError(errno.EIO, f"the store does not answer ({reason})", str(path)) from error


@functools.cache
def open_file_system(scheme: str) -> Any:
    """fsspec's file system of a scheme, without its cache of listings: other processes write too.

    Credentials are those of the store's own tools; nothing here reads or keeps them.
    """
    import fsspec

    prepare_stores()
    return fsspec.filesystem(scheme)


@functools.cache
def prepare_stores() -> None:
    """Settings of the libraries that read buckets, for this process."""
    from fsspec.config import conf

    for scheme in ("gs", "gcs", "s3", "s3a"):
        conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    # gcsfs would ask for the kind of each bucket through another library.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # Where TensorFlow is installed, etils would import it to list a bucket.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # gcsfs and TensorStore have each a variable for a server that stands in for Google's.
    if host := os.environ.get("STORAGE_EMULATOR_HOST"):
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", host)


def read_status(details: dict[str, Any]) -> RemoteStatus:
    """The status of an object by fsspec's description of it."""
    mode = stat.S_IFDIR if details["type"] == "directory" else stat.S_IFREG
    written = details.get("mtime", details.get("LastModified", 0.0))
    seconds = written.timestamp() if hasattr(written, "timestamp") else 0.0
    etag = details.get("ETag") or details.get("etag") or ""
    return RemoteStatus(mode, details.get("size") or 0, seconds, etag)


class RemotePath(PurePosixPath):
    """Address of an object, or of the objects that begin with it and a slash.

    It has those methods of pathlib.Path that the readers and writers of the package use.
    """

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    def __fspath__(self) -> str:
        return str(self)

    @property
    def scheme(self) -> str:
        return self.parts[0].removesuffix(":")

    @property
    def store(self) -> Any:
        return open_file_system(self.scheme)

    def from_key(self, key: str) -> "RemotePath":
        """The address of an object by the name that fsspec has for it."""
        return RemotePath(key if "://" in key else f"{self.scheme}://{key}")

    def resolve(self) -> "RemotePath":
        return self

    def absolute(self) -> "RemotePath":
        return self

    def expanduser(self) -> "RemotePath":
        return self

    def exists(self) -> bool:
        with naming_store(self):
            return self.store.exists(str(self))

    def is_file(self) -> bool:
        with naming_store(self):
            return self.store.isfile(str(self))

    def is_dir(self) -> bool:
        with naming_store(self):
            return self.store.isdir(str(self))

    def is_symlink(self) -> bool:
        return False

    def stat(self) -> RemoteStatus:
        with naming_store(self):
            return read_status(self.store.info(str(self)))

    def iterdir(self) -> Iterator["RemotePath"]:
        with naming_store(self):
            keys = self.store.ls(str(self), detail=False)
        paths = (self.from_key(key) for key in keys)
        return (path for path in paths if path != self)

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        with naming_store(self):
            keys = self.store.glob(f"{glob.escape(str(self))}/{pattern}")
        return (self.from_key(key) for key in keys)

    def list_statuses(self) -> dict["RemotePath", RemoteStatus]:
        """Every object below this address, by one request for a thousand of them."""
        with naming_store(self):
            listed = self.store.find(str(self), detail=True)
        return {self.from_key(key): read_status(details) for key, details in listed.items()}

    def list_files(self) -> dict["RemotePath", int]:
        """Every object below this address, with its bytes."""
        return {path: status.st_size for path, status in self.list_statuses().items()}

    def read_bytes(self) -> bytes:
        return self.read_range(None, None)

    def read_range(self, begin: int | None, end: int | None) -> bytes:
        """Bytes of an object from `begin` up to `end`; None for its own ends."""
        with naming_store(self):
            return self.store.cat_file(str(self), start=begin, end=end)

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, content: bytes) -> int:
        self.check_writable()
        with naming_store(self):
            self.store.pipe_file(str(self), content)
        return len(content)

    def write_text(self, content: str, encoding: str = "utf-8") -> int:
        self.write_bytes(content.encode(encoding))
        return len(content)

    def create(self, content: bytes) -> None:
        """Writes an object that is not there yet, by a conditional request: of several processes
        one succeeds.

        Raises:
          FileExistsError: it is there.
        """
        self.check_writable()
        with naming_store(self):
            self.store.pipe_file(str(self), content, mode="create")

    def open(
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
    ) -> Any:
        """A stream as of pathlib.Path.open.

        Args:
          mode: r, w or a; with b for bytes.
          buffering: 1 to flush at the end of each line; all else is buffered.
          encoding: of text; UTF-8 by default.
          errors: handling of bytes that are no text, as `open` has it.
        """
        if mode.startswith("r"):
            stream: Any = remote_streams.open_reader(self)
        else:
            self.check_writable()
            stream = UploadedFile(self, append=mode.startswith("a"))
        if "b" in mode:
            return stream
        return io.TextIOWrapper(
            stream, encoding or "utf-8", errors, newline=None, line_buffering=buffering == 1
        )

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Writes nothing: a folder is there as soon as an object is in it.

        Args:
          mode: not used.
          parents: not used.
          exist_ok: false to raise FileExistsError if it is there.
        """
        self.check_writable()
        if not exist_ok and self.exists():
            raise FileExistsError(errno.EEXIST, "is there already", str(self))

    def unlink(self, missing_ok: bool = False) -> None:
        with naming_store(self):
            try:
                self.store.rm_file(str(self))
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def remove_tree(self) -> None:
        """Removes every object below this address, where another process may be doing the same."""
        tries = 10
        # Names, as fsspec takes them, are patterns.
        while names := [glob.escape(str(path)) for path in self.list_files()]:
            tries -= 1
            try:
                with naming_store(self):
                    self.store.rm(names)
            except FileNotFoundError:  # the other was faster: what is left is listed again
                if not tries:
                    raise

    def rename(self, target: "RemotePath") -> "RemotePath":
        """Copies every object within the store, then removes the old ones."""
        with naming_store(self):
            for source in self.list_files():
                self.store.cp_file(str(source), str(target / source.relative_to(self)))
        self.remove_tree()
        return target

    def download(self, folder: Path) -> None:
        """Copies what lies below this address, or the object itself, into a local folder."""
        files = list(self.list_files())
        with naming_store(self):
            for path in files:
                to = folder / (path.relative_to(self) if path != self else path.name)
                to.parent.mkdir(parents=True, exist_ok=True)
                self.store.get_file(str(path), str(to))

    def upload(self, folder: Path, last: Collection[str] = ()) -> None:
        """Copies the files of a local folder to below this address.

        Args:
          folder: the folder.
          last: names of files that are copied last, as the others count for nothing without them.
        """
        self.check_writable()
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda each: each.name in last):
            (self / path.relative_to(folder)).put_file(str(path))

    def put_file(self, local: str) -> None:
        """Writes the content of a local file."""
        self.check_writable()
        with naming_store(self):
            self.store.put_file(local, str(self))

    def check_writable(self) -> None:
        """Raises ValueError for an address that is only read."""
        if self.scheme not in WRITABLE:
            raise ValueError(
                f"{self} is only read; folders of this machine, gs://BUCKET/NAME and "
                "s3://BUCKET/NAME are written to"
            )


def expand_glob(pattern: Any) -> list[Any]:
    """The objects that an address with *, ? or ** matches."""
    with naming_store(pattern):
        listed = pattern.store.glob(str(pattern), detail=True)
    return [pattern.from_key(key) for key, each in listed.items() if each["type"] == "file"]


def stored_bytes(folder: Any) -> int:
    """Bytes of all files in a folder, of a disk or of a store."""
    if isinstance(folder, RemotePath):
        return sum(folder.list_files().values())
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def key_value_store(path: Path | PurePosixPath) -> dict[str, Any]:
    """TensorStore's description of the place of a local path or of an address."""
    if not isinstance(path, RemotePath):
        return {"driver": "file", "path": str(Path(path).resolve())}
    prepare_stores()
    bucket, key = path.parts[1], "/".join(path.parts[2:])
    if path.scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": key}
    if path.scheme != "s3":
        raise ValueError(f"{path}: arrays are read from local folders, gs:// and s3:// alone")
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": key}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    # Of Amazon's own servers, TensorStore asks which region a bucket is in.
    if endpoint:
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    # Else TensorStore's library complains of each file of credentials that is not there.
    if "AWS_ACCESS_KEY_ID" in os.environ:
        spec["aws_credentials"] = {"type": "environment"}
    return spec
