# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of any library after `opening.open_checkpoint`, and its weights on the mesh."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from t5x_lite import config, model, sharding
from t5x_lite.checkpoints import (
    adapters,
    checkpoint_io,
    manager,
    matching,
    readouts,
    run_folder,
    sources,
    text_settings,
    weights,
)
from t5x_lite.checkpoints.formats import t5x
from t5x_lite.checkpoints.formats.huggingface import kept_fields
from t5x_lite.checkpoints.formats.huggingface.kept_fields import KeptFields
from t5x_lite.checkpoints.kinds import CheckpointKind
from t5x_lite.checkpoints.matching import Leaf
from t5x_lite.checkpoints.tensors import MappedTensors
from t5x_lite.checkpoints.text_settings import TextSettings
from t5x_lite.checkpoints.weight_paths import flatten_tree, nest_tree
from t5x_lite.checkpoints.weights import (
    HEADS,
    Keep,
    SeparateTowers,
    Weights,
    encoder_path,
    keep_all,
    layer_numbers,
)
from t5x_lite.model import adapters as low_rank
from t5x_lite.model import quantization
from t5x_lite.tokenizers.chat import ChatTemplate
from t5x_lite.tokenizers.labels import LabelVocabulary
from t5x_lite.tokenizers.vocabulary import TextVocabulary
from t5x_lite.utils.not_none import not_none
from t5x_lite.utils.remote_folders import RemoteFolder


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
      repository: the model of the hub that a run folder is of, whose arrays may not be there yet;
        None for a folder of this machine or of a store, and for another library's checkpoint.
      adapters: what the checkpoint is if it is adapters of another one; `weights` are then those
        of the base with them merged in.
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
    repository: RemoteFolder | None = None
    adapters: "OpenedAdapters | None" = None

    @property
    def model(self) -> config.Model:
        return self.run.model

    @property
    def is_saved_whole(self) -> bool:
        """True for a run folder of ours with all weights, which orbax reads at once."""
        return self.tensors is None and self.adapters is None

    def weights(self, allow: Sequence[str] = (), read: bool = True) -> Weights:
        """Weights to read one layer at a time.

        Args:
          allow: patterns of names that may be missing, left over or not finite.
          read: values will be read, and not names and shapes alone; weights of the hub are
            downloaded then.

        Raises:
          ValueError: they do not fit the model, or are damaged.
        """
        if self.adapters is not None:
            merged = self.adapters.merge(self.path, allow, read)
            merged.leave_shared(self.model)
            return merged
        if self.tensors is not None:
            return self.tensors.weights(allow, read)
        if read:
            self.fetch_arrays()
        saved = run_folder.SavedWeights(self.path, self.step)
        if self.model.draft_heads is None and saved.run.model.draft_heads is not None:
            saved.leave_out(HEADS)
        if saved.run.model.shared_weights and not self.model.shared_weights:
            return adapters.separate_towers(saved, saved.run.model)
        return saved

    def fetch_arrays(self) -> None:
        """Downloads the arrays of a run folder of the hub, if that was not done yet."""
        if self.repository is not None:
            sources.fetch_step(self.repository, self.step)

    def with_separate_towers(self) -> "OpenedCheckpoint":
        """The checkpoint with the weights that its towers share in both, as other formats have
        them."""
        run = dataclasses.replace(
            self.run, model=dataclasses.replace(self.model, shared_weights=())
        )
        if self.adapters is None:
            return dataclasses.replace(self, run=run)
        apart = self.adapters.with_separate_towers(self.model)
        run = dataclasses.replace(run, lora=run.lora and apart.lora)
        return dataclasses.replace(self, run=run, adapters=apart)

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
        if self.is_saved_whole:
            # All files at once, by orbax: faster than layer by layer.
            self.fetch_arrays()
            arrays, step = manager.load_params(self.path, step=None if self.newest else self.step)
            sharding.use_mesh(mesh or config.Mesh())
            params = weights.place_arrays(model.shapes(self.model), arrays, self.path)
        else:
            sharding.use_mesh(mesh or config.Mesh())
            params, step = weights.place_weights(self.weights(), self.model), self.step
        if rounding is not None:
            params = quantization.quantize_params(params, rounding)
        text = not_none(self.text)
        run = dataclasses.replace(self.run, lora=None)
        return LoadedCheckpoint(run, params, text.vocabularies, step, text.chat)

    def params_for(
        self, cfg: config.Model, shapes: dict[str, Any], keep: Keep = keep_all
    ) -> dict[str, Any]:
        """The weights, as float32 params of `cfg` on the mesh in force, for a run to begin with.

        Warns where the checkpoint's own model would compute otherwise with the same weights.

        Args:
          cfg: config of the run's model.
          shapes: shape and placement of every weight, as `model.shapes` has them.
          keep: makes of each weight what is kept, before the next one is placed.

        Returns:
          params; draft heads and a readout are among them only where the checkpoint has some.

        Raises:
          ValueError: they are not weights of `cfg`; the shapes are named.
        """
        if cfg.shared_weights and not self.model.shared_weights:
            # The encoder's stay; a checkpoint with towers of its own has others in the decoder.
            apart = dataclasses.replace(cfg, shared_weights=())
            params = self.params_for(apart, model.shapes(apart), keep)
            return model.drop_shared(cfg, params)
        trunk = readouts.trunk_of(self.model, cfg, self.path)
        if self.is_saved_whole:
            self.fetch_arrays()
            arrays, _ = manager.load_params(self.path, step=None if self.newest else self.step)
            shapes = weights.with_heads(shapes, arrays)
            arrays = readouts.without_outputs(arrays, cfg)
            params = weights.place_arrays(shapes, arrays, self.path, cast=True, keep=keep)
        else:
            params = weights.place_weights(self.weights_for(trunk, cfg), trunk, keep=keep)
        if different := "" if self.assumed else matching.list_differences(self.model, cfg):
            warnings.warn(
                f"{self.path} was made with {different}; this run has others", stacklevel=2
            )
        return params

    def check_fits(self, cfg: config.Model, shapes: dict[str, Any]) -> None:
        """Raises ValueError where `params_for` would by the shapes alone; reads no weight."""
        if cfg.shared_weights and not self.model.shared_weights:
            cfg = dataclasses.replace(cfg, shared_weights=())
            shapes = model.shapes(cfg)
        trunk = readouts.trunk_of(self.model, cfg, self.path)
        if not self.is_saved_whole:
            self.weights_for(trunk, cfg, read=False)
            return
        folder = self.path / manager.FOLDER / str(self.step)
        stored = checkpoint_io.stored_shapes(checkpoint_io.read_metadata(folder), "params")
        shapes = weights.with_heads(shapes, {name.split(".")[0] for name in stored})
        stored = readouts.without_outputs(stored, cfg)
        weights.check_arrays(stored, shapes, self.path)

    def weights_for(self, trunk: config.Model, cfg: config.Model, read: bool = True) -> Weights:
        """Another library's tensors, or merged adapters, as weights of a run's model.

        Args:
          trunk: the part of the model that the checkpoint has, as `readouts.trunk_of` says.
          cfg: config of the run's model.
          read: as of `weights`.
        """
        if self.adapters is not None:
            merged = self.weights(read=read)
            shapes = {path: leaf.shape for path, leaf in merged.leaves.items()}
            needed = flatten_tree(model.shapes(trunk), "/")
            shapes = readouts.without_outputs(shapes, cfg)
            checkpoint_io.check_shapes(shapes, needed, f"{self.path} is of another model")
            return merged
        mapped = not_none(self.tensors)._replace(model=trunk)
        if cfg.readout is not None:
            mapped = readouts.drop_parts(mapped)
        if self.kind == CheckpointKind.T5X:
            names = mapped.source.names
            mapped = mapped._replace(entries=t5x.entries_to_read(trunk, names))
        return mapped.weights(read=read)


@dataclasses.dataclass(frozen=True)
class OpenedAdapters:
    """Adapters, and the checkpoint whose weights they adapt.

    Attributes:
      lora: their config.
      base: the opened base.
      source: name or path of the base, as the adapters have it.
      arrays: A, B and magnitudes.
      digests: digest of every weight of the base in float32 by dotted name; {} for none.
      shared: what the decoder reads of the encoder of the base, as if it had its own, by path.
    """

    lora: config.Lora
    base: OpenedCheckpoint
    source: str
    arrays: Weights
    digests: Mapping[str, int]
    shared: Mapping[str, Leaf] = dataclasses.field(default_factory=dict)

    def merge(
        self, owner: Path, allow: Sequence[str] = (), read: bool = True
    ) -> adapters.MergedWeights:
        """Weights of the base with the adapters merged in.

        Args:
          owner: the folder of the adapters, for messages.
          allow: as of `OpenedCheckpoint.weights`.
          read: as of `OpenedCheckpoint.weights`.
        """
        base = self.base.weights(allow, read)
        if self.shared:
            base = SeparateTowers(base, dict(self.shared))
        return adapters.MergedWeights(base, self.arrays, self.lora, self.digests, owner)

    def with_separate_towers(self, cfg: config.Model) -> "OpenedAdapters":
        """The adapters with those of shared weights in both towers of the model `cfg`."""
        arrays, lora = adapters.separate_adapters(self.arrays, cfg, self.lora)
        shared = adapters.shared_leaves(cfg)
        copies = {path.replace("/", "."): encoder_path(path.replace("/", ".")) for path in shared}
        digests = {
            name: self.digests[path] for name, path in copies.items() if path in self.digests
        }
        return dataclasses.replace(
            self,
            arrays=arrays,
            lora=lora,
            digests={**self.digests, **digests},
            shared=shared,
        )

    def attach(self, cfg: config.Model, params: dict[str, Any], owner: Path) -> dict[str, Any]:
        """Weights of a loaded model with the adapters beside them, for decoding.

        Args:
          cfg: config of the model.
          params: its weights as `decoding.prepare_params` has them, which are not copied.
          owner: the folder of the adapters, for messages.

        Raises:
          CheckpointMismatchError: they are adapters of another model. Weights that are not in
            float32 are compared by their shapes.
        """
        shapes = {path: leaf.shape for path, leaf in matching.model_leaves(cfg).items()}
        needed = matching.model_leaves(self.base.model)
        checkpoint_io.check_shapes(
            shapes,
            {path: jax.ShapeDtypeStruct(leaf.shape, np.float32) for path, leaf in needed.items()},
            f"{owner} has adapters of another model",
        )
        adapters.check_digests(self.digests, adapters.digest_layers(params), str(owner))
        arrays = {
            path.replace("/", "."): np.stack(
                [self.arrays.read(path, layer) for layer in layer_numbers(leaf)]
            )
            for path, leaf in self.arrays.leaves.items()
        }
        tree = jax.tree.map(jax.numpy.asarray, nest_tree(arrays))
        return low_rank.attach_to_layers(params, tree, self.lora)

    def base_digests(self) -> Mapping[str, int]:
        """Digests of the base's weights: those that were saved, or of the base as it is now."""
        return self.digests or adapters.digest_weights(self.base.weights())


def check_vocabulary_sizes(opened: OpenedCheckpoint) -> None:
    """Raises ValueError where a vocabulary has ids that the model lacks."""
    ours = opened.kind == CheckpointKind.OURS
    path = opened.path / text_settings.VOCABULARY_FOLDER if ours else opened.path
    for name, each in zip(("inputs", "targets"), not_none(opened.text).vocabularies, strict=True):
        if each.size > opened.model.vocab and not isinstance(each, LabelVocabulary):
            raise ValueError(
                f"{path} ({name}) has {each.size} ids, more than the {opened.model.vocab} of "
                "Model.vocab: is it the vocabulary of another model?"
            )
