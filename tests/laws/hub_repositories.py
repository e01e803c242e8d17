# SPDX-License-Identifier: Apache-2.0
"""Repositories of the hub on loopback (`hub_server`): commits, and their listings as JSON."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Content = bytes | Path
# Endings that the hub stores apart from git (LFS): their downloads are redirected.
LARGE = (".safetensors", ".gguf", ".bin", ".parquet", ".model", ".spm")


class Repository:
    """Commits of a repository: files by path, and names of commits."""

    def __init__(self, kind: str, gated: bool, private: bool):
        self.kind, self.gated, self.private = kind, gated, private
        self.commits: dict[str, dict[str, Content]] = {}
        self.refs: dict[str, str] = {}

    def commit_of(self, revision: str) -> str | None:
        revision = self.refs.get(revision, revision)
        return revision if revision in self.commits else None


def content_size(content: Content) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def read_part(content: Content, begin: int, size: int) -> bytes:
    """Reads `size` bytes of content from `begin` on.

    Args:
      content: bytes, or a file of them.
      begin: first byte.
      size: number of bytes.
    """
    if isinstance(content, bytes):
        return content[begin : begin + size]
    with content.open("rb") as stream:
        stream.seek(begin)
        return stream.read(size)


def content_hash(content: Content) -> str:
    """SHA-256; of a file too large to read, such as a sparse one, of its beginning and size."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as stream:
        if content_size(content) <= 2**26:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        return hashlib.sha256(stream.read(2**20) + b"%d" % content_size(content)).hexdigest()


def blob_id(content: Content) -> str:
    """Git's id of a file."""
    if isinstance(content, Path):
        content = content_hash(content).encode()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def describe_repository(repository: Repository, name: str, commit: str) -> dict[str, Any]:
    """The answer to model_info or dataset_info.

    Args:
      repository: the repository.
      name: owner and name.
      commit: the commit to describe.
    """
    files = repository.commits[commit]
    return {
        "_id": "0" * 24,
        "id": name,
        "author": name.partition("/")[0],
        "sha": commit,
        "private": repository.private,
        "gated": "manual" if repository.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "lastModified": "2026-01-01T00:00:00.000Z",
        "createdAt": "2026-01-01T00:00:00.000Z",
        "siblings": [
            {"rfilename": path, "size": content_size(content), "blobId": blob_id(content)}
            for path, content in sorted(files.items())
        ],
    }


def describe(files: Mapping[str, Content], path: str) -> list[dict[str, Any]]:
    """A file or folder as listings have it; nothing where there is neither."""
    if path in files:
        content = files[path]
        entry = {"type": "file", "path": path, "size": content_size(content)}
        entry["oid"] = blob_id(content)
        if path.endswith(LARGE):
            digest = {"oid": content_hash(content), "size": content_size(content)}
            entry["lfs"] = digest | {"pointerSize": 134}
        return [entry]
    if any(each.startswith(path + "/") for each in files):
        return [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0}]
    return []


def list_tree(
    files: Mapping[str, Content], folder: str, query: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Entries of a folder, of those below too where the query says so.

    Args:
      files: files of a commit.
      folder: path of the folder; empty for the root.
      query: parameters of the request.
    """
    folder = folder.rstrip("/")
    prefix = folder + "/" if folder else ""
    inside = [path.removeprefix(prefix) for path in sorted(files) if path.startswith(prefix)]
    names: dict[str, None] = {}
    for path in inside:
        parts = path.split("/")
        deepest = len(parts) if query.get("recursive", "").lower() in ("true", "1") else 1
        for depth in range(1, deepest + 1):
            names["/".join(parts[:depth])] = None
    return [each for name in names for each in describe(files, prefix + name)]
