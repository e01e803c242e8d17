# SPDX-License-Identifier: Apache-2.0
"""Kinds of checkpoints, by the files at a path; loads no library of arrays."""

import enum
from pathlib import Path

from t5x_lite.checkpoints.formats import safetensors_files
from t5x_lite.checkpoints.sources import ADAPTER, GGUF, LocatedSource
from t5x_lite.tokenizers.errors import SourceError
from t5x_lite.utils import hub_names, nearest, packaged
from t5x_lite.utils.paths import parse_path

# T5X's tree of weights: a file of msgpack, or since 2023 orbax's folder.
T5X_TREE = "checkpoint"
T5X_STATE = "state"


class CheckpointKind(enum.StrEnum):
    """Library that wrote a checkpoint, as messages name it."""

    OURS = "ours"
    HUGGING_FACE = "Hugging Face"
    GGUF = "GGUF"
    T5X = "T5X"
    PEFT = "peft"


def detect_located(source: LocatedSource) -> CheckpointKind:
    """`detect_kind` of a source, of which a .gguf file may not be on the disk yet."""
    if source.repository is not None and source.path.suffix == GGUF:
        return CheckpointKind.GGUF
    return detect_kind(source.path)


def detect_kind(path: str | Path) -> CheckpointKind:
    """Kind of the checkpoint at a path; its files are not read.

    Raises:
      SourceError: nothing lies there, or not a checkpoint; the message says what to do.
    """
    path = parse_path(path)
    run = containing_run(path)
    if run is not None:
        step = path.name if path.name.isdecimal() else ""
        raise SourceError(
            f"{path} is inside the run {run}: name the run, --checkpoint={run}"
            + (f" --step={step}" if step else "")
            + f' (in Python interactive.load("{run}"{f", step={step}" if step else ""}))'
        )
    if not path.exists():
        raise SourceError(explain_missing(path))
    if path.is_dir() and is_run_folder(path):
        return CheckpointKind.OURS
    if (path / ADAPTER).exists():
        return CheckpointKind.PEFT
    if path.suffix == ".gguf":
        return CheckpointKind.GGUF
    if is_t5x(path):
        return CheckpointKind.T5X
    if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
        raise SourceError(explain_file(path))
    if path.is_file():
        source = safetensors_files.open_safetensors(path)
        raise SourceError(
            f"{path} holds {len(source.names)} tensors: give its folder {path.parent}"
        )
    if (path / "config.json").exists():
        return CheckpointKind.HUGGING_FACE
    raise SourceError(explain_unknown(path))


def containing_run(path: Path) -> Path | None:
    """The run that has a path in its checkpoints, whether it exists or not; None for others.

    A model of another library is none of the run's, wherever its folder lies.
    """
    if path.suffix == ".gguf" or (path / "config.json").exists():
        return None
    for folder in (path, *path.parents):
        if folder.name == "checkpoints" and (folder.parent / "config.gin").exists():
            return folder.parent
    return None


def explain_file(path: Path) -> str:
    """The message for a file that is not a checkpoint, such as the config of a run."""
    if path.suffix == ".gin":
        return (
            f"{path} is a config, not a checkpoint: name the folder of the trained run, the "
            "MODEL_DIR of its config"
        )
    return f"{path} is not a checkpoint: name a run folder, a Hugging Face folder or a .gguf file"


def explain_missing(path: Path) -> str:
    """The message for a path where nothing is: a run to train, or a model of the hub."""
    if path.suffix == ".gin":
        return f"There is no {path}; and a checkpoint is the folder of a run, not its config"
    if path.suffix in (".gguf", ".safetensors"):
        return f"There is no {path}. A file of the hub is named owner/name:{path.name}"
    named = hub_names.NAME.fullmatch(str(path))
    other = f". A model of the hub is named {hub_names.SCHEME}{path}" if named else ""
    if near := nearest.near_names(str(path), packaged.packaged_names()):
        other = f". The checkpoint that is packaged with t5x_lite is named {near[0]}"
    return (
        f"There is no {path}. Train a run first, for example: python -m t5x_lite.train "
        f"--gin_file=configs/runs/g2p.gin --gin.MODEL_DIR={path}{other}"
    )


def is_run_folder(path: Path) -> bool:
    """True for a MODEL_DIR of a training run or of a conversion."""
    return (path / "config.gin").exists() or (path / "checkpoints").exists()


def is_t5x(path: Path) -> bool:
    """True for a T5X checkpoint, for its tree alone, and for the MODEL_DIR of a T5X run."""
    if path.is_file():
        # T5X's tree has no ending: "checkpoint", or "model.checkpoint_1000".
        return path.name == T5X_TREE or path.suffix.startswith(".checkpoint")
    tree = (path / T5X_TREE).is_file() or (path / T5X_STATE).is_dir()
    return not (path / "config.json").exists() and (tree or any(path.glob("checkpoint_*")))


def explain_unknown(folder: Path) -> str:
    """The reason why a folder cannot be opened, and a remedy."""
    snapshots = sorted(folder.glob("snapshots/*/"))
    if snapshots:
        return (
            f"{folder} is an entry of the hub's cache: the model is in its snapshot, "
            f"{find_snapshot(folder, snapshots)}"
        )
    if (folder / "model_index.json").exists():
        return f"{folder} is a pipeline of diffusers, which has no text model that is read here"
    files = sorted(folder.glob("*.gguf"))
    if files:
        return f"{folder} is a folder of .gguf files: name the file, such as {files[0]}"
    if any(folder.glob("*.safetensors")):
        return f"{folder} has safetensors but no config.json: put the one that came with them there"
    inside = sorted(each.parent for each in folder.glob("*/config.json"))
    if inside:
        return f"{folder} is not a checkpoint, but has one inside: {inside[0]}"
    return (
        f"{folder} is not a checkpoint: neither a run folder (config.gin), nor a Hugging Face "
        "folder (config.json and safetensors), nor a .gguf file"
    )


def find_snapshot(folder: Path, snapshots: list[Path]) -> Path:
    """The snapshot that the hub's cache calls main, or else the last one to be written.

    Args:
      folder: entry of the cache.
      snapshots: its snapshots.
    """
    main = folder / "refs" / "main"
    if main.is_file():
        named = folder / "snapshots" / main.read_text(encoding="utf-8", errors="replace").strip()
        if named in snapshots:
            return named
    return max(snapshots, key=lambda snapshot: snapshot.stat().st_mtime)
