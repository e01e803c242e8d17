# SPDX-License-Identifier: Apache-2.0
"""What a conversion starts from, by what lies at the path: ours, Hugging Face, GGUF or T5X."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from t5x_lite import config, config_file
from t5x_lite.conversion import (
    checkpoint,
    run_folder,
    sources,
    t5x,
    t5x_files,
    tensors,
    tokenizers,
)
from t5x_lite.conversion.run_folder import Saved
from t5x_lite.conversion.sources import SourceError
from t5x_lite.conversion.tensors import Tensors
from t5x_lite.conversion.weights import Weights
from t5x_lite.data import vocabularies
from t5x_lite.data.vocabularies import Vocabulary

Pair = tuple[Vocabulary, Vocabulary]
CHAT = "chat_template.jinja"


class Text(NamedTuple):
    """How a checkpoint's texts become ids, and the template of its conversations."""

    pair: Pair
    chat: str | None = None


class Origin(NamedTuple):
    """A checkpoint to convert: `saved` if it is of ours, `tensors` if it is of another make.

    `assumed` says what its files do not, and was taken for granted.
    """

    kind: str
    model: config.Model
    text: Text | None
    saved: Saved | None = None
    tensors: Tensors | None = None
    assumed: str = ""

    @property
    def step(self) -> int:
        return 0 if self.saved is None else self.saved.step

    def weights(self, allow: Sequence[str]) -> Weights:
        """Its weights as ours; ValueError where they do not fit its model."""
        return self.saved if self.tensors is None else self.tensors.weights(allow)

    def without_heads(self) -> "Origin":
        """The checkpoint without its heads that guess later tokens, which only ours have."""
        if self.model.blockwise is None:
            return self
        self.saved.leave_out("heads")
        return self._replace(model=dataclasses.replace(self.model, blockwise=None))

    def run(self, folder: Path) -> config.Run:
        """The run to write beside the weights: the same one in another folder, or a model only."""
        if self.saved is None:
            return run_folder.model_only(folder, self.model)
        return dataclasses.replace(self.saved.run, model_dir=str(folder))


class Asked(NamedTuple):
    """What the user says of a checkpoint: its model and vocabulary where it has none, and step."""

    model: str | None = None
    vocabulary: str | None = None
    extra_ids: int = 0
    step: int | None = None


def open(path: str | Path, asked: Asked) -> Origin:
    """The checkpoint at path.

    Raises:
      ValueError: nothing lies there that is read, or it is broken.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise SourceError(f"There is no {path}")
    if path.is_dir() and checkpoint.ours(path):
        return of_run(path, asked)
    if asked.step is not None:
        raise SourceError(f"--step chooses among the checkpoints of a run folder; {path} is none")
    if path.suffix == ".gguf":
        return of_gguf(path, asked)
    if looks_like_t5x(path):
        return of_t5x(path, asked)
    if asked.model is not None:
        raise SourceError(f"--model is for T5X checkpoints; {path} says itself what model it is of")
    return of_hugging_face(path, asked)


def looks_like_t5x(path: Path) -> bool:
    if path.is_file():
        # T5X's tree has no ending: "checkpoint", or "model.checkpoint_1000".
        return path.name == t5x_files.TREE or path.suffix.startswith(".checkpoint")
    tree = (path / t5x_files.TREE).is_file() or (path / t5x_files.STATE).is_dir()
    return not (path / "config.json").exists() and (tree or any(path.glob("checkpoint_*")))


def of_run(path: Path, asked: Asked) -> Origin:
    if asked.model is not None:
        raise SourceError(f"--model is for T5X checkpoints; {path} has a config.gin")
    saved = Saved(path, asked.step)
    if asked.vocabulary is None:
        text = with_remedy(lambda: of_folder(path / "vocabulary"), path)
    else:
        text = named(asked)
    return Origin("ours", saved.run.model, text, saved=saved)


def of_folder(vocabulary: Path) -> Text:
    """What a conversion or a training run wrote of its texts."""
    template = vocabulary / CHAT
    chat = template.read_text(encoding="utf-8") if template.is_file() else None
    return Text(vocabularies.load_pair(vocabulary), chat)


def of_hugging_face(path: Path, asked: Asked) -> Origin:
    found = tensors.of_folder(path)
    told = None
    if asked.vocabulary is None:
        told = with_remedy(lambda: checkpoint.told_by_hugging_face(path), path)
    return foreign("Hugging Face", found, told, asked)


def of_gguf(path: Path, asked: Asked) -> Origin:
    found = checkpoint.open_gguf(path)
    opened = Tensors(path, found.model, found.source, **found.table)
    return foreign("GGUF", opened, found.told if asked.vocabulary is None else None, asked)


def foreign(kind: str, found: Tensors, told: checkpoint.Told | None, asked: Asked) -> Origin:
    """found, with the vocabulary that was told, or that was asked for."""
    if told is None:
        return Origin(kind, found.model, named(asked), tensors=found)
    model = checkpoint.with_ends(found.model, told.ends)
    text = Text(told.vocabularies, told.chat and told.chat.template)
    return Origin(kind, model, text, tensors=found._replace(model=model))


def with_remedy(read, path: Path):
    """What read gives; a ValueError says how to do without a tokenizer."""
    try:
        return read()
    except ValueError as error:
        raise SourceError(
            f"{path} has no vocabulary that can be read ({error}). Name another with "
            "--vocabulary=PATH, or convert the weights alone with --vocabulary=none"
        ) from error


def of_t5x(path: Path, asked: Asked) -> Origin:
    source = t5x_files.Source(path)
    if asked.model is None:
        with sources.naming(path, "the model"):
            model, assumed = t5x.model(source.names)
    else:
        model, assumed = model_of(asked.model), ""
    found = Tensors(source.path, model, source, t5x.table_of(model, source.names))
    if asked.vocabulary is None:
        raise SourceError(
            f"{path} does not say what its vocabulary is, no T5X checkpoint does: name it with "
            "--vocabulary=sentencepiece.model --extra_ids=100 (or bytes, or a folder with one), or "
            "convert the weights alone with --vocabulary=none"
        )
    return Origin("T5X", model, named(asked), tensors=found, assumed=assumed)


def model_of(path: str) -> config.Model:
    """The Model that a .gin file describes: a preset, or the config of a run."""
    lines = config_file.read(path)
    if not any("config.Run." in line.text for line in lines):
        made = ("config.Run.model_dir = 'none'", "config.Run.model = @config.Model()")
        lines += [config_file.Line(line, path) for line in made]
    return config_file.parse(lines, []).model


def named(asked: Asked) -> Text | None:
    """The vocabulary asked for; None for "none", or if none was."""
    name = asked.vocabulary
    if name in (None, "none"):
        return None
    path = Path(name).expanduser()
    if name == "bytes":
        made = vocabularies.Bytes(asked.extra_ids)
    elif path.suffix in (".model", ".json") and path.is_file():
        kind = "sentencepiece" if path.suffix == ".model" else "tokenizer_json"
        made = vocabularies.KINDS[kind](path.read_bytes(), asked.extra_ids)
    elif (path / "vocabulary").is_dir():
        return of_folder(path / "vocabulary")
    elif path.is_dir():
        return Text(tokenizers.pair(tokenizers.read(path)[0]))
    else:
        raise SourceError(
            f"--vocabulary={name} is none of: bytes, none, a .model of SentencePiece, a "
            "tokenizer.json, a Hugging Face folder, a run folder"
        )
    return Text((made, made))
