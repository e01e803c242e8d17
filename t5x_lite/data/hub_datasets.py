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
import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from t5x_lite import config
from t5x_lite.data import content
from t5x_lite.data.corpora import TextExample
from t5x_lite.data.examples import ExampleBuilder, column_of, fields_read
from t5x_lite.data.files import build_examples
from t5x_lite.utils.extras import install_command
from t5x_lite.utils.paths import local_path

COMMIT = re.compile("[0-9a-f]{40}")
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


@contextlib.contextmanager
def dataset_errors(cfg: config.HubDataset) -> Generator[None]:
    """Raises ValueError in place of an error of the libraries that read a dataset."""
    try:
        yield
    except Exception as error:  # each library under it raises its own classes
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"HubDataset {task_name(cfg)} cannot be read ({type(error).__name__}: {reason}). Is "
            "HubDataset.name owner/name or a folder, and are config, revision and splits its own?"
        ) from error


def find_commit(cfg: config.HubDataset) -> str:
    """The commit of a dataset of the hub.

    Raises ValueError if the hub does not have it, or cannot be asked.
    """
    if cfg.revision is not None and COMMIT.fullmatch(cfg.revision):
        return cfg.revision
    import huggingface_hub

    with dataset_errors(cfg):
        info = huggingface_hub.HfApi().dataset_info(cfg.name, revision=cfg.revision)
    return str(info.sha)


def load_split(cfg: config.HubDataset, split: str) -> Any:
    """The rows of a split; its columns are those that are read.

    Raises ValueError if the dataset cannot be read, or lacks a column.
    """
    library, folder = import_datasets(), find_folder(cfg)
    where: dict[str, Any] = {"path": str(folder), "streaming": True}
    if folder is None:
        where = {"path": cfg.name, "revision": find_commit(cfg), "streaming": cfg.streaming}
    with dataset_errors(cfg):
        rows = library.load_dataset(name=cfg.config, split=getattr(cfg, split), **where)
        if rows.features is None:  # known once a row was read
            rows = rows._resolve_features()
    there = list(rows.features)
    columns = list(dict.fromkeys(column_of(name, there) for name in fields_read(cfg)))
    for column in columns:
        if column not in there:
            raise ValueError(
                f"HubDataset {task_name(cfg)} has no column {column!r}; there are "
                f"{', '.join(map(repr, there))}"
            )
    return rows.select_columns(columns)


def read_rows(
    cfg: config.HubDataset,
    split: str,
    counts: dict[str, int] | None = None,
    describe: Callable[[TextExample], str] | None = None,
) -> Iterator[TextExample]:
    """Yields the examples of a split.

    Args:
      cfg: the dataset.
      split: train, validation or test.
      counts: as in `files.read_rows`.
      describe: as in `files.read_rows`.

    Raises:
      ValueError: the dataset cannot be read, or a row and HubDataset.broken is not "skip".
    """
    rows = load_split(cfg, split)
    labels = {name: each.names for name, each in rows.features.items() if hasattr(each, "names")}

    def records() -> Iterator[tuple[str, dict | str]]:
        with dataset_errors(cfg):
            for number, row in enumerate(rows, 1):
                yield f"{task_name(cfg)} ({getattr(cfg, split)}), row {number}", row

    return build_examples(ExampleBuilder(cfg, labels), records(), counts, describe)


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
        return {f"hf://datasets/{cfg.name}": find_commit(cfg)}
    card = [path for path in (folder / CARD,) if path.is_file()]
    return content.digest_files(card)


def source(cfg: config.HubDataset, split: str) -> str:
    """Digest of the options of reading a split; what the dataset holds is not in it."""
    apart = {"name", "revision", "train", "validation", "test", "vocabulary", "metrics"}
    apart |= {"streaming"}
    options = [
        getattr(cfg, field.name) for field in dataclasses.fields(cfg) if field.name not in apart
    ]
    return hashlib.sha256(json.dumps([options, getattr(cfg, split)]).encode()).hexdigest()
