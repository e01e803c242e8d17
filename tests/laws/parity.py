# SPDX-License-Identifier: Apache-2.0
"""Models of transformers beside ours: the same weights, conversion both ways, equal gradients.

`decoder_parity` and `encoder_decoder_parity` compute what a layout is compared by; `families` has
the table of families.
"""

import dataclasses
import inspect
import json
import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
import numpy as np
import torch
from safetensors.numpy import save_file

from t5x_lite import config, model, sharding
from t5x_lite.checkpoints import matching, tensors, transforms, weights
from t5x_lite.checkpoints.formats import huggingface, safetensors_files
from t5x_lite.checkpoints.weight_paths import flatten_tree


class Pair(NamedTuple):
    """A model of transformers and ours, loaded from the files that it saved.

    Attributes:
      theirs: the model of transformers.
      family: module of the conversion of its family.
      cfg: architecture of ours.
      params: weights of ours.
    """

    theirs: torch.nn.Module
    family: ModuleType
    cfg: config.Model
    params: dict


class State:
    """Tensors in memory, read as if they lay in a file."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays
        self.names = {name: (array.shape, array.dtype) for name, array in arrays.items()}

    def read(self, name, at=None):
        return self.arrays[name]


def shaken(theirs: torch.nn.Module, seed: int, scale: float | None = None) -> torch.nn.Module:
    """Draws every weight of a model that trains; norms and biases move away from where they begin.

    Args:
      theirs: a model of transformers.
      seed: seed of the draw.
      scale: standard deviation of matrices; None takes 1 for tables and else the inverse square
        root of a matrix's inputs.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if not weight.requires_grad:
                continue  # sinusoidal positions
            noise = torch.randn(weight.shape, generator=draw)
            if weight.ndim == 1:
                weight.add_(0.3 * noise)
                continue
            table = "embed_tokens" in name or "shared" in name or "relative" in name
            weight.copy_(noise * (scale or (1.0 if table else weight.shape[-1] ** -0.5)))
    return theirs.eval()


def read(theirs: torch.nn.Module, folder: Path) -> Pair:
    """Ours of the folder that theirs is saved in."""
    theirs.save_pretrained(folder)
    config_json = json.loads((folder / "config.json").read_text())
    source = safetensors_files.open_safetensors(folder)
    family = huggingface.family_of_config(config_json)
    cfg = family.parse_config(config_json, source.names)
    cfg = dataclasses.replace(cfg, dtype="float32", dropout=0.0)
    return Pair(theirs, family, cfg, ours(source, cfg, family))


def ours(source, cfg: config.Model, family: ModuleType) -> dict:
    """Our params of the tensors in source on one device; every tensor has to be accounted for.

    Args:
      source: tensors under the names of transformers.
      cfg: architecture.
      family: module of the conversion of the family.
    """
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    source = tensors.rename_tensors(source, family)
    plan = matching.plan_conversion(
        source.names,
        cfg,
        family.entries(cfg),
        ignored=family.ignored(cfg),
        duplicates=family.duplicates(cfg),
    )
    plan.check("the source")
    weights.check_duplicates(
        source, plan, family.duplicates(cfg), lambda name: False, owner="the source"
    )
    return weights.place_weights(
        weights.ConvertedWeights(source, cfg, plan, lambda name: False), cfg
    )


def state_of(pair: Pair) -> dict[str, np.ndarray]:
    """Our params as tensors of transformers."""
    state, flat = {}, flatten_tree(pair.params, "/")
    entries = pair.family.entries(pair.cfg)
    for piece in matching.map_weights(pair.cfg, entries, matching.model_leaves(pair.cfg)):
        values = np.asarray(flat[piece.entry.ours])
        values = values if piece.layer is None else values[piece.layer]
        array = state.setdefault(piece.theirs, np.zeros(piece.tensor_shape, values.dtype))
        transforms.write_weight(array, piece.layer_entry, piece.axes, piece.sizes, values)
    return state


def write_export(pair: Pair, folder: Path, **fields) -> None:
    """Writes our params as a folder of transformers.

    Args:
      pair: both models.
      folder: folder to write.
      **fields: further fields of config.json.
    """
    folder.mkdir()
    save_file(state_of(pair), folder / "model.safetensors", metadata={"format": "pt"})
    config_json = pair.family.config_json(pair.cfg) | fields
    (folder / "config.json").write_text(json.dumps(config_json))


def apply(cfg: config.Model, params, *args, **kwargs):
    """Applies a method of our model.

    Args:
      cfg: architecture.
      params: weights.
      *args: arguments of the method.
      **kwargs: method, if it is not `__call__`, and its keyword arguments.
    """
    return model.Transformer(cfg).apply({"params": params}, *args, **kwargs)


def tensor(array: np.ndarray) -> torch.Tensor:
    """A numpy array as a torch tensor of int64."""
    return torch.from_numpy(np.array(array)).long()


def cache_argument(theirs, cache) -> dict:
    """The cache as the keyword that `theirs.forward` takes: transformers 5.24 renamed it."""
    renamed = "cache" in inspect.signature(theirs.forward).parameters
    return {"cache" if renamed else "past_key_values": cache}


def assert_gradients_alike(pair: Pair, their_loss: torch.Tensor, loss, floor: float = 0.0) -> None:
    """Compares gradients weight by weight, each within 1e-3 of its largest entry.

    Args:
      pair: both models.
      their_loss: loss of theirs.
      loss: our loss as a function of params.
      floor: share of the largest gradient of all weights that counts as the largest of a weight
        whose gradient is rounding errors only.
    """
    pair.theirs.zero_grad()
    their_loss.backward()
    gradients = {
        name.replace(".text_model.", "."): weight.grad.numpy()
        for name, weight in pair.theirs.named_parameters()
        if weight.grad is not None
    }
    expected = ours(State(gradients), pair.cfg, pair.family)
    actual = jax.jit(jax.grad(loss))(pair.params)
    least = floor * max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))

    def compare(path, actual, expected):
        largest = max(np.abs(expected).max(), least)
        worst = np.abs(np.asarray(actual) - np.asarray(expected)).max()
        assert worst <= 1e-3 * largest, jax.tree_util.keystr(path)

    jax.tree.map_with_path(compare, actual, expected)


def assert_there_and_back(
    pair: Pair, folder: Path, kind: type | None = None, without: str = ""
) -> torch.nn.Module:
    """Checks that transformers loads our export bit by bit, and that it converts back to ours.

    Args:
      pair: both models.
      folder: folder to write.
      kind: class of transformers that loads the export; None takes that of theirs.
      without: regular expression of names that ours lacks; empty for none.

    Returns:
      The model that transformers loaded.
    """
    write_export(pair, folder)
    kind = kind or type(pair.theirs)
    loaded, loading = kind.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )

    def left_out(name):
        return without and re.match(without, name)

    assert [name for name in loading["missing_keys"] if not left_out(name)] == []
    assert not loading["unexpected_keys"] and not loading["mismatched_keys"], loading
    again = loaded.state_dict()
    for name, weight in pair.theirs.state_dict().items():
        if not left_out(name):
            np.testing.assert_array_equal(again[name].numpy(), weight.numpy(), err_msg=name)
    config_json = json.loads((folder / "config.json").read_text())
    source = safetensors_files.open_safetensors(folder)
    cfg = pair.family.parse_config(config_json, source.names)
    assert dataclasses.replace(cfg, dtype="float32") == pair.cfg
    jax.tree.map(np.testing.assert_array_equal, ours(source, cfg, pair.family), pair.params)
    back = read(loaded.eval(), folder / "again")
    assert back.cfg == pair.cfg
    jax.tree.map(np.testing.assert_array_equal, back.params, pair.params)
    return loaded
