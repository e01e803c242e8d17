# SPDX-License-Identifier: Apache-2.0
"""Models of the Hugging Face hub by name: owner/name, owner/name@revision, owner/name:file.gguf.

`parse_source` is the one answer to what a source names: a path, such a model, or a checkpoint that
travels with the package. Files come through huggingface_hub: its cache, its progress bars,
HF_HUB_OFFLINE, HF_ENDPOINT and its tokens.
"""

import argparse
import contextlib
import dataclasses
import glob
import os
import re
import sys
import time
import urllib.parse
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from t5x_lite.utils import exit_status, packaged
from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.paths import check_path, parse_path, path_argument

# Says that a name is the hub's even where a local folder has it.
SCHEME = "hf://"
# No part begins with a dot, so that none leads out of a folder.
PART = r"\w[\w.-]*"
PARTS = rf"{PART}(?:/{PART})*"
NAME = re.compile(
    rf"(?P<scheme>{SCHEME})?(?P<repo>{PART}/{PART})"
    rf"(?:@(?P<revision>{PARTS}))?(?::(?P<file>{PARTS}))?",
    re.ASCII,
)
PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[^/?#]+/[^/?#]+)")
COMMIT = re.compile(r"[0-9a-f]{40}")
MAIN = "main"
# Where this project's own examples put runs: a run that is not there yet is none of the hub's.
RUNS = "runs"
# Bytes of the first request for a header: most are shorter, and it takes no longer than one byte.
FIRST_BYTES = 100_000
# How often a part of a file is asked for where connections break.
ATTEMPTS = 4
# Libraries that huggingface_hub has spoken HTTP with; their errors are of classes of their own.
HTTP_LIBRARIES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}


class HubError(ValueError):
    """A model of the hub cannot be read; the message says why, and what can be done."""


class HubUnreachable(HubError):
    """The hub does not answer, and the cache does not have the model."""

    exit_status = exit_status.FAILURE


class HubName(NamedTuple):
    """A model of the hub.

    Attributes:
      repo: "owner/name".
      revision: branch, tag or commit; None for the newest commit of the main branch.
      file: the one file that is meant, such as a .gguf; None for the model.
    """

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return self.repo + revision + (f":{self.file}" if self.file else "")

    @property
    def is_pinned(self) -> bool:
        """True if the revision is a commit, which always has the same files."""
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None


def parse_source(text: str | os.PathLike) -> HubName | Path:
    """The model of the hub or the path that a source names; the path of a packaged checkpoint.

    A local file or folder of that name wins, which one line on stderr says of a folder that looks
    like the hub's; hf://owner/name is the hub's in any case.

    Raises:
      ValueError: it is an address of something else.
    """
    text = os.fspath(text)
    match = NAME.fullmatch(text)
    if match is None:
        check_page(text)
        return packaged.find_packaged(text) or parse_path(text)
    name = HubName(match["repo"], match["revision"], match["file"])
    if match["scheme"]:
        return name
    if Path(text).exists():
        report_local(text)
        return Path(text)
    if name.file is not None and name.revision is None and Path(name.repo).is_dir():
        report_local(name.repo)
        return Path(name.repo, name.file)
    if name.revision is not None or name.file is not None:
        return name
    owner = name.repo.partition("/")[0]
    if owner == RUNS or Path(owner).is_dir() or name.repo.endswith(".gguf"):
        return Path(text)
    return name


def check_page(text: str) -> None:
    """Raises ValueError for the address of a model's page, which says its name."""
    if page := PAGE.match(text):
        raise ValueError(f"{text} is a page of the hub: name the model, {page['repo']}")


def report_local(text: str) -> None:
    """Prints that a local folder is read, where the hub could be meant: no run folder of ours."""
    if (Path(text) / "config.json").is_file():
        print(
            f"{text} is the folder here; {SCHEME}{text} would be the model of the hub",
            file=sys.stderr,
        )


def check_source(text: str) -> str:
    """Returns a source of a config as it is; raises ValueError for an address of something else."""
    if NAME.fullmatch(text):
        return text
    check_page(text)
    return check_path(text)


def source_argument(text: str) -> str:
    """The source of an option, for `type=` of argparse.

    Raises:
      argparse.ArgumentTypeError: it is an address of something else.
    """
    if NAME.fullmatch(text):
        return text
    try:
        check_page(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path_argument(text)


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
    """One commit of a model of the hub.

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

        address = huggingface_hub.hf_hub_url(self.name.repo, file, revision=self.commit)
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
    """Asks the hub for the commit of a model and its files; the cache, if the hub cannot be asked.

    Raises:
      HubError: there is no such model or revision, or neither hub nor cache can be read.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return open_cached(name, "HF_HUB_OFFLINE is set")
    import huggingface_hub

    try:
        with hub_errors(name):
            info = huggingface_hub.HfApi().model_info(
                name.repo, revision=name.revision, timeout=10.0
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
    """The folder of a model in the cache, in the layout that huggingface_hub documents."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{name.repo.replace('/', '--')}"


def open_cached(name: HubName, reason: str) -> HubRepository:
    """The commit of a model that the cache has.

    Args:
      name: the model.
      reason: the reason why the hub is not asked, a clause.

    Raises:
      HubUnreachable: the cache does not have it.
    """
    entry, commit = cache_entry(name), name.revision
    reference = entry / "refs" / (name.revision or MAIN)
    if not name.is_pinned:
        commit = reference.read_text().strip() if reference.is_file() else ""
    folder = entry / "snapshots" / str(commit)
    if not commit or not folder.is_dir():
        raise HubUnreachable(
            f"There is no {name} here or in the cache {entry.parent}, and {reason}: load it once "
            "with a connection, or name a folder that has it"
        )
    files = (path for path in folder.rglob("*") if path.is_file())
    listed = frozenset(path.relative_to(folder).as_posix() for path in files)
    return HubRepository(name, str(commit), listed, folder, reason)


@contextlib.contextmanager
def hub_errors(name: HubName) -> Generator[None]:
    """Turns errors of huggingface_hub into one sentence about a model, with the remedy.

    Messages of the library are left out: they have addresses with what a user put into them.
    """
    try:
        yield
    except Exception as error:
        described = describe_hub_error(name, error)
        if described is None:
            raise
        raise described from error


def describe_hub_error(name: HubName, error: Exception) -> HubError | None:
    """The error to raise in place of one of huggingface_hub; None for an error of another kind."""
    from huggingface_hub import errors, get_token

    token = get_token() is not None
    match error:
        case errors.GatedRepoError():
            log_in = (
                "with the account of the token in use"
                if token
                else "then log in (hf auth login, or HF_TOKEN in the environment)"
            )
            return HubError(
                f"{name} is gated: accept its terms at {endpoint()}/{name.repo}, {log_in}"
            )
        case errors.RevisionNotFoundError():
            return HubError(f"{name.repo} has no revision {name.revision} on the hub")
        case errors.RepositoryNotFoundError():
            access = "the token in use may not read it" if token else "log in: hf auth login"
            return HubError(
                f"There is no {name.repo} here and no model of that name on the hub (if it is "
                f"private, {access})"
            )
        case errors.EntryNotFoundError() if not isinstance(error, errors.LocalEntryNotFoundError):
            return HubError(f"{name} has no such file on the hub")
        case errors.HfHubHTTPError():
            return describe_status(name, error.response.status_code)
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return describe_hub_error(name, error.__cause__)  # of an upload
    library = type(error).__module__.partition(".")[0]
    if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError | TimeoutError) or (
        library in HTTP_LIBRARIES
    ):
        cause = type(error.__cause__ or error).__name__
        return HubUnreachable(
            f"There is no {name} here, and {endpoint()} cannot be reached ({cause})"
        )
    if isinstance(error, OSError) and error.errno is None:  # a length that is not as announced
        return HubUnreachable(f"The download of {name} was cut off: the same command goes on")
    return None


def describe_status(name: HubName, status: int) -> HubError:
    """The error for an answer of the hub that has no class of its own."""
    if status in (401, 403):
        return HubError(
            f"The hub refuses {name} to the token in use (status {status}): log in again "
            "(hf auth login), or take HF_TOKEN out of the environment"
        )
    return HubUnreachable(f"The hub answered status {status} for {name}: try again later")


def endpoint() -> str:
    """Address of the hub, without a user's name and password."""
    from huggingface_hub import constants

    parts: Any = urllib.parse.urlsplit(constants.ENDPOINT)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
