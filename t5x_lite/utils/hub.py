# SPDX-License-Identifier: Apache-2.0
"""Models and datasets of the Hugging Face hub: commits and files, through huggingface_hub.

Its cache, its progress bars, HF_HUB_OFFLINE, HF_ENDPOINT and its tokens are used.
"""

import contextlib
import dataclasses
import glob
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.hub_errors import HubError, HubUnreachable, hub_errors
from t5x_lite.utils.hub_names import COMMIT, HubName, parse_source

MAIN = "main"
# How often a part of a file is asked for where connections break.
ATTEMPTS = 4


def pin_source(text: str) -> str:
    """A source with the commit that the hub has now in place of a branch or tag; a path as it is.

    Raises:
      HubError: there is no such model.
    """
    name = parse_source(text)
    if not isinstance(name, HubName) or name.is_pinned:
        return text
    return str(name._replace(revision=open_repository(name).commit))


def source_identity(text: str | os.PathLike) -> str:
    """A text that differs where sources do: a whole path, or a name with its commit."""
    name = parse_source(text)
    return pin_source(os.fspath(text)) if isinstance(name, HubName) else str(name.resolve())


@dataclasses.dataclass(frozen=True)
class HubRepository:
    """One commit of a model or a dataset of the hub.

    Attributes:
      name: the name by which it was opened.
      commit: the commit.
      files: paths of its files; those in the cache alone, if the hub was not asked.
      folder: the commit's folder in the cache, which has the files that were downloaded.
      offline: the reason why the hub is not asked; "" if it is.
    """

    name: HubName
    commit: str
    files: frozenset[str]
    folder: Path
    offline: str = ""

    def is_cached(self, file: str) -> bool:
        """True if a file is in the cache, whole: it gets its name there at the end."""
        return (self.folder / file).is_file()

    def fetch(self, files: Sequence[str]) -> Path:
        """Downloads files that are not in the cache yet; returns the folder that they are in.

        Raises:
          HubError: they cannot be downloaded.
        """
        missing = [file for file in files if not self.is_cached(file)]
        if not missing:
            return self.folder
        if self.offline:
            raise HubUnreachable(
                f"{missing[0]} of {self.name} is not in the cache, and {self.offline}"
            )
        import huggingface_hub

        with hub_errors(self.name):
            huggingface_hub.snapshot_download(
                self.name.repo,
                repo_type=self.name.kind,
                revision=self.commit,
                allow_patterns=[glob.escape(file) for file in missing],
            )
        for file in missing:
            if not self.is_cached(file):
                raise HubError(f"{self.name} has no {file}")
        return self.folder

    def read_range(self, file: str, begin: int, end: int) -> tuple[bytes, int]:
        """Bytes [begin, end) of a file, fewer where it ends, and the size of the file.

        Args:
          file: path of the file.
          begin: first byte.
          end: byte after the last one.

        Raises:
          HubError: it cannot be read, or the server does not read in ranges.
        """
        import huggingface_hub
        from huggingface_hub import utils

        address = huggingface_hub.hf_hub_url(
            self.name.repo, file, repo_type=self.name.kind, revision=self.commit
        )
        headers = utils.build_hf_headers() | {"Range": f"bytes={begin}-{end - 1}"}
        headers["Accept-Encoding"] = "identity"
        for attempt in range(ATTEMPTS):
            try:
                with hub_errors(self.name):
                    answer = utils.get_session().get(address, headers=headers, timeout=30)
                    utils.hf_raise_for_status(answer)
                break
            except HubUnreachable:
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(attempt)
        size = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if size is None or len(answer.content) > end - begin:
            raise HubError(f"{self.name}: the hub does not send a part of {file}")
        return answer.content, int(size[1])


def open_repository(name: HubName) -> HubRepository:
    """Asks the hub for a commit and its files; the cache, if the hub cannot be asked.

    Raises:
      HubError: there is no such name or revision, or neither hub nor cache can be read.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return open_cached(name, "HF_HUB_OFFLINE is set")
    import huggingface_hub

    try:
        with hub_errors(name):
            info: Any = huggingface_hub.HfApi().repo_info(
                name.repo, repo_type=name.kind, revision=name.revision, timeout=10.0
            )
    except HubUnreachable as error:
        try:
            repository = open_cached(name, "the hub cannot be reached")
        except HubUnreachable:
            raise error from None
        print(f"{error}: read from the cache, commit {repository.commit[:10]}", file=sys.stderr)
        return repository
    files = frozenset(each.rfilename for each in info.siblings or () if is_inside(each.rfilename))
    folder = cache_entry(name) / "snapshots" / str(info.sha)
    if not name.is_pinned:
        with contextlib.suppress(OSError):  # a cache that cannot be written can still be read
            reference = cache_entry(name) / "refs" / (name.revision or MAIN)
            reference.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(reference, str(info.sha))
    return HubRepository(name, str(info.sha), files, folder)


def is_inside(file: str) -> bool:
    """True for a path that stays within the folder of its commit."""
    return not file.startswith("/") and ".." not in file.split("/") and "\\" not in file


def cache_entry(name: HubName) -> Path:
    """The folder of a name in the cache, in the layout that huggingface_hub documents."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{name.kind}s--{name.repo.replace('/', '--')}"


def open_cached(name: HubName, reason: str) -> HubRepository:
    """The commit of a model or a dataset that the cache has.

    Args:
      name: its name.
      reason: the reason why the hub is not asked, a clause.

    Raises:
      HubUnreachable: the cache does not have it.
    """
    entry, commit = cache_entry(name), name.revision
    reference = entry / "refs" / (name.revision or MAIN)
    if not name.is_pinned:
        content = reference.read_bytes() if reference.is_file() else b""
        commit = content.decode(errors="replace").strip()
    folder = entry / "snapshots" / str(commit)
    # A damaged reference may be any bytes, a name that leads out of the folder too.
    if not COMMIT.fullmatch(str(commit)) or not folder.is_dir():
        raise HubUnreachable(
            f"There is no {name} here or in the cache {entry.parent}, and {reason}: load it once "
            "with a connection, or name a folder that has it"
        )
    files = (path for path in folder.rglob("*") if path.is_file())
    listed = frozenset(path.relative_to(folder).as_posix() for path in files)
    return HubRepository(name, str(commit), listed, folder, reason)
