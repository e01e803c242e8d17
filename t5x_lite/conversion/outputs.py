# SPDX-License-Identifier: Apache-2.0
"""What a conversion writes: everything of a format, in a folder that appears when it is whole."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

from t5x_lite import config
from t5x_lite.conversion import huggingface, matching, moving, shards, t5x, tokenizers, unfinished
from t5x_lite.conversion.huggingface import sentence_t5
from t5x_lite.conversion.matching import Leaf, Piece, Plan
from t5x_lite.conversion.moving import Told
from t5x_lite.conversion.origins import CHAT, Origin, Text
from t5x_lite.conversion.tables import Entry
from t5x_lite.conversion.unfinished import OutputError
from t5x_lite.conversion.weights import Weights
from t5x_lite.data import vocabularies
from t5x_lite.evaluation.progress import Progress

FORMATS = ("ours", "huggingface", "t5x", "t5x_scanned")


class Settings(NamedTuple):
    """How to write: dtype None is as it was, family None the first that fits."""

    format: str
    dtype: np.dtype | None = None
    family: str | None = None
    shard_size: int = 5_000_000_000


class Output(Protocol):
    """One format for one model: how large, what goes where, and the writing of it."""

    def size(self, weights: Weights) -> int: ...

    def table(self, weights: Weights) -> str: ...

    def write(self, weights: Weights, folder: Path, told: Told) -> None: ...


def make(origin: Origin, to: Path, settings: Settings) -> Output:
    """The output asked for; ValueError where the format cannot express the model."""
    if settings.format == "ours":
        return RunFolder(origin, to, settings)
    if settings.format == "huggingface":
        return HuggingFace(origin, settings)
    return T5X(origin, settings)


class RunFolder:
    """A run folder of ours."""

    def __init__(self, origin: Origin, to: Path, settings: Settings):
        self.origin, self.to, self.settings = origin, to, settings

    def size(self, weights: Weights) -> int:
        return sum(map(shards.size, moving.cast_names(weights, self.settings.dtype).values()))

    def table(self, weights: Weights) -> str:
        return ""

    def write(self, weights: Weights, folder: Path, told: Told) -> None:
        write_vocabularies(self.origin.text, self.origin.model, folder / "vocabulary")
        run = self.origin.run(self.to)
        moving.to_run_folder(weights, run, folder, self.settings.dtype, told)


def write_vocabularies(text: Text | None, model: config.Model, folder: Path) -> None:
    if text is None:
        return
    for each in text.pair:
        if each.size > model.vocab:
            raise OutputError(
                f"The vocabulary has {each.size} ids, more than the {model.vocab} of the model"
            )
    vocabularies.save_pair(folder, *text.pair)
    if text.chat is not None:
        (folder / CHAT).write_text(text.chat, encoding="utf-8")


class Renamed:
    """What formats of other makes have in common: tensors whose names `entries` says."""

    def __init__(self, origin: Origin, settings: Settings, entries: list[Entry]):
        self.origin, self.settings, self.entries = origin, settings, entries

    def pieces(self, weights: Weights) -> dict[str, list[Piece]]:
        return moving.by_tensor(weights, self.origin.model, self.entries)

    def names(self, weights: Weights) -> dict[str, tuple]:
        return moving.described(weights, self.pieces(weights), self.settings.dtype)

    def size(self, weights: Weights) -> int:
        return sum(map(shards.size, self.names(weights).values()))

    def table(self, weights: Weights) -> str:
        return export_table(weights.leaves, self.pieces(weights), self.names(weights))


class HuggingFace(Renamed):
    """A folder that transformers loads."""

    def __init__(self, origin: Origin, settings: Settings):
        self.family: ModuleType = huggingface.family_for(origin.model, settings.family)
        super().__init__(origin, settings, self.family.entries(origin.model))

    def write(self, weights: Weights, folder: Path, told: Told) -> None:
        pieces, names = self.pieces(weights), self.names(weights)
        for name, content in self.files({dtype for _, dtype in names.values()}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8")
        self.write_tokenizer(folder)
        dense = {"linear.weight": pieces.pop(sentence_t5.PROJECTION, [])}
        about = {"linear.weight": names.pop(sentence_t5.PROJECTION, None)}
        moving.to_safetensors(weights, pieces, folder, names, self.settings.shard_size, told)
        if dense["linear.weight"]:
            quiet = lambda done: None
            moving.to_safetensors(
                weights, dense, folder / "2_Dense", about, self.settings.shard_size, quiet
            )

    def files(self, dtypes: set[np.dtype]) -> dict[str, Any]:
        """Every .json file but those of the tokenizer."""
        model = self.origin.model
        said = self.family.config_json(model)
        if len(dtypes) == 1:
            said |= {"dtype": next(iter(dtypes)).name}
        ends = ends_of(self.origin.text, model)
        return {
            "config.json": said | ends,
            "generation_config.json": {"_from_model_config": False} | ends,
        } | sentence_t5.files(model)

    def write_tokenizer(self, folder: Path) -> None:
        text, model = self.origin.text, self.origin.model
        if text is None:
            return
        written = model.encoder is None and model.starts_prompts
        token = None if model.decoder is None else model.start
        tokenizers.write_pair(*text.pair, folder, tokenizers.Start(token, written))
        if text.chat is not None:
            (folder / CHAT).write_text(text.chat, encoding="utf-8")


def ends_of(text: Text | None, model: config.Model) -> dict[str, Any]:
    """The ids at which texts begin and end, as config.json and generation_config.json say them."""
    start = "bos_token_id" if model.encoder is None else "decoder_start_token_id"
    ends: dict[str, Any] = {} if model.decoder is None else {start: model.start}
    if text is not None:
        targets = text.pair[1]
        stops = list(targets.stops)
        ends |= {"eos_token_id": stops[0] if len(stops) == 1 else stops}
        ends |= {"pad_token_id": targets.pad}
    return ends


class T5X(Renamed):
    """A checkpoint of T5X, with a folder for each layer's weights or for the stack of them."""

    def __init__(self, origin: Origin, settings: Settings):
        stacked = settings.format == "t5x_scanned"
        super().__init__(origin, settings, t5x.table_for(origin.model, stacked))

    def write(self, weights: Weights, folder: Path, told: Told) -> None:
        pieces, names = self.pieces(weights), self.names(weights)
        moving.to_t5x(weights, pieces, folder, names, self.origin.step, told)


def export_table(
    leaves: dict[str, Leaf], pieces: dict[str, list[Piece]], names: dict[str, tuple]
) -> str:
    flat = [piece for group in pieces.values() for piece in group]
    return matching.table(Plan(leaves, flat, [], {}, {}), names)


def write(output: Output, weights: Weights, to: Path) -> None:
    """Writes the folder `to`, with progress on stderr: whole, or after an error not at all.

    Raises:
      OutputError: the disk has too little room, or `to` cannot be written.
    """
    needed = output.size(weights)
    check_space(to, needed)
    progress = Progress("MB", max(1, needed // 10**6))

    def told(done: int) -> None:
        answer_signals()
        progress(done // 10**6)

    with unfinished.folder(to) as folder, unfinished.held_signals() as answer_signals:
        output.write(weights, folder, told)
    progress.close(needed // 10**6)


def check_space(folder: Path, needed: int) -> None:
    """OutputError where the disk has no room for `needed` bytes."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OutputError(
            f"The disk of {folder} has {free / 1e9:,.1f} GB free; the output takes "
            f"{needed / 1e9:,.1f} GB"
        )


def told_dtypes(weights: Weights, dtype: np.dtype | None) -> str:
    """What the weights are, and what they become."""
    there: Sequence[str] = sorted({np.dtype(kind).name for _, kind in weights.names.values()})
    kept = " and ".join(there)
    if dtype is None or there == [dtype.name]:
        return f"{kept}, as they are"
    loss = "" if dtype == np.float32 else " (values are rounded; without --dtype they are not)"
    return f"{kept}, written as {dtype.name}{loss}"
