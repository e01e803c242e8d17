# SPDX-License-Identifier: Apache-2.0
"""The one way to open a checkpoint: ours, Hugging Face's, a .gguf file or T5X's, by what is there.

`open_checkpoint` reads configs, tokenizers and headers. Weights come afterwards, from what it
returns: as a stream of layers (`OpenedCheckpoint.weights`, for conversion and adaptation), or
placed on the mesh (`load`, `params_for`).
"""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from t5x_lite import config, model, sharding
from t5x_lite.checkpoints import (
    checkpoint_io,
    kinds,
    manager,
    matching,
    run_folder,
    sources,
    tensors,
    text_settings,
    weights,
)
from t5x_lite.checkpoints.formats import gguf, t5x, t5x_files
from t5x_lite.checkpoints.formats.huggingface import kept_fields
from t5x_lite.checkpoints.formats.huggingface.kept_fields import KeptFields
from t5x_lite.checkpoints.kinds import CheckpointKind
from t5x_lite.checkpoints.sources import LocatedSource
from t5x_lite.checkpoints.tensors import MappedTensors
from t5x_lite.checkpoints.text_settings import TextSettings
from t5x_lite.checkpoints.weights import HEADS, Weights
from t5x_lite.model import quantization
from t5x_lite.tokenizers import errors
from t5x_lite.tokenizers.chat import ChatTemplate
from t5x_lite.tokenizers.errors import SourceError
from t5x_lite.tokenizers.huggingface_tokenizer import SequenceEnds
from t5x_lite.tokenizers.vocabulary import TextVocabulary
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


class LoadedCheckpoint(NamedTuple):
    """A checkpoint with its weights on the mesh in force.

    Attributes:
      run: config of the run; of another library's checkpoint, one that has a model only.
      params: weights, layers stacked, in the dtype in which they were saved.
      vocabularies: those of inputs and of targets.
      step: training step of the weights; 0 for a checkpoint of another library.
      chat: the template of conversations; None for a model without one.
    """

    run: config.Run
    params: Any
    vocabularies: tuple[TextVocabulary, TextVocabulary]
    step: int
    chat: ChatTemplate | None = None


@dataclasses.dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint of any library whose weights are not read yet.

    Attributes:
      path: the folder or file.
      kind: the library that wrote it.
      run: config of the run; of another library's checkpoint, one that has a model only.
      text: vocabularies and chat template; None for weights alone.
      step: training step of the weights; 0 for a checkpoint of another library.
      newest: no step was chosen, so an older one may take the place of a damaged one.
      tensors: the tensors of another library's checkpoint; None for ours.
      assumed: facts about the model that the files do not say; "" where they say all.
      kept: fields of a Hugging Face folder that nothing here reads, for an export.
    """

    path: Path
    kind: CheckpointKind
    run: config.Run
    text: TextSettings | None
    step: int = 0
    newest: bool = False
    tensors: MappedTensors | None = None
    assumed: str = ""
    kept: KeptFields = KeptFields()

    @property
    def model(self) -> config.Model:
        return self.run.model

    def weights(self, allow: Sequence[str] = (), read: bool = True) -> Weights:
        """Weights to read one layer at a time.

        Args:
          allow: patterns of names that may be missing, left over or not finite.
          read: values will be read, and not names and shapes alone; weights of the hub are
            downloaded then.

        Raises:
          ValueError: they do not fit the model, or are damaged.
        """
        if self.tensors is not None:
            return self.tensors.weights(allow, read)
        saved = run_folder.SavedWeights(self.path, self.step)
        if self.model.draft_heads is None and saved.run.model.draft_heads is not None:
            saved.leave_out(HEADS)
        return saved

    def without_heads(self) -> "OpenedCheckpoint":
        """The checkpoint without its draft heads, which other formats do not have."""
        if self.model.draft_heads is None:
            return self
        trunk = dataclasses.replace(self.model, draft_heads=None)
        return dataclasses.replace(self, run=dataclasses.replace(self.run, model=trunk))

    def load(
        self, mesh: config.Mesh | None = None, quantize: str | None = None
    ) -> LoadedCheckpoint:
        """Reads the weights for decoding; sets the mesh.

        Args:
          mesh: the mesh to place them on; None for one whose devices all share the batch.
          quantize: how matrices of layers are rounded (`parse_quantization`); None for not at all.

        Raises:
          ValueError: the parts of the checkpoint do not belong together, or it is damaged.
        """
        rounding = None if quantize is None else quantization.parse_quantization(quantize)
        check_vocabulary_sizes(self)
        if ignored := kept_fields.describe_ignored(self.kept.generation, self.model.vocab):
            warnings.warn(
                f"{self.path} has settings of generation that are not followed here: {ignored}. "
                "Give those that there are as options",
                stacklevel=2,
            )
        if self.tensors is None:
            # All files at once, by orbax: faster than layer by layer.
            arrays, step = manager.load_params(self.path, step=None if self.newest else self.step)
            sharding.use_mesh(mesh or config.Mesh())
            params = weights.place_arrays(model.shapes(self.model), arrays, self.path)
        else:
            sharding.use_mesh(mesh or config.Mesh())
            params, step = weights.place_weights(self.weights(), self.model), 0
        if rounding is not None:
            params = quantization.quantize_params(params, rounding)
        text = not_none(self.text)
        return LoadedCheckpoint(self.run, params, text.vocabularies, step, text.chat)

    def params_for(self, cfg: config.Model, shapes: dict[str, Any]) -> dict[str, Any]:
        """The weights, as float32 params of `cfg` on the mesh in force, for a run to begin with.

        Warns where the checkpoint's own model would compute otherwise with the same weights.

        Args:
          cfg: config of the run's model.
          shapes: shape and placement of every weight, as `model.shapes` has them.

        Returns:
          params; draft heads are among them only where the checkpoint has some.

        Raises:
          ValueError: they are not weights of `cfg`; the shapes are named.
        """
        if self.tensors is None:
            arrays, _ = manager.load_params(self.path, step=None if self.newest else self.step)
            return weights.place_arrays(
                weights.with_heads(shapes, arrays), arrays, self.path, cast=True
            )
        trunk = dataclasses.replace(cfg, draft_heads=None)
        params = weights.place_weights(self.weights_for(trunk), trunk)
        different = "" if self.assumed else matching.list_differences(self.model, trunk)
        if different:
            warnings.warn(
                f"{self.path} was made with {different}; this run has others", stacklevel=2
            )
        return params

    def check_fits(self, cfg: config.Model, shapes: dict[str, Any]) -> None:
        """Raises ValueError where `params_for` would by the shapes alone; reads no weight."""
        if self.tensors is not None:
            self.weights_for(dataclasses.replace(cfg, draft_heads=None), read=False)
            return
        folder = self.path / manager.FOLDER / str(self.step)
        stored = checkpoint_io.stored_shapes(checkpoint_io.read_metadata(folder), "params")
        shapes = weights.with_heads(shapes, {name.split(".")[0] for name in stored})
        weights.check_arrays(stored, shapes, self.path)

    def weights_for(self, trunk: config.Model, read: bool = True) -> Weights:
        """Another library's tensors as weights of a run's model without draft heads.

        Args:
          trunk: config of the run's model.
          read: as of `weights`.
        """
        mapped = not_none(self.tensors)._replace(model=trunk)
        if self.kind == CheckpointKind.T5X:
            names = mapped.source.names
            mapped = mapped._replace(entries=t5x.entries_to_read(trunk, names))
        return mapped.weights(read=read)


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
    kind = kinds.detect_kind(path)
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
    return (
        open_gguf_checkpoint(path, options)
        if kind == CheckpointKind.GGUF
        else open_hugging_face(source, options)
    )


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
    chosen = manager.select_steps(path, step, best)[0]
    if source.repository is not None:
        sources.fetch_step(source.repository, chosen)
    folder = path / text_settings.VOCABULARY_FOLDER
    text = choose_text_settings(path, options, lambda: text_settings.read_vocabulary_folder(folder))
    # Of a model of the hub, the weights of one step are there.
    newest = step is None and not best and source.repository is None
    kept = kept_fields.load_kept(path)
    return OpenedCheckpoint(path, CheckpointKind.OURS, run, text, chosen, newest, kept=kept)


def open_hugging_face(source: LocatedSource, options: ConversionOptions | None) -> OpenedCheckpoint:
    """Opens a Hugging Face folder."""
    path = source.path
    mapped = tensors.open_hugging_face_tensors(path, source.repository)
    text = choose_text_settings(path, options, lambda: text_settings.read_hugging_face(path))
    return from_tensors(path, CheckpointKind.HUGGING_FACE, mapped, text)


def open_gguf_checkpoint(path: Path, options: ConversionOptions | None) -> OpenedCheckpoint:
    """Opens a .gguf file. Its tokenizer is read in any case: it says where texts begin."""
    source = gguf.GgufTensors(path)
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
    decode = kept_fields.follow_generation(mapped.kept.generation, mapped.model.vocab)
    run = dataclasses.replace(run_folder.model_only_run(path, mapped.model), decode=decode)
    return OpenedCheckpoint(
        path, kind, run, text, tensors=mapped, assumed=assumed, kept=mapped.kept
    )


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


def check_vocabulary_sizes(opened: OpenedCheckpoint) -> None:
    """Raises ValueError where a vocabulary has ids that the model lacks."""
    ours = opened.kind == CheckpointKind.OURS
    path = opened.path / text_settings.VOCABULARY_FOLDER if ours else opened.path
    for name, each in zip(("inputs", "targets"), not_none(opened.text).vocabularies, strict=True):
        if each.size > opened.model.vocab:
            raise ValueError(
                f"{path} ({name}) has {each.size} ids, more than the {opened.model.vocab} of "
                "Model.vocab: is it the vocabulary of another model?"
            )
