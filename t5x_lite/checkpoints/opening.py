# SPDX-License-Identifier: Apache-2.0
"""The one way to open a checkpoint: ours, Hugging Face's, a .gguf file or T5X's, by what is there.

`open_checkpoint` reads configs, tokenizers and headers. Weights come afterwards, from what it
returns: as a stream of layers (`OpenedCheckpoint.weights`, for conversion and adaptation), or
placed on the mesh (`load`, `params_for`).
"""

import contextlib
import contextvars
import dataclasses
from pathlib import Path
from typing import NamedTuple

from t5x_lite import config
from t5x_lite.checkpoints import (
    adapters,
    kinds,
    run_folder,
    selection,
    sources,
    step_folders,
    tensors,
    text_settings,
)
from t5x_lite.checkpoints.formats import gguf, t5x, t5x_files
from t5x_lite.checkpoints.formats.huggingface import kept_fields, peft
from t5x_lite.checkpoints.kinds import CheckpointKind
from t5x_lite.checkpoints.opened_checkpoint import OpenedAdapters, OpenedCheckpoint
from t5x_lite.checkpoints.sources import LocatedSource
from t5x_lite.checkpoints.tensors import MappedTensors
from t5x_lite.checkpoints.text_settings import TextSettings
from t5x_lite.config.training_run import require_lora
from t5x_lite.tokenizers import errors, languages
from t5x_lite.tokenizers.errors import SourceError
from t5x_lite.tokenizers.huggingface_tokenizer import SequenceEnds
from t5x_lite.tokenizers.labels import LabelVocabulary
from t5x_lite.utils.not_none import not_none


class ConversionOptions(NamedTuple):
    """Options of a conversion for what its source does not say.

    Attributes:
      model: .gin file of the model of a T5X checkpoint; None to infer it from the shapes.
      vocabulary: a vocabulary to use instead of the checkpoint's own, as
        `text_settings.read_named_vocabulary` takes it; "none" for the weights alone.
      extra_ids: number of sentinels on top of `vocabulary`.
    """

    model: str | None = None
    vocabulary: str | None = None
    extra_ids: int = 0


WEIGHTS_ONLY = ConversionOptions(vocabulary="none")
# Folders of adapters whose base is being opened: each may be one of adapters again.
OPENING: contextvars.ContextVar[tuple[Path, ...]] = contextvars.ContextVar("OPENING", default=())


def open_checkpoint(
    path: str | Path,
    step: int | None = None,
    best: bool = False,
    options: ConversionOptions | None = None,
) -> OpenedCheckpoint:
    """Opens the checkpoint at a path, by what lies there.

    Args:
      path: a run folder, a Hugging Face folder, a .gguf file, a model of the hub by name, or with
        `options` a T5X checkpoint, which does not say what model it is of.
      step: which checkpoint of a run folder; None for the newest.
      best: the best checkpoint of a run folder by the run's metric.
      options: model and vocabulary, where the caller names them; errors name the command's flags.

    Raises:
      ValueError: nothing lies there that can be read, or it is broken.
    """
    source = sources.locate_source(path)
    path = source.path
    kind = kinds.detect_located(source)
    if kind == CheckpointKind.OURS:
        return open_run_folder(source, step, best, options)
    if best or step is not None:
        raise SourceError(
            f"{path} has one set of weights; step and best choose among those of a run folder"
        )
    if kind == CheckpointKind.T5X:
        return open_t5x(path, options)
    if options is not None and options.model is not None:
        raise SourceError(f"--model is for T5X checkpoints; {path} says itself what model it is of")
    if kind == CheckpointKind.PEFT:
        return open_peft(source, options)
    return (
        open_gguf_checkpoint(source, options)
        if kind == CheckpointKind.GGUF
        else open_hugging_face(source, options)
    )


def open_described(field: str, source: str, remedy: str, text: bool = False) -> OpenedCheckpoint:
    """Opens the checkpoint that a field of a config names, for its weights and what model it is of.

    Args:
      field: the field, with which errors begin.
      source: path or name of the checkpoint.
      remedy: what to do about files that do not say what model they are of.
      text: read its tokenizer too, if it has one: that says where texts of the model begin.

    Raises:
      ValueError: it cannot be opened, or does not say what model it is of.
    """
    opened = None
    if text:
        with contextlib.suppress(ValueError):
            opened = open_checkpoint(source)
    try:
        opened = opened or open_checkpoint(source, options=WEIGHTS_ONLY)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
    config.require(
        not opened.assumed, f"{field}: {source} does not say what model it is of: {remedy}"
    )
    return opened


def open_run_folder(
    source: LocatedSource, step: int | None, best: bool, options: ConversionOptions | None
) -> OpenedCheckpoint:
    """Opens a folder that a training run or a conversion wrote.

    Args:
      source: the folder.
      step: which checkpoint; None for the newest.
      best: the best checkpoint by the run's metric.
      options: options of a conversion.
    """
    path = source.path
    if options is not None and options.model is not None:
        raise SourceError(f"--model is for T5X checkpoints; {path} has a config.gin")
    run = run_folder.read_run_config(path)
    chosen = selection.select_steps(path, step, best)[0]
    checkpoint = path / step_folders.FOLDER / str(chosen)
    run = run_folder.with_saved_model(run, checkpoint)
    run_folder.warn_of_vocabulary(path, checkpoint)
    folder = path / text_settings.VOCABULARY_FOLDER
    text = choose_text_settings(path, options, lambda: text_settings.read_vocabulary_folder(folder))
    run = with_first_token(run, text)
    # Of a model of the hub, the weights of one step are there.
    newest = step is None and not best and source.repository is None
    kept = kept_fields.load_kept(path)
    opened = OpenedCheckpoint(
        path,
        CheckpointKind.OURS,
        run,
        text,
        chosen,
        newest,
        kept=kept,
        repository=source.repository,
    )
    if run.lora is None:
        return opened
    return with_run_adapters(opened)


def with_first_token(run: config.Run, text: TextSettings | None) -> config.Run:
    """The run that writes first what its targets began with: the id of a language."""
    first = None if text is None else languages.first_token(text.vocabularies[1])
    if first is None or run.decode.forced_bos_token_id is not None:
        return run
    decode = dataclasses.replace(run.decode, forced_bos_token_id=first)
    return dataclasses.replace(run, decode=decode)


def with_run_adapters(opened: OpenedCheckpoint) -> OpenedCheckpoint:
    """Opens the base of the adapters that a run folder holds, and reads them: a few megabytes."""
    path, run = opened.path, opened.run
    recorded = not_none(run.checkpoint.initial)
    base = open_base(path, recorded, WEIGHTS_ONLY)
    opened.fetch_arrays()
    read = adapters.read_run_adapters(path, run, None if opened.newest else opened.step)
    adapter = OpenedAdapters(require_lora(run), base, recorded, read.arrays, read.digests)
    return dataclasses.replace(opened, step=read.step, adapters=adapter)


def open_base(path: Path, recorded: str, options: ConversionOptions | None) -> OpenedCheckpoint:
    """Opens the base of the adapters in a folder.

    Args:
      path: the folder.
      recorded: the base that they name; "" for none.
      options: options of a conversion.

    Raises:
      SourceError: it is not there, or cannot be read.
    """
    place, above = adapters.locate_base(path, recorded), OPENING.get()
    if path.resolve() in above:
        raise SourceError(f"{path} has adapters whose base leads back to them")
    token = OPENING.set((*above, path.resolve()))
    try:
        return open_checkpoint(place, options=options)
    except ValueError as error:
        raise SourceError(
            f"{path} has adapters (LoRA) of {recorded or place}, which cannot be opened: {error}. "
            f"Put their base, or a link to it, into the folder as {adapters.BASE}"
        ) from error
    finally:
        OPENING.reset(token)


def open_peft(source: LocatedSource, options: ConversionOptions | None) -> OpenedCheckpoint:
    """Opens a folder of peft: adapters, whose base has the model, and the tokenizer if they have
    none."""
    path = source.path
    recorded = peft.read_base(tensors.read_json_object(path / peft.CONFIG))
    base = open_base(path, recorded, options)
    adapter, arrays = adapters.open_peft_tensors(path, base.model)

    def read_own() -> TextSettings:
        has_tokenizer = any((path / name).exists() for name in ("tokenizer.json", "spiece.model"))
        return text_settings.read_hugging_face(path) if has_tokenizer else not_none(base.text)

    text = choose_text_settings(path, options, read_own)
    checkpoint = config.Checkpoint(initial=recorded or str(path / adapters.BASE))
    run = dataclasses.replace(base.run, lora=adapter.lora, checkpoint=checkpoint)
    opened = OpenedAdapters(adapter.lora, base, recorded, arrays, {})
    return OpenedCheckpoint(path, CheckpointKind.PEFT, run, text, kept=base.kept, adapters=opened)


def open_hugging_face(source: LocatedSource, options: ConversionOptions | None) -> OpenedCheckpoint:
    """Opens a Hugging Face folder."""
    path = source.path
    mapped = tensors.open_hugging_face_tensors(path, source.repository)
    text = choose_text_settings(path, options, lambda: text_settings.read_hugging_face(path))
    return from_tensors(path, CheckpointKind.HUGGING_FACE, mapped, text)


def open_gguf_checkpoint(
    located: LocatedSource, options: ConversionOptions | None
) -> OpenedCheckpoint:
    """Opens a .gguf file. Its tokenizer is read in any case: it says where texts begin."""
    path, source = located.path, gguf.GgufTensors(located.path, located.repository)
    text = text_settings.read_gguf(source)
    mapped = tensors.map_gguf_tensors(source)
    mapped = mapped._replace(model=with_ends(mapped.model, not_none(text.ends)))
    return from_tensors(
        path, CheckpointKind.GGUF, mapped, choose_text_settings(path, options, lambda: text)
    )


def open_t5x(path: Path, options: ConversionOptions | None) -> OpenedCheckpoint:
    """Opens a T5X checkpoint, which says neither its model nor its vocabulary."""
    if options is None:
        raise SourceError(
            f"{path} looks like a T5X checkpoint, which does not say what model it is of: convert "
            "it first (python -m t5x_lite.convert --help)"
        )
    source, assumed = t5x_files.T5XTensors(path), ""
    if options.model is None:
        with errors.naming_path(path, "the model"):
            cfg, assumed = t5x.infer_model(source.names)
    else:
        cfg = t5x.read_gin_model(options.model)
    if options.vocabulary is None:
        raise SourceError(
            f"{path} does not say what its vocabulary is, no T5X checkpoint does: name it with "
            "--vocabulary=sentencepiece.model --extra_ids=100 (or bytes, or a folder with one), or "
            "convert the weights alone with --vocabulary=none"
        )
    text = text_settings.read_named_vocabulary(options.vocabulary, options.extra_ids)
    entries = t5x.entries_to_read(cfg, source.names)
    mapped = MappedTensors(source.path, cfg, source, entries)
    return from_tensors(path, CheckpointKind.T5X, mapped, text, assumed)


def from_tensors(
    path: Path,
    kind: CheckpointKind,
    mapped: MappedTensors,
    text: TextSettings | None,
    assumed: str = "",
) -> OpenedCheckpoint:
    """A checkpoint of another library, with the ends of its own tokenizer in its model.

    Args:
      path: the folder or file.
      kind: the library that wrote it.
      mapped: its tensors.
      text: its text settings.
      assumed: facts about the model that the files do not say.
    """
    if text is not None and text.ends is not None:
        mapped = mapped._replace(model=with_ends(mapped.model, text.ends))
    text = with_labels(text, mapped.model)
    decode = kept_fields.follow_generation(mapped.kept.generation, mapped.model.vocab)
    run = dataclasses.replace(run_folder.model_only_run(path, mapped.model), decode=decode)
    return OpenedCheckpoint(
        path, kind, run, text, tensors=mapped, assumed=assumed, kept=mapped.kept
    )


def with_labels(text: TextSettings | None, cfg: config.Model) -> TextSettings | None:
    """Text settings whose targets are the labels of Model.readout, if the model has some."""
    if text is None or cfg.readout is None or cfg.readout.kind == "vector":
        return text
    labels = LabelVocabulary(cfg.readout.kind, cfg.readout.labels)
    return text._replace(vocabularies=(text.vocabularies[0], labels))


def choose_text_settings(
    path: Path, options: ConversionOptions | None, read_own
) -> TextSettings | None:
    """Text settings that the options name, or the checkpoint's own.

    Args:
      path: the checkpoint.
      options: options of a conversion.
      read_own: reads the checkpoint's own.

    Raises:
      ValueError: they cannot be read; for a conversion the message says how to do without.
    """
    if options is None:
        return read_own()
    if options.vocabulary is not None:
        return text_settings.read_named_vocabulary(options.vocabulary, options.extra_ids)
    try:
        return read_own()
    except ValueError as error:
        raise SourceError(
            f"{path} has no vocabulary that can be read ({error}). Name another with "
            "--vocabulary=PATH, or convert the weights alone with --vocabulary=none"
        ) from error


def with_ends(cfg: config.Model, ends: SequenceEnds) -> config.Model:
    """The config of a model that begins its texts as the tokenizer says."""
    start = cfg.decoder_start_token_id if ends.start is None else ends.start
    add_bos = ends.add_bos or cfg.encoder is not None
    return dataclasses.replace(cfg, decoder_start_token_id=start, add_bos=add_bos)
