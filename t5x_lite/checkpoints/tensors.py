# SPDX-License-Identifier: Apache-2.0
"""Tensors of another library's checkpoint, opened: its model as a config, and its table."""

import fnmatch
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from t5x_lite import config
from t5x_lite.checkpoints import matching, weights
from t5x_lite.checkpoints.formats import gguf, gguf_config, huggingface, safetensors_files
from t5x_lite.checkpoints.formats.huggingface import kept_fields, readouts, sentence_t5
from t5x_lite.checkpoints.formats.huggingface.kept_fields import KeptFields
from t5x_lite.checkpoints.formats.safetensors_files import SafetensorsFiles, TensorSource
from t5x_lite.checkpoints.matching import ConversionPlan
from t5x_lite.checkpoints.transforms import Entry
from t5x_lite.checkpoints.weights import ConvertedWeights
from t5x_lite.tokenizers import errors
from t5x_lite.tokenizers.errors import SourceError
from t5x_lite.utils import bounded_files
from t5x_lite.utils.bounded_files import UnreadableFileError
from t5x_lite.utils.remote_folders import RemoteFolder


class MappedTensors(NamedTuple):
    """Tensors of a checkpoint with the table that maps them to weights of ours; none is read yet.

    Attributes:
      path: the folder or file.
      model: config of the model.
      source: the tensors.
      entries: the family's table.
      ignored: patterns of tensors that are not weights.
      duplicates: name of a tensor, and name of the one that it repeats.
      head: a head that is not a language model's, in words; "" for none.
      kept: fields of its config that nothing here reads, for an export.
    """

    path: Path
    model: config.Model
    source: TensorSource
    entries: Sequence[Entry]
    ignored: Sequence[str] = ()
    duplicates: Mapping[str, str] = {}
    head: str = ""
    kept: KeptFields = KeptFields()

    def plan(self, allow: Sequence[str] = ()) -> ConversionPlan:
        """The tensor of every weight; what does not fit is in the plan's problems."""
        return matching.plan_conversion(
            self.source.names,
            self.model,
            self.entries,
            ignored=self.ignored,
            duplicates=self.duplicates,
            allow=allow,
        )

    def weights(self, allow: Sequence[str] = (), read: bool = True) -> ConvertedWeights:
        """The tensors as weights of ours.

        Args:
          allow: patterns of names that may be missing, left over or not finite.
          read: values will be read; without that, none is downloaded.

        Raises:
          MatchError: tensors are missing, left over or of another shape.
          SourceError: a tensor that repeats another one differs from it.
        """
        plan = self.plan(allow)
        if plan.problems and self.head:
            raise SourceError(explain_head(self.path, self.head))
        plan.check(str(self.path))

        def is_allowed(name: str) -> bool:
            return any(fnmatch.fnmatchcase(name, pattern) for pattern in allow)

        files = innermost(self.source)
        remote = isinstance(files, SafetensorsFiles | gguf.GgufTensors) and files.remote
        if read and remote:
            files.download()
        if read or not remote:
            weights.check_duplicates(self.source, plan, self.duplicates, is_allowed, str(self.path))
        return ConvertedWeights(self.source, self.model, plan, is_allowed, str(self.path))


class ProjectedTensors:
    """A T5's tensors, and the projection of a Sentence-T5 that lies in a file of its own.

    Raises:
      SourceError: that file has other tensors.
    """

    def __init__(self, source: TensorSource, dense: TensorSource):
        self.source, self.dense = source, dense
        if set(dense.names) != {"linear.weight"}:
            raise SourceError(
                f"2_Dense should have linear.weight alone; it has {list(dense.names)}"
            )
        self.names = source.names | {sentence_t5.PROJECTION: dense.names["linear.weight"]}

    def read(self, name: str, position: tuple[int, int] | None = None) -> np.ndarray:
        if name == sentence_t5.PROJECTION:
            return self.dense.read("linear.weight", position)
        return self.source.read(name, position)


def open_hugging_face_tensors(
    folder: str | Path, repository: RemoteFolder | None = None
) -> MappedTensors:
    """The tensors of a Hugging Face folder: config.json and safetensors.

    Args:
      folder: the folder.
      repository: the remote folder that it is of; None for a folder of this machine.

    Raises:
      ValueError: a file is missing or broken, or the model is none that can be expressed.
    """
    folder = Path(folder)
    source = safetensors_files.open_safetensors(folder, repository)
    config_json = read_json_object(folder / "config.json")
    with errors.naming_path(folder, "modules.json"):
        config_json = sentence_t5.add_modules(folder, config_json)
        dense = sentence_t5.dense_file(folder)
    if dense is not None:
        source = ProjectedTensors(source, safetensors_files.open_safetensors(dense))
    head = huggingface.describe_head(config_json, source.names)
    with errors.naming_path(folder / "config.json", "the model"):
        family = huggingface.family_of_config(config_json)
        readout = readouts.parse_readout(config_json)
        if readout is not None:
            source = RenamedTensors(source, readouts.renamer(config_json["model_type"]))
            config_json = config_json | readouts.trunk_fields(config_json["model_type"])
        source = rename_tensors(source, family)
        try:
            cfg = family.parse_config(config_json, source.names.keys())
            if readout is not None:
                cfg = readouts.with_readout(cfg, readout)
        except KeyError as error:
            raise SourceError(f"{folder / 'config.json'} has no field {error}") from error
        except ValueError as error:
            if head:
                raise SourceError(explain_head(folder, head)) from error
            raise
    if sentence_t5.KEY in config_json and cfg.readout is None:
        warnings.warn(
            f"{folder}/modules.json: the pooling of sentence-transformers is read for T5 only; "
            "embeddings are pooled as --embed says",
            stacklevel=2,
        )
    kept = kept_fields.read_kept(folder, config_json)
    mapped = MappedTensors(folder, cfg, source, [], head=head, kept=kept)
    return with_family_table(mapped, family)


def with_family_table(mapped: MappedTensors, family: ModuleType) -> MappedTensors:
    """Tensors with the table of their family, and with that of the head of Model.readout."""
    cfg = mapped.model
    labeled = readouts.is_labeled(cfg)
    trunk = readouts.without_readout(cfg) if labeled else cfg
    entries = family.entries(trunk)
    return mapped._replace(
        entries=readouts.readout_entries(cfg, entries) if labeled else entries,
        ignored=family.ignored(trunk),
        duplicates=family.duplicates(trunk),
    )


def innermost(source: Any) -> Any:
    """The source that a renamed or a projected one reads from."""
    return innermost(source.source) if hasattr(source, "source") else source


def explain_head(path: Path, head: str) -> str:
    """The reason why a checkpoint with another head is not read, and what can be done."""
    return (
        f"{path} is {head}: only language models, encoders, classifiers of texts and tokens, and "
        "Sentence-T5 are read. Take the model that it was fine-tuned from"
    )


def map_gguf_tensors(source: gguf.GgufTensors) -> MappedTensors:
    """The tensors of a .gguf file with its table."""
    family, cfg = source.family(), gguf_config.read_gguf_config(source)
    duplicates = {
        copy: gguf.tensor_name(other, source.architecture)
        for name, other in family.duplicates(cfg).items()
        if (copy := gguf.find_tensor_name(name, source.architecture)) is not None
    }
    fields = gguf_config.hugging_face_config(source)
    return MappedTensors(
        source.path,
        cfg,
        source,
        source.entries(cfg),
        source.ignored(),
        duplicates,
        kept=KeptFields(kept_fields.pick_config(fields)),
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a .json file.

    Raises:
      SourceError: there is no such file, or it is not a JSON object.
    """
    try:
        return bounded_files.read_json_object(path)
    except FileNotFoundError:
        raise SourceError(
            f"{path.parent} has no {path.name}, which says what its weights are: copy it from where"
            " they come from"
        ) from None
    except (OSError, UnreadableFileError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error


class RenamedTensors:
    """Tensors under the names that the family's table has.

    Raises:
      SourceError: two tensors would have the same name.
    """

    def __init__(self, source: TensorSource, canonical_name: Callable[[str], str]):
        self.source = source
        self.stored_names: dict[str, str] = {}
        for name in source.names:
            first = self.stored_names.setdefault(canonical_name(name), name)
            if first != name:
                raise SourceError(f"{first} and {name} are two names of one weight: remove one")
        self.names = {name: source.names[stored] for name, stored in self.stored_names.items()}

    def read(self, name: str, position: tuple[int, int] | None = None) -> np.ndarray:
        return self.source.read(self.stored_names[name], position)


def rename_tensors(source: TensorSource, family: ModuleType) -> TensorSource:
    """Tensors under the names that the family's table has."""
    canonical_name = getattr(family, "canonical_name", None)
    return source if canonical_name is None else RenamedTensors(source, canonical_name)
