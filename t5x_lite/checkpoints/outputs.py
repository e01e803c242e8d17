# SPDX-License-Identifier: Apache-2.0
"""Outputs of a conversion: all files of a format, in a folder that appears when it is complete."""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

from t5x_lite import config
from t5x_lite.checkpoints import (
    matching,
    model_card,
    safetensors_writer,
    text_settings,
    transfer,
    unfinished,
)
from t5x_lite.checkpoints.formats import huggingface, t5x
from t5x_lite.checkpoints.formats.huggingface import kept_fields, readouts, sentence_t5
from t5x_lite.checkpoints.formats.huggingface.kept_fields import KeptFields
from t5x_lite.checkpoints.matching import ConversionPlan, WeightMapping
from t5x_lite.checkpoints.model_card import CardFacts
from t5x_lite.checkpoints.text_settings import TextSettings
from t5x_lite.checkpoints.transfer import ProgressCallback
from t5x_lite.checkpoints.transforms import Entry
from t5x_lite.checkpoints.unfinished import OutputError
from t5x_lite.checkpoints.weights import Weights
from t5x_lite.cli.progress import Progress
from t5x_lite.tokenizers import huggingface_tokenizer
from t5x_lite.tokenizers.labels import LabelVocabulary
from t5x_lite.utils.not_none import not_none
from t5x_lite.utils.paths import is_address

# File of a run folder that names the checkpoints whose mean its weights are.
AVERAGE = "average.json"
FORMATS = ("ours", "huggingface", "t5x", "t5x_scanned")


class OutputSettings(NamedTuple):
    """Format of the output.

    Attributes:
      format: one of FORMATS.
      dtype: of all weights; None for their own.
      family: model_type of Hugging Face; None for the first that can express the model.
      shard_size: most bytes of a safetensors file.
    """

    format: str
    dtype: np.dtype | None = None
    family: str | None = None
    shard_size: int = 5_000_000_000


class CheckpointContents(NamedTuple):
    """Everything of a checkpoint but its weights.

    Attributes:
      run: its config.
      text: vocabularies and chat template; None to write the weights alone.
      step: training step.
      kept: fields of a Hugging Face folder that nothing here reads.
      origin: the checkpoint that it comes from, as its model card says it.
      report: report.json of the run; {} without one.
      base: digests of the weights that the output are adapters of; {} for whole weights.
      average: the checkpoints whose mean the weights are, as `averaging.describe_average` has
        them; {} for weights of one checkpoint.
    """

    run: config.Run
    text: TextSettings | None
    step: int = 0
    kept: KeptFields = KeptFields()
    origin: str = ""
    report: Mapping[str, Any] = {}
    base: Mapping[str, int] = {}
    average: Mapping[str, Any] = {}

    @property
    def model(self) -> config.Model:
        return self.run.model


class OutputFormat(Protocol):
    """One format for one model.

    Attributes:
      contents: the checkpoint.
      settings: settings of the format.
    """

    contents: CheckpointContents
    settings: OutputSettings

    def size(self, weights: Weights) -> int:
        """Bytes of the weights in the output."""

    def table(self, weights: Weights) -> str:
        """Weights of ours and tensors of the output; "" where they are the same."""

    def write(self, weights: Weights, folder: Path, on_progress: ProgressCallback) -> None:
        """Writes all files.

        Args:
          weights: the weights.
          folder: an empty folder.
          on_progress: called with the number of bytes written so far.
        """


def make_output(contents: CheckpointContents, to: Path, settings: OutputSettings) -> OutputFormat:
    """The output of a conversion.

    Args:
      contents: the checkpoint to write.
      to: name of the folder, which its config has as MODEL_DIR.
      settings: format of the output.

    Raises:
      ValueError: the format cannot express the model.
    """
    if settings.format == "ours":
        return RunFolderOutput(contents, to, settings)
    if settings.format == "huggingface":
        return HuggingFaceOutput(contents, settings)
    return T5XOutput(contents, settings)


class RunFolderOutput:
    """A run folder of ours."""

    def __init__(self, contents: CheckpointContents, to: Path, settings: OutputSettings):
        self.contents, self.to, self.settings = contents, to, settings

    def size(self, weights: Weights) -> int:
        names = transfer.output_dtypes(weights, self.settings.dtype)
        return sum(map(safetensors_writer.tensor_bytes, names.values()))

    def table(self, weights: Weights) -> str:
        return ""

    def write(self, weights: Weights, folder: Path, on_progress: ProgressCallback) -> None:
        """Writes config, weights and vocabularies.

        Args:
          weights: the weights.
          folder: an empty folder.
          on_progress: called with the number of bytes written so far.
        """
        write_text_settings(self.contents, folder / text_settings.VOCABULARY_FOLDER)
        kept_fields.save_kept(folder, self.contents.kept)
        if self.contents.average:
            text = json.dumps(self.contents.average, indent=2, ensure_ascii=False)
            (folder / AVERAGE).write_text(text + "\n", encoding="utf-8")
        run = dataclasses.replace(self.contents.run, model_dir=str(self.to))
        transfer.write_run_folder(
            weights, run, folder, self.settings.dtype, on_progress, self.contents.base
        )


def write_text_settings(contents: CheckpointContents, folder: Path) -> None:
    """Writes vocabularies and chat template, if there are any.

    Raises:
      OutputError: a vocabulary has ids that the model lacks.
    """
    if contents.text is None:
        return
    for each in contents.text.vocabularies:
        if each.size > contents.model.vocab and not isinstance(each, LabelVocabulary):
            raise OutputError(
                f"The vocabulary has {each.size} ids, more than the {contents.model.vocab} of the "
                "model"
            )
    text_settings.write_vocabulary_folder(contents.text, folder)


class RenamedOutput:
    """Base of other libraries' formats: tensors that `entries` names."""

    def __init__(
        self, contents: CheckpointContents, settings: OutputSettings, entries: list[Entry]
    ):
        self.contents, self.settings, self.entries = contents, settings, entries

    def mappings(self, weights: Weights) -> dict[str, list[WeightMapping]]:
        return transfer.group_by_tensor(weights, self.contents.model, self.entries)

    def names(self, weights: Weights) -> dict[str, tuple]:
        """Shape and dtype of every tensor."""
        return transfer.describe_tensors(weights, self.mappings(weights), self.settings.dtype)

    def size(self, weights: Weights) -> int:
        return sum(map(safetensors_writer.tensor_bytes, self.names(weights).values()))

    def table(self, weights: Weights) -> str:
        mappings = [each for group in self.mappings(weights).values() for each in group]
        plan = ConversionPlan(weights.leaves, mappings, [], {}, {})
        return matching.format_plan(plan, self.names(weights))


class HuggingFaceOutput(RenamedOutput):
    """A folder that transformers loads."""

    def __init__(self, contents: CheckpointContents, settings: OutputSettings):
        model = contents.model
        labeled = readouts.is_labeled(model)
        self.trunk = readouts.without_readout(model) if labeled else model
        self.family: ModuleType = huggingface.family_for_export(self.trunk, settings.family)
        entries = self.family.entries(self.trunk)
        if labeled:
            model_type = self.family.config_json(self.trunk)["model_type"]
            entries = readouts.readout_entries(model, entries, readouts.prefix_of(model_type))
            if contents.text is not None:
                inputs = contents.text.vocabularies[0]
                contents = contents._replace(
                    text=contents.text._replace(vocabularies=(inputs, inputs))
                )
        super().__init__(contents, settings, entries)

    def write(self, weights: Weights, folder: Path, on_progress: ProgressCallback) -> None:
        """Writes configs, tokenizer and safetensors.

        Args:
          weights: the weights.
          folder: an empty folder.
          on_progress: called with the number of bytes written so far.
        """
        mappings, names = self.mappings(weights), self.names(weights)
        for name, content in self.files({dtype for _, dtype in names.values()}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8")
        write_tokenizer(self.contents, folder)
        projection = mappings.pop(sentence_t5.PROJECTION, [])
        described = names.pop(sentence_t5.PROJECTION, None)
        limit = self.settings.shard_size
        transfer.write_safetensors(weights, mappings, folder, names, limit, on_progress)
        if projection:
            transfer.write_safetensors(
                weights,
                {"linear.weight": projection},
                folder / "2_Dense",
                {"linear.weight": not_none(described)},
                limit,
                on_progress=lambda done: None,
            )

    def files(self, dtypes: set[np.dtype]) -> dict[str, Any]:
        """Every .json file but those of the tokenizer, by name."""
        model = self.contents.model
        config_json = self.family.config_json(self.trunk)
        if readouts.is_labeled(model):
            config_json |= readouts.config_fields(model, config_json)
        if len(dtypes) == 1:
            config_json |= {"dtype": next(iter(dtypes)).name}
        ends, kept = text_end_fields(self.contents.text, model), self.contents.kept
        first = self.contents.run.decode.forced_bos_token_id
        generation = {} if first is None else {"forced_bos_token_id": first}
        generation = {"_from_model_config": False} | kept.generation | generation | ends
        return {
            "config.json": kept_fields.merge_config(config_json, kept.config) | ends,
            kept_fields.GENERATION: generation,
        } | sentence_t5.export_files(model)


def write_tokenizer(contents: CheckpointContents, folder: Path) -> None:
    """Writes the tokenizer's files and the chat template of Hugging Face, if there are any."""
    text, model = contents.text, contents.model
    if text is None:
        return
    added = model.encoder is None and model.add_bos
    token = None if model.decoder is None else model.decoder_start_token_id
    start = huggingface_tokenizer.StartToken(token, added)
    huggingface_tokenizer.write_tokenizers(*text.vocabularies, folder, start)
    if text.chat is not None:
        path = folder / text_settings.CHAT_FILE
        path.write_text(text.chat.template, encoding="utf-8")


def text_end_fields(text: TextSettings | None, model: config.Model) -> dict[str, Any]:
    """The ids at which texts begin and end, as config.json and generation_config.json say them."""
    start = "bos_token_id" if model.encoder is None else "decoder_start_token_id"
    fields: dict[str, Any] = {} if model.decoder is None else {start: model.decoder_start_token_id}
    if text is not None:
        targets = text.vocabularies[1]
        stops = list(targets.stops)
        fields |= {"eos_token_id": stops[0] if len(stops) == 1 else stops}
        fields |= {"pad_token_id": targets.pad}
    return fields


class T5XOutput(RenamedOutput):
    """A checkpoint of T5X, with a folder for each layer's weights or for the stack of them."""

    def __init__(self, contents: CheckpointContents, settings: OutputSettings):
        stacked = settings.format == "t5x_scanned"
        super().__init__(contents, settings, t5x.entries_to_write(contents.model, stacked))

    def write(self, weights: Weights, folder: Path, on_progress: ProgressCallback) -> None:
        """Writes the tree and its arrays.

        Args:
          weights: the weights.
          folder: an empty folder.
          on_progress: called with the number of bytes written so far.
        """
        mappings, names = self.mappings(weights), self.names(weights)
        transfer.write_t5x(weights, mappings, folder, names, self.contents.step, on_progress)


def write_output(output: OutputFormat, weights: Weights, to: Path, name: str = "") -> None:
    """Writes a folder, with progress on stderr: all of it, or after an error none.

    Args:
      output: the format.
      weights: the weights.
      to: the folder.
      name: name of the model in its model card; that of the folder by default.

    Raises:
      OutputError: the disk has too little room, or `to` cannot be written.
    """
    needed = output.size(weights)
    check_disk_space(to, needed)
    with (
        Progress("MB", max(1, needed // 10**6)) as progress,
        unfinished.unfinished_folder(to) as folder,
        unfinished.delay_signals() as answer_signals,
    ):

        def on_progress(done: int) -> None:
            answer_signals()
            progress(done // 10**6)

        output.write(weights, folder, on_progress)
        card = describe_output(output, weights, name or to.name)
        (folder / model_card.FILE).write_text(model_card.format_card(card), encoding="utf-8")
        progress.advance(needed // 10**6)


def describe_output(output: OutputFormat, weights: Weights, name: str) -> CardFacts:
    """Facts for the model card of an output.

    Args:
      output: the format.
      weights: the weights.
      name: name of the model.
    """
    contents, settings = output.contents, output.settings
    tensors = transfer.output_dtypes(weights, settings.dtype).values()
    dtypes = {np.dtype(dtype).name for _, dtype in tensors}
    return CardFacts(
        run=contents.run,
        name=name,
        format=settings.format,
        origin=contents.origin,
        average=contents.average,
        report=contents.report,
        step=contents.step,
        parameters=matching.count_parameters(weights.leaves),
        dtypes=" and ".join(sorted(dtypes)),
        has_tokenizer=contents.text is not None,
    )


def check_disk_space(folder: Path, needed: int) -> None:
    """Raises OutputError where the disk has no room for `needed` bytes."""
    if is_address(folder):
        folder = Path(tempfile.gettempdir())  # where it waits for being uploaded
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"The disk of {folder} has {free / 1e9:,.1f} GB free; the output takes "
            f"{needed / 1e9:,.1f} GB"
        )


def describe_dtypes(weights: Weights, dtype: np.dtype | None) -> str:
    """The dtypes of the weights and of the output, in words."""
    dtypes = sorted({np.dtype(each).name for _, each in weights.names.values()})
    listed = " and ".join(dtypes)
    if dtype is None or dtypes == [dtype.name]:
        return f"{listed}, as they are"
    loss = "" if dtype == np.float32 else " (values are rounded; without --dtype they are not)"
    return f"{listed}, written as {dtype.name}{loss}"
