# SPDX-License-Identifier: Apache-2.0
"""One door to checkpoints of other makes: what lies at a path, opened without converting it first.

A Hugging Face folder and a .gguf file say what model and what vocabulary they are; a T5X folder
does not, so it is converted with a config of ours. Weights are read when `params` asks for them.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from t5x_lite import config
from t5x_lite.conversion import chat, gguf, gguf_tokenizer, sources, tokenizers
from t5x_lite.conversion.chat import Chat
from t5x_lite.conversion.tokenizers import Ends
from t5x_lite.data.grown import Grown
from t5x_lite.data.vocabularies import TokenizerJson, Vocabulary, load_pair


class Told(NamedTuple):
    """What a checkpoint says besides its weights: vocabularies (inputs, targets), ends, chat."""

    vocabularies: tuple[Vocabulary, Vocabulary]
    ends: Ends
    chat: Chat | None


class Foreign(NamedTuple):
    """A checkpoint of another make: its model, what it tells, and where its tensors are."""

    path: Path
    model: config.Model
    told: Told
    source: sources.Source
    table: Any

    def params(self) -> Any:
        """The weights on the mesh in force, as training has them.

        Raises:
          ValueError: tensors are missing, too many or misshapen, or have values that are no
            numbers.
        """
        from t5x_lite.conversion import tensors, weights

        found = tensors.Tensors(self.path, self.model, self.source, **self.table)
        return weights.load(found.weights(), self.model)


def is_foreign(path: str | Path) -> bool:
    """Whether path is to be opened here: anything that exists and is no run folder of ours."""
    path = Path(path)
    return path.is_file() or (path.is_dir() and not ours(path) and any(path.iterdir()))


def ours(path: Path) -> bool:
    return (path / "config.gin").exists() or (path / "checkpoints").exists()


def params_for(path: str | Path, model: config.Model) -> Any:
    """The weights at path as params of `model`, with which a run begins; T5X's too.

    Warns where the checkpoint's own model would compute otherwise with the same weights.

    Raises:
      ValueError: nothing that is read lies there, or its weights are not those of the model.
    """
    from t5x_lite.conversion import origins, t5x, t5x_files, tensors, weights

    path = Path(path).expanduser()
    if origins.looks_like_t5x(path):
        source = t5x_files.Source(path)
        found = tensors.Tensors(path, model, source, t5x.table_of(model, source.names))
        return weights.load(found.weights(), model)
    found = open(path)
    params = found._replace(model=model).params()
    different = differences(found.model, model)
    if different:
        warnings.warn(f"{path} was made with {different}; this run has others", stacklevel=2)
    return params


def differences(theirs: config.Model, ours: config.Model) -> str:
    """The values of theirs, "Stack.window = 512", on which logits depend and that ours differs in.

    Shapes are compared with the weights.
    """
    named = []
    for name in ("scale_embedding", "scale_logits", "logits_softcap", "prefix_lm"):
        if getattr(theirs, name) != getattr(ours, name):
            named.append(f"Model.{name} = {getattr(theirs, name)}")
    for name in ("encoder", "decoder"):
        stacks = getattr(theirs, name), getattr(ours, name)
        if None not in stacks:
            named += [
                f"{name}'s Stack.{field.name} = {getattr(stacks[0], field.name)}"
                for field in dataclasses.fields(config.Stack)
                if field.name not in ("bias_std", "kv_heads", "pattern")
                and getattr(stacks[0], field.name) != getattr(stacks[1], field.name)
            ]
    return ", ".join(named)


def open(path: str | Path) -> Foreign:
    """The checkpoint at path, by what lies there.

    Raises:
      ValueError: nothing lies there, or nothing that is read; the message says what to do.
    """
    path = Path(path).expanduser()
    if path.suffix == ".gguf":
        return open_gguf(path)
    if path.is_file():
        source = sources.open(path)
        raise ValueError(f"{path} holds {len(source.names)} tensors: give its folder {path.parent}")
    if (path / "config.json").exists():
        return open_hugging_face(path)
    raise ValueError(unknown(path))


def unknown(path: Path) -> str:
    """Why nothing at path can be opened."""
    if not path.exists():
        return (
            f"There is no checkpoint {path}. A model of a hub is downloaded first, for example: "
            f"hf download {path} --local-dir {path.name}"
        )
    files = sorted(path.glob("*.gguf"))
    if files:
        return f"{path} is a folder of .gguf files: name the file, such as {files[0]}"
    if (path / "checkpoint").exists() or any(path.glob("checkpoint_*")):
        return (
            f"{path} looks like a T5X checkpoint, which does not say what model it is of: convert "
            "it first (python -m t5x_lite.convert --help)"
        )
    if any(path.glob("*.safetensors")):
        return f"{path} has safetensors but no config.json: put the one that came with them there"
    return (
        f"{path} is no checkpoint: neither a run folder (config.gin), nor a Hugging Face folder "
        "(config.json and safetensors), nor a .gguf file"
    )


def open_gguf(path: Path) -> Foreign:
    source = gguf.Source(path)
    told = told_by_gguf(source)
    family, model = source.family(), with_ends(source.model(), told.ends)
    renamed = lambda name: gguf.tensor_name(name, source.architecture)
    twins = {renamed(name): renamed(twin) for name, twin in family.duplicates(model).items()}
    table = {
        "entries": source.entries(model),
        "ignored": source.ignored(),
        "duplicates": twins,
    }
    return Foreign(path, model, told, source, table)


def told_by_gguf(source: gguf.Source) -> Told:
    """Vocabulary, ends and chat template of a .gguf file."""
    with sources.naming(source.path, "its tokenizer"):
        return tokenizer_of_gguf(source)


def tokenizer_of_gguf(source: gguf.Source) -> Told:
    metadata = source.metadata
    read = gguf_tokenizer.Read(metadata, source.path)
    stops = gguf_tokenizer.stops(read)
    if not stops:
        raise ValueError(f"{source.path} does not say which token ends a text (eos_token_id)")
    pad = read.token("padding")
    vocabulary = TokenizerJson(
        gguf_tokenizer.tokenizer_json(metadata, source.path),
        ends=False,
        eos=stops[0],
        pad=stops[0] if pad is None else pad,
        stops=stops,
    )
    ends = Ends(read.token("bos"), gguf_tokenizer.begins(metadata), stops, pad)
    template = metadata.get("tokenizer.chat_template")
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: read.token(name) for role, name in names.items()}
    tokens = {role: read.tokens[token] for role, token in ids.items() if token is not None}
    return Told(tokenizers.pair(vocabulary), ends, template and Chat(template, tokens))


def open_hugging_face(path: Path) -> Foreign:
    from t5x_lite.conversion import tensors

    told = told_by_hugging_face(path)
    found = tensors.of_folder(path)
    table = {name: getattr(found, name) for name in ("entries", "ignored", "duplicates")}
    return Foreign(path, with_ends(found.model, told.ends), told, found.source, table)


def told_by_hugging_face(path: Path) -> Told:
    """Vocabulary, ends and chat template of a Hugging Face folder."""
    vocabulary, ends = tokenizers.read(path)
    return Told(tokenizers.pair(vocabulary), ends, chat.read(path))


def with_ends(model: config.Model, ends: Ends) -> config.Model:
    """model beginning its texts as the tokenizer says."""
    start = model.start if ends.start is None else ends.start
    starts = ends.starts_prompts or model.encoder is not None
    return dataclasses.replace(model, start=start, starts_prompts=starts)


def vocabularies(path: str | Path) -> tuple[Vocabulary, Vocabulary]:
    """The vocabularies (inputs, targets) of a checkpoint of any make, without its weights."""
    path = Path(path).expanduser()
    if path.suffix == ".gguf":
        return told_by_gguf(gguf.Source(path)).vocabularies
    if (path / "config.json").exists():
        return told_by_hugging_face(path).vocabularies
    if ours(path):
        return load_pair(path / "vocabulary")
    raise ValueError(unknown(path))


def special_tokens(vocabulary: Vocabulary) -> dict[str, str]:
    """What a chat template calls by role, of a vocabulary that a conversion wrote."""
    if isinstance(vocabulary, Grown):
        return special_tokens(vocabulary.inner)
    if not isinstance(vocabulary, TokenizerJson):
        return {}
    ids = {"eos_token": vocabulary.eos, "bos_token": vocabulary.bos, "pad_token": vocabulary.pad}
    names = {
        role: vocabulary.tokenizer.id_to_token(token)
        for role, token in ids.items()
        if token is not None and token >= 0
    }
    return {role: name for role, name in names.items() if name}
