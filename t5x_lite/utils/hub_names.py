# SPDX-License-Identifier: Apache-2.0
"""Models of the Hugging Face hub by name: owner/name, owner/name@revision, owner/name:file.gguf.

`parse_source` is the one answer to what a source names: a path, such a model, or a checkpoint that
travels with the package.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from t5x_lite.utils import packaged
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
# Where this project's own examples put runs: a run that is not there yet is none of the hub's.
RUNS = "runs"


class HubName(NamedTuple):
    """A model or a dataset of the hub.

    Attributes:
      repo: "owner/name".
      revision: branch, tag or commit; None for the newest commit of the main branch.
      file: the one file that is meant, such as a .gguf; None for the model.
      kind: "model" or "dataset".
    """

    repo: str
    revision: str | None = None
    file: str | None = None
    kind: str = "model"

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


def short_names(paths: list[str]) -> list[str]:
    """Short, distinct names of checkpoints."""
    names: list[str] = []
    for path in paths:
        name = parse_path(path).resolve().name
        alike = sum(each == name or each.startswith(f"{name} (") for each in names)
        names.append(f"{name} ({alike + 1})" if alike else name)
    return names
