# SPDX-License-Identifier: Apache-2.0
"""Adapters of a checkpoint, from a run folder or a folder of peft, and their base's weights with
them merged in."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from t5x_lite import config
from t5x_lite.checkpoints import checkpoint_io, manager, matching, tensors
from t5x_lite.checkpoints.checkpoint_io import CheckpointMismatchError
from t5x_lite.checkpoints.digests import combine_digests, numpy_digest
from t5x_lite.checkpoints.formats import safetensors_files
from t5x_lite.checkpoints.formats.huggingface import family_for_export, peft
from t5x_lite.checkpoints.formats.safetensors_files import TensorSource
from t5x_lite.checkpoints.matching import ConversionPlan, Leaf
from t5x_lite.checkpoints.weight_paths import flatten_tree
from t5x_lite.checkpoints.weights import (
    READOUT,
    ConvertedWeights,
    SeparateTowers,
    Weights,
    encoder_path,
    layer_numbers,
)
from t5x_lite.config.training_run import require_lora
from t5x_lite.model import adapters, quantization
from t5x_lite.model.quantization import FAN_IN
from t5x_lite.tokenizers.errors import SourceError
from t5x_lite.utils.hub import HubRepository

# A base in the folder of its adapters, or a link to one, is taken in place of the one they name.
BASE = "base"


def locate_base(folder: Path, recorded: str) -> str:
    """The base of the adapters in a folder: the one beside them, or the one that they name.

    Raises:
      SourceError: they name none.
    """
    beside = folder / BASE
    if not beside.exists() and not recorded:
        raise SourceError(
            f"{folder} does not say what model its adapters belong to: put it, or a link to it, "
            f"into the folder as {BASE}"
        )
    return str(beside) if beside.exists() else recorded


def model_axes(cfg: config.Model) -> dict[str, str]:
    """Axis names of every weight by dotted name."""
    return {path.replace("/", "."): leaf.axes for path, leaf in matching.model_leaves(cfg).items()}


def adapter_leaves(cfg: config.Model, lora: config.Lora) -> dict[str, Leaf]:
    """Axis names and shape of every array that trains, "decoder/layers/mlp/gate/a": of adapters,
    and of the head of Model.readout."""
    weights = matching.model_leaves(cfg)
    leaves = {path: leaf for path, leaf in weights.items() if is_readout(path)}
    for name, axes in adapters.adapter_axes(lora, model_axes(cfg)).items():
        owner = weights[name.rpartition(".")[0].replace(".", "/")]
        sizes = dict(zip(owner.axes.split(), owner.shape, strict=True)) | {"rank": lora.rank}
        sizes |= {"norm": sizes.get("embed", 0)}
        shape = tuple(sizes[axis] for axis in axes.split())
        leaves[name.replace(".", "/")] = Leaf(axes, shape)
    return leaves


def shared_leaves(cfg: config.Model) -> dict[str, Leaf]:
    """Axis names and shapes of the decoder's weights that are the encoder's, by path."""
    stored = matching.model_leaves(cfg)
    apart = matching.model_leaves(dataclasses.replace(cfg, shared_weights=()))
    return {path: leaf for path, leaf in apart.items() if path not in stored}


def separate_towers(source: Weights, cfg: config.Model) -> Weights:
    """Weights of a model with Model.shared_weights, as if the decoder had its own."""
    return SeparateTowers(source, shared_leaves(cfg))


def separate_adapters(
    arrays: Weights, cfg: config.Model, lora: config.Lora
) -> tuple[Weights, config.Lora]:
    """Adapters of a model with Model.shared_weights, as if the decoder had its own, and their
    config, which names every weight.

    Args:
      arrays: A, B and magnitudes.
      cfg: config of the model.
      lora: config of the adapters.
    """
    adapted = {path.rpartition("/")[0] for path in arrays.leaves if not is_readout(path)}
    copied = {path for path in shared_leaves(cfg) if encoder_path(path) in adapted}
    names = sorted(path.replace("/", ".") for path in adapted | copied)
    lora = dataclasses.replace(lora, weights=tuple(names))
    leaves = adapter_leaves(dataclasses.replace(cfg, shared_weights=()), lora)
    decoder = {path: leaf for path, leaf in leaves.items() if path.rpartition("/")[0] in copied}
    return SeparateTowers(arrays, decoder), lora


def is_readout(path: str) -> bool:
    """True for a weight of the head of Model.readout, which trains beside adapters."""
    return path.startswith(f"{READOUT}/")


class ArrayWeights:
    """Arrays in memory as `Weights`: the adapters of a run.

    Raises:
      CheckpointMismatchError: they are not those that the config describes.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], leaves: dict[str, Leaf], owner: Path):
        self.leaves, self.arrays = leaves, {k.replace(".", "/"): v for k, v in arrays.items()}
        checkpoint_io.check_shapes(
            {path: array.shape for path, array in self.arrays.items()},
            {path: jax.ShapeDtypeStruct(leaf.shape, np.float32) for path, leaf in leaves.items()},
            f"{owner} has other adapters than its config",
        )
        self.names = {path: (array.shape, array.dtype) for path, array in self.arrays.items()}

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        return self.arrays[path] if layer is None else self.arrays[path][layer]


class RunAdapters(NamedTuple):
    """Adapters of a run's checkpoint.

    Attributes:
      arrays: A, B and magnitudes.
      digests: of the weights that they belong to.
      step: step of the checkpoint.
    """

    arrays: Weights
    digests: dict[str, int]
    step: int


def read_run_adapters(folder: Path, run: config.Run, step: int | None) -> RunAdapters:
    """Reads the adapters of a run's checkpoint.

    Args:
      folder: the run folder.
      run: its config.
      step: step of the checkpoint; None for the newest that is not damaged.
    """
    params, step = manager.load_params(folder, step)
    metadata = checkpoint_io.read_metadata(folder / manager.FOLDER / str(step))
    leaves = adapter_leaves(run.model, require_lora(run))
    return RunAdapters(ArrayWeights(flatten_tree(params), leaves, folder), metadata.base, step)


def open_peft_tensors(
    folder: Path, cfg: config.Model, repository: HubRepository | None = None
) -> tuple[peft.PeftAdapter, Weights]:
    """The adapters in a folder of peft.

    Args:
      folder: the folder.
      cfg: config of the base model.
      repository: the model of the hub whose folder it is; None for a folder of this machine.

    Raises:
      ValueError: they are of another model, or something of them is not implemented.
    """
    path = folder / peft.TENSORS
    if not path.exists():
        raise SourceError(
            f"{folder} has {peft.CONFIG} but no {peft.TENSORS}: save the adapter with "
            "safetensors (peft's save_pretrained does)"
        )
    family = family_for_export(cfg, None)
    source: TensorSource = safetensors_files.open_safetensors(path)
    canonical = getattr(family, "canonical_name", None)
    if canonical is not None:

        def rename(name: str) -> str:
            return peft.PREFIX + canonical(name.removeprefix(peft.PREFIX))

        source = tensors.RenamedTensors(source, rename)
    adapted = peft.adapted_names(family.entries(cfg), source.names)
    adapter = peft.parse_adapter(tensors.read_json_object(folder / peft.CONFIG), adapted or ("*",))
    try:
        return adapter, map_adapters(source, cfg, family, adapter)
    except CheckpointMismatchError as error:
        raise CheckpointMismatchError(f"{folder}: {error}") from error


def map_adapters(
    source: TensorSource, cfg: config.Model, family: ModuleType, adapter: peft.PeftAdapter
) -> ConvertedWeights:
    """Tensors of peft as adapters of ours.

    Args:
      source: the tensors.
      cfg: config of the base model.
      family: module of the family of the base.
      adapter: content of adapter_config.json.

    Raises:
      CheckpointMismatchError: they are adapters of another model; the tensors are named.
    """
    table = peft.adapter_entries(family.entries(cfg), adapter.lora, model_axes(cfg))
    leaves = adapter_leaves(cfg, adapter.lora)
    mappings = matching.map_weights(cfg, table, leaves)
    known = {each.theirs for each in mappings}
    problems = {
        each.theirs: problem
        for each in mappings
        if (problem := matching.describe_misfit(each, source.names)) is not None
    } | {name: "belongs to no matrix of the base" for name in source.names if name not in known}
    if problems:
        lines = [f"  {name}: {text}" for name, text in list(problems.items())[: matching.SHOWN]]
        base = adapter.base or "its base"
        raise CheckpointMismatchError(
            "\n".join([f"these are not adapters of {base}, whose matrices are others:", *lines])
        )
    plan = ConversionPlan(leaves, mappings, [], {}, {})
    return ConvertedWeights(source, cfg, plan, lambda name: False, "the adapters")


@dataclasses.dataclass
class MergedWeights:
    """Weights of a base with adapters merged in, layer by layer: W + scale A B, in float32.

    The digest of every weight of the base is compared after its last layer.

    Attributes:
      base: weights of the base.
      adapters: A, B and magnitudes.
      lora: config of the adapters.
      digests: digests of the base's weights in float32 by dotted name; empty for none.
      owner: the folder of the adapters, for messages.
    """

    base: Weights
    adapters: Weights
    lora: config.Lora
    digests: Mapping[str, int]
    owner: Path

    def __post_init__(self):
        head = {path: leaf for path, leaf in self.adapters.leaves.items() if is_readout(path)}
        base_leaves = self.base.leaves.items()
        # The head that the base may have is another one.
        self.leaves = {path: leaf for path, leaf in base_leaves if not is_readout(path)} | head
        self.layer_digests: dict[str, dict[int | None, int]] = {}
        wide = np.dtype(np.float32)
        self.names = {
            path: (shape, np.result_type(dtype, wide) if self.is_adapted(path) else dtype)
            for path, (shape, dtype) in self.base.names.items()
            if path in self.leaves
        } | {path: self.adapters.names[path] for path in head}

    def is_adapted(self, path: str) -> bool:
        """True for a matrix with an adapter."""
        return f"{path}/a" in self.adapters.leaves

    def leave_shared(self, cfg: config.Model) -> None:
        """From now on what the decoder shares with the encoder (Model.shared_weights) is not among
        the weights: a base may have a decoder of its own."""
        for path in shared_leaves(cfg):
            self.leaves.pop(path, None)
            self.names.pop(path, None)

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        if is_readout(path):
            return self.adapters.read(path, layer)
        values = self.base.read(path, layer)
        self.check_digest(path, layer, values)
        if not self.is_adapted(path):
            return values
        parts = {
            part: self.adapters.read(f"{path}/{part}", layer).astype(np.float32)
            for part in ("a", "b", "magnitude")
            if f"{path}/{part}" in self.adapters.leaves
        }
        inputs = FAN_IN[path.rpartition("/")[2]]
        return merge_matrix(self.lora, values.astype(np.float32), inputs, **parts)

    def check_digest(self, path: str, layer: int | None, values: np.ndarray) -> None:
        """Raises CheckpointMismatchError where a weight is not that which the adapters belong to.

        Args:
          path: path of the weight.
          layer: the layer that was read; None for a weight that is not stacked.
          values: its values.
        """
        name = path.replace("/", ".")
        if not self.digests:
            return
        digests = self.layer_digests.setdefault(name, {})
        digests[layer] = numpy_digest(values.astype(np.float32))
        if len(digests) < (self.leaves[path].layers or 1):
            return
        if combine_digests(digests) != self.digests.get(name):
            raise other_base_error(str(self.owner), [name])


def merge_matrix(
    lora: config.Lora,
    weight: np.ndarray,
    inputs: int,
    a: np.ndarray,
    b: np.ndarray,
    magnitude: np.ndarray | None = None,
) -> np.ndarray:
    """One matrix of a layer with its adapter, float32; rounded before as in training (QLoRA).

    Args:
      lora: config of the adapters.
      weight: [inputs ... outputs ...] the matrix.
      inputs: number of its axes that are inputs.
      a: [inputs ... rank].
      b: [rank outputs ...].
      magnitude: [outputs ...] (DoRA); None for LoRA.
    """
    if lora.quantize is not None:
        weight = np.asarray(rounded(weight, inputs, lora.quantize))
    size = math.prod(weight.shape[:inputs])
    matrix = weight.reshape(size, -1)
    matrix = matrix + np.float32(lora.scale) * (a.reshape(size, -1) @ b.reshape(len(b), -1))
    if magnitude is not None:
        norm = np.sqrt(np.sum(np.square(matrix), axis=0))
        matrix = matrix * (magnitude.reshape(-1) / norm)
    return matrix.reshape(weight.shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def rounded(weight: jax.Array, inputs: int, name: str) -> jax.Array:
    """A matrix as its quantized form has it.

    Args:
      weight: the matrix of one layer.
      inputs: number of its axes that are inputs.
      name: a format of `quantization.parse_quantization`.
    """
    kind = quantization.parse_quantization(name)
    return quantization.dequantize(quantization.quantize(weight, inputs, kind))


def other_base_error(owner: str, names: list[str]) -> CheckpointMismatchError:
    """The error of adapters whose base is not the one that they were trained on."""
    return CheckpointMismatchError(
        f"{owner} has adapters of another base: {', '.join(names[:4])} are not the weights that "
        "they were trained on. Name that base as Checkpoint.initial (INITIAL_CHECKPOINT_PATH), or "
        f"put it, or a link to it, into the folder as {BASE}"
    )


def digest_weights(weights: Weights) -> dict[str, int]:
    """Digests of weights in float32 by dotted name, one layer in memory at a time."""
    digests = {}
    for path, leaf in weights.leaves.items():
        values = {
            layer: numpy_digest(weights.read(path, layer).astype(np.float32))
            for layer in layer_numbers(leaf)
        }
        digests[path.replace("/", ".")] = combine_digests(values)
    return digests


def digest_layers(params: dict[str, Any]) -> dict[str, int]:
    """Digests of float32 weights of `model.unstack` by dotted name; of others there are none."""
    layers: dict[str, dict[int | None, Any]] = {}
    for name, array in flatten_tree(params, is_leaf=quantization.is_quantized).items():
        parts = name.split(".")
        number = int(parts.pop(2)) if len(parts) > 2 and parts[1] == "layers" else None
        layers.setdefault(".".join(parts), {})[number] = array
    return {
        name: combine_digests({n: numpy_digest(np.asarray(a)) for n, a in arrays.items()})
        for name, arrays in layers.items()
        if all(getattr(array, "dtype", None) == np.float32 for array in arrays.values())
    }


def check_digests(expected: Mapping[str, int], actual: Mapping[str, Any], owner: str) -> None:
    """Raises CheckpointMismatchError where digests of a base's weights differ.

    Args:
      expected: digests that a checkpoint of adapters has; empty for none.
      actual: digests of the base; what is not among them is not compared.
      owner: folder of the adapters, for the message.
    """
    if wrong := [n for n, value in expected.items() if int(actual.get(n, value)) != value]:
        raise other_base_error(owner, wrong)
