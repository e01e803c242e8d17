# SPDX-License-Identifier: Apache-2.0
"""Sources of checkpoints on this machine: a path as it is, a model of the hub in the hub's cache,
a folder of a store in ours.

Of a model the small files are downloaded, config and tokenizer; its weights are when they are read.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from t5x_lite.checkpoints import step_folders
from t5x_lite.checkpoints.downloads import open_store_folder
from t5x_lite.checkpoints.formats import safetensors_files
from t5x_lite.checkpoints.formats.huggingface import kept_fields, sentence_t5
from t5x_lite.tokenizers.errors import SourceError
from t5x_lite.tokenizers.tokenizer_files import TARGETS
from t5x_lite.utils import hub, hub_names
from t5x_lite.utils.hub_names import HubName
from t5x_lite.utils.remote_folders import RemoteFolder

RUN_CONFIG = "config.gin"
GGUF = ".gguf"
# Config of a LoRA or another adapter of the peft library.
ADAPTER = "adapter_config.json"
# Small files of a Hugging Face folder, beside those of its tokenizer.
CONFIGS = {
    "config.json",
    ADAPTER,
    "adapter_model.safetensors",
    kept_fields.GENERATION,
    "modules.json",
    *(f"{name}.json" for name in sentence_t5.LENGTH_FILES),
}
TOKENIZER_SETTINGS = {
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
}
MODULE = re.compile(r"\d+_\w+/(config\.json|model\.safetensors)")
CHAT = re.compile(r"additional_chat_templates/[^/]+\.jinja")


class LocatedSource(NamedTuple):
    """A source with its files on this machine.

    Attributes:
      path: its folder or file.
      repository: the model of the hub or folder of a store that it is, whose weights may not be
        there yet; None for a path.
    """

    path: Path
    repository: RemoteFolder | None = None


def locate_source(source: str | Path, weights: bool = True) -> LocatedSource:
    """Locates the checkpoint that a source names; downloads the small files of a model of the hub.

    Args:
      source: a path, or a model of the hub as `hub_names.parse_source` reads it.
      weights: weights will be read too: a model without any that can be is refused.

    Raises:
      ValueError: there is no such model, it cannot be downloaded, or it is not a checkpoint.
    """
    name = hub_names.parse_source(source)
    if not isinstance(name, HubName):
        stored = open_store_folder(name)
        if stored is None:
            return LocatedSource(name)
        if stored.name != name:
            return locate_single(stored, name.name)
        return LocatedSource(stored.fetch(folder_files(stored.files)), stored)
    repository = hub.open_repository(name)
    if name.file is not None:
        if name.file not in repository.files and not repository.offline:
            raise SourceError(f"{name.repo} has no file {name.file}{list_similar(repository)}")
        return locate_single(repository, name.file)
    if RUN_CONFIG in repository.files:
        return LocatedSource(repository.fetch(run_files(repository.files)), repository)
    if not CONFIGS & repository.files:
        raise SourceError(explain_repository(repository))
    if weights and ADAPTER not in repository.files:
        check_weights(repository)
    folder = repository.fetch(folder_files(repository.files))
    return LocatedSource(folder, repository)


def locate_single(repository: RemoteFolder, file: str) -> LocatedSource:
    """One file of a remote folder; a .gguf is downloaded when its tensors are read."""
    if not file.endswith(GGUF) or repository.offline:
        repository.fetch([file])
    return LocatedSource(repository.folder / file, repository)


def locate_file(source: str | Path) -> Path:
    """Locates one file, such as a SentencePiece model: a path, or owner/name:FILE of the hub.

    Raises:
      ValueError: a model is named without a file, or cannot be downloaded.
    """
    name = hub_names.parse_source(source)
    if isinstance(name, HubName) and name.file is None:
        path = Path(name.repo)
        if name.revision is None and path.suffix:  # a misspelled path, for its reader to report
            return path
        raise SourceError(f"{name} is a model: name its file, such as {name}:tokenizer.json")
    located = locate_source(source)
    if located.repository is not None and located.path.suffix == GGUF:
        located.repository.fetch([located.path.relative_to(located.repository.folder).as_posix()])
    return located.path


def folder_files(files: Collection[str]) -> list[str]:
    """The small files of a Hugging Face folder that are read, among all of its files."""
    names = CONFIGS | TOKENIZER_SETTINGS | {safetensors_files.INDEX}
    if safetensors_files.SINGLE in files:
        names -= {safetensors_files.INDEX}
    modules = "modules.json" in files
    wanted = [
        each
        for each in files
        if each in names or CHAT.fullmatch(each) or (modules and MODULE.fullmatch(each))
    ]
    return sorted([*wanted, *tokenizer_files(files)])


def tokenizer_files(files: Collection[str]) -> list[str]:
    """The files of the tokenizers: tokenizer.json has all that the others say."""
    if "tokenizer.json" in files:
        names = ("tokenizer.json", *sorted(TOKENIZER_SETTINGS))
        targets = {f"{TARGETS}/{name}" for name in names} & set(files)
        return ["tokenizer.json", *sorted(targets)]
    pieces = [each for each in files if "/" not in each and each.endswith((".model", ".spm"))]
    return [*pieces, *({"vocab.json", "merges.txt"} & set(files))]


def run_files(files: Collection[str]) -> list[str]:
    """The small files of a run folder: config, vocabularies and notes of its checkpoints."""
    checkpoint = re.compile(rf"{step_folders.FOLDER}/\d+/(note/.+|[^/]+)")
    named = [each for each in files if not each.endswith(step_folders.COMMITTED)]
    return sorted(
        each
        for each in named
        if each in (RUN_CONFIG, kept_fields.FILE)
        or each.startswith("vocabulary/")
        or checkpoint.fullmatch(each)
    )


def fetch_step(repository: RemoteFolder, step: int) -> None:
    """Downloads the weights of one checkpoint of a run folder; not the state of its optimizer."""
    place = f"{step_folders.FOLDER}/{step}/params/"
    repository.fetch(sorted(each for each in repository.files if each.startswith(place)))


def check_weights(repository: RemoteFolder) -> None:
    """Raises SourceError where a model has no weights that are read."""
    if not {safetensors_files.SINGLE, safetensors_files.INDEX} & repository.files:
        names = sorted(repository.files)
        raise SourceError(safetensors_files.explain_missing(str(repository.name), names))


def explain_repository(repository: RemoteFolder) -> str:
    """The reason why a model of the hub cannot be opened, and a remedy."""
    if repository.offline:
        return f"The cache has no config.json of {repository.name}, and {repository.offline}"
    similar = list_similar(repository)
    if similar:
        return f"{repository.name} has no config.json{similar}"
    return (
        f"{repository.name} is not a checkpoint: it has neither config.json with safetensors, nor "
        f"a .gguf file, nor a run folder's {RUN_CONFIG}"
    )


def list_similar(repository: RemoteFolder) -> str:
    """Ends a message: the .gguf files that can be named."""
    files = sorted(each for each in repository.files if each.endswith(".gguf"))
    if not files:
        return ""
    more = f" (or another of its {len(files)})" if files[1:] else ""
    name = repository.name._replace(file=files[0])
    return f": name its .gguf file, such as {name}{more}"
