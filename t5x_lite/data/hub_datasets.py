# SPDX-License-Identifier: Apache-2.0
"""Datasets of the Hugging Face hub, and folders that are laid out as one there, as examples.

The datasets library reads them. Those of the hub are known by their commit, those of a folder by
the content of their files. A folder is read as a stream: the library's copy of it is known by the
time of its files alone.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from t5x_lite import config
from t5x_lite.data import content
from t5x_lite.data.corpora import TextExample
from t5x_lite.data.examples import ExampleBuilder
from t5x_lite.data.fields import column_of, fields_read
from t5x_lite.data.files import build_examples, reads_pairs
from t5x_lite.utils import hub
from t5x_lite.utils.extras import install_command
from t5x_lite.utils.hub_errors import HubError, HubUnreachable, describe_hub_error
from t5x_lite.utils.hub_names import HubName
from t5x_lite.utils.paths import local_path

# Describes the features of a dataset, so names of labels too.
CARD = "README.md"


def import_datasets() -> Any:
    """The datasets library; raises ValueError if it is not installed."""
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f"HubDataset needs the datasets library: {install_command('hub-data')}"
        ) from error


def task_name(cfg: config.HubDataset) -> str:
    """Name of the task: that of the dataset, and of its configuration."""
    return cfg.name if cfg.config is None else f"{cfg.name}/{cfg.config}"


def find_folder(cfg: config.HubDataset) -> Path | None:
    """The folder of a dataset; None for one of the hub."""
    folder = local_path(cfg.name)
    return folder if folder.is_dir() else None


def hub_name(cfg: config.HubDataset) -> HubName:
    """The name of a dataset on the hub."""
    return HubName(cfg.name, cfg.revision, kind="dataset")


@contextlib.contextmanager
def dataset_errors(cfg: config.HubDataset) -> Generator[None]:
    """Raises ValueError in place of an error of the libraries that read a dataset: `HubError` where
    the hub is its cause."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # each library under it raises its own classes
        if find_folder(cfg) is None and (of_hub := find_hub_error(hub_name(cfg), error)):
            raise of_hub from error
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"HubDataset {task_name(cfg)} cannot be read ({type(error).__name__}: {reason}). Is "
            "HubDataset.name owner/name or a folder, and are config, revision and splits its own?"
        ) from error


def find_hub_error(name: HubName, error: BaseException | None) -> HubError | None:
    """The error to raise in place of one that the hub has caused; None for any other.

    Args:
      name: the dataset.
      error: error of the datasets library.
    """
    while error is not None:
        if isinstance(error, Exception) and not isinstance(error, FileNotFoundError):
            if described := describe_hub_error(name, error):
                return described
        error = error.__cause__ or error.__context__
    # The library leaves out that a dataset is gated: its files say it.
    try:
        repository = hub.open_repository(name)
        if repository.files and not repository.offline:
            repository.read_range(min(repository.files), 0, 1)
    except HubError as described:
        return described
    return None


class DatasetCommit(NamedTuple):
    """A commit of a dataset of the hub.

    Attributes:
      sha: its id.
      offline: the hub does not answer, or is not to be asked: the cache alone is read.
    """

    sha: str
    offline: bool = False


def find_commit(cfg: config.HubDataset) -> DatasetCommit:
    """The commit of a dataset of the hub; of the cache, which a line on stderr says, where the hub
    cannot be asked.

    Raises:
      HubError: there is no such dataset, or neither can be read.
    """
    name = hub_name(cfg)
    if name.is_pinned:
        return DatasetCommit(str(name.revision))
    repository = hub.open_repository(name)
    return DatasetCommit(repository.commit, bool(repository.offline))


def load_split(cfg: config.HubDataset, split: str) -> Any:
    """The rows of a split; its columns are those that are read, where they are known before.

    Raises:
      ValueError: the dataset cannot be read, or lacks a column.
    """
    library, folder = import_datasets(), find_folder(cfg)
    with dataset_errors(cfg):
        if folder is None:
            rows = load_commit(cfg, split, find_commit(cfg))
        else:
            where = getattr(cfg, split)
            rows = library.load_dataset(str(folder), cfg.config, split=where, streaming=True)
        # Of a stream of JSON lines, the columns are known once a row was read.
        there = list(next(iter(rows), {}) if rows.features is None else rows.features)
    columns = list(dict.fromkeys(column_of(name, there) for name in fields_read(cfg)))
    for column in columns:
        if column not in there:
            raise ValueError(
                f"HubDataset {task_name(cfg)} has no column {column!r}; there are "
                f"{', '.join(map(repr, there))}"
            )
    return rows if rows.features is None else rows.select_columns(columns)


def load_commit(cfg: config.HubDataset, split: str, commit: DatasetCommit) -> Any:
    """The rows of a split of a commit of the hub, with all of its columns.

    Args:
      cfg: the dataset.
      split: train, validation or test.
      commit: its commit.

    Raises:
      HubUnreachable: the hub does not answer, and the cache has another commit.
    """
    library = import_datasets()
    with cache_alone(library) if commit.offline else contextlib.nullcontext():
        builder = library.load_dataset_builder(cfg.name, cfg.config, revision=commit.sha)
        # Without an answer of the hub, the library takes the commit that its cache got last.
        if builder.hash != commit.sha:
            raise HubUnreachable(
                f"Commit {commit.sha[:10]} of {cfg.name} is not in the cache, and the hub cannot "
                "be reached: read it once with a connection, or name the commit that the cache has "
                f"in HubDataset.revision, {builder.hash}"
            )
        if cfg.streaming:
            return builder.as_streaming_dataset(getattr(cfg, split))
        builder.download_and_prepare()
        return builder.as_dataset(getattr(cfg, split))


@contextlib.contextmanager
def cache_alone(library: Any) -> Generator[None]:
    """Context in which the datasets library asks no hub: each request would be repeated for 30 s.

    Args:
      library: the datasets library.
    """
    before, library.config.HF_HUB_OFFLINE = library.config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        library.config.HF_HUB_OFFLINE = before


def read_rows(
    cfg: config.HubDataset,
    split: str,
    counts: dict[str, int] | None = None,
    describe: Callable[[TextExample], str] | None = None,
    readout: config.Readout | None = None,
) -> Iterator[TextExample]:
    """Yields the examples of a split.

    Args:
      cfg: the dataset.
      split: train, validation or test.
      counts: as in `files.read_rows`.
      describe: as in `files.read_rows`.
      readout: as in `files.read_rows`.

    Raises:
      ValueError: the dataset cannot be read, or a row and HubDataset.broken is not "skip".
    """
    rows = load_split(cfg, split)
    features = (rows.features or {}).items()
    labels = {name: each.names for name, each in features if hasattr(each, "names")}

    def records() -> Iterator[tuple[str, dict | str]]:
        with dataset_errors(cfg):
            for number, row in enumerate(rows, 1):
                yield f"{task_name(cfg)} ({getattr(cfg, split)}), row {number}", row

    paired = reads_pairs(cfg, split)
    builder = ExampleBuilder(cfg, labels, readout)
    return build_examples(builder, records(), counts, describe, paired=paired)


def list_paths(cfg: config.HubDataset, split: str) -> list[Path]:
    """Files of a split of a folder; [] for a dataset of the hub.

    Raises ValueError if the folder has no such split.
    """
    folder = find_folder(cfg)
    if folder is None:
        return []
    with dataset_errors(cfg):
        builder = import_datasets().load_dataset_builder(str(folder), cfg.config)
        return [Path(path) for path in builder.config.data_files[getattr(cfg, split)]]


def remote_identity(cfg: config.HubDataset, split: str) -> dict[str, str]:
    """The commit of a dataset of the hub, or the digest of a folder's card, by name."""
    folder = find_folder(cfg)
    if folder is None:
        return {f"hf://datasets/{cfg.name}": find_commit(cfg).sha}
    card = [path for path in (folder / CARD,) if path.is_file()]
    return content.digest_files(card)


def source(cfg: config.HubDataset, split: str) -> str:
    """Digest of the options of reading a split; what the dataset holds is not in it."""
    apart = {"name", "revision", "train", "validation", "test", "vocabulary", "metrics"}
    apart |= {"streaming"}
    options = [
        getattr(cfg, field.name)
        for field in dataclasses.fields(cfg)
        if field.name not in apart and (field.name != "rejected" or cfg.rejected is not None)
    ]
    return hashlib.sha256(json.dumps([options, getattr(cfg, split)]).encode()).hexdigest()
