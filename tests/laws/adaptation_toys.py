# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints to adapt, and what models compute of them."""

import dataclasses
from pathlib import Path

import conversion_toys as toys
import jax
import jax.numpy as jnp
import numpy as np
from conftest import FAMILIES, toy_batch

from t5x_lite import adaptation, config, model, sharding
from t5x_lite.checkpoints.weight_paths import flatten_tree
from t5x_lite.kernels import api as kernels
from t5x_lite.model import positions
from t5x_lite.model.attention import AttentionContext
from t5x_lite.model.transformer_layer import Layer

GEMMA2 = {
    name: value for name, value in FAMILIES["t5gemma"].items() if name != "separate_embeddings"
}
GEMMA3 = GEMMA2 | dict(qk_norm=True, window=4, sliding_rotary_base=100.0, softcap=None)
# Decoders of every make, untied and tied, with and without biases.
LONE = {
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "gpt2": FAMILIES["gpt2"],
    "mistral": FAMILIES["mistral"],
    "t5": {},
    "t5_per_layer": dict(bias_per_layer=True),
}


def written(folder: Path, cfg: config.Model, seed: int = 0, dtype=np.float32) -> toys.Drawn:
    """Random weights in a run folder; matrices are small enough that the softmax does not saturate.

    Args:
      folder: run folder to write.
      cfg: architecture.
      seed: seed of the weights.
      dtype: their dtype.
    """
    drawn = toys.Drawn(cfg, dtype, seed)
    for name, array in drawn.arrays.items():
        array *= array.dtype.type(1.0 if name.endswith("embedding") else 0.3)
    toys.write_ours(folder, cfg, drawn)
    return drawn


def adapted(cfg: config.Model, seed: int = 0, **options) -> tuple[dict, adaptation.Report]:
    """Weights and report of `adaptation.initialize` for a run of cfg.

    Args:
      cfg: architecture of the run.
      seed: seed of new weights.
      **options: fields of `config.Adaptation`.
    """
    options = {
        name: str(value) if name.endswith("source") else value for name, value in options.items()
    }
    run = config.Run(
        model_dir="none", model=cfg, adaptation=config.Adaptation(**options), seed=seed
    )
    return adaptation.initialize(run)


def flat(params) -> dict[str, np.ndarray]:
    """Params as numpy arrays by path."""
    return {path: np.asarray(leaf) for path, leaf in flatten_tree(params, "/").items()}


def nested(arrays: dict[str, np.ndarray], cfg: config.Model) -> dict:
    """Arrays by path as params on the mesh in force."""
    shapes = model.shapes(cfg)

    def place(path, leaf):
        return jax.device_put(
            arrays[jax.tree_util.keystr(path, simple=True, separator="/")], leaf.sharding
        )

    return jax.tree_util.tree_map_with_path(place, shapes)


def relative(stack: config.Stack, both_sides: bool):
    """The relative positions of a stack, with a table of zeros."""
    return positions.relative(np.zeros((stack.buckets, stack.heads)), stack, both_sides)


def one_device() -> None:
    """Sets a mesh of one device."""
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])


def batch_for(layout: str, seed: int = 0):
    """A toy batch of a layout on the mesh in force."""
    return sharding.place_batch(toy_batch(layout, seed=seed))


def logits(cfg: config.Model, params: dict, batch) -> np.ndarray:
    """Logits of the model.

    Args:
      cfg: architecture.
      params: weights.
      batch: batch on the mesh.
    """

    def apply(params):
        return model.Transformer(cfg).apply({"params": params}, batch)

    return np.asarray(jax.jit(apply)(params))


def hidden(cfg: config.Model, params: dict, tower: str, ids: np.ndarray) -> np.ndarray:
    """Hidden states of one stack with a causal mask.

    Args:
      cfg: architecture.
      params: weights.
      tower: "encoder" or "decoder"; ids are embedded with its own table.
      ids: [b t] token ids.
    """
    where = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    ids, where = (sharding.place(array, "batch length") for array in (ids, where))

    def read(self):
        ones = jnp.ones_like(where)
        mask = self.mask(ones, ones, causal=True)
        x = self.embed(ids, for_encoder=tower == "encoder")
        return getattr(self, tower)(x, AttentionContext(where, mask))

    def apply(params):
        return model.Transformer(cfg).apply({"params": params}, method=read)

    return np.asarray(jax.jit(apply)(params))


def pair_of(cfg: config.Model, **changes) -> config.Model:
    """An encoder-decoder of two decoders like cfg's."""
    changes = {"encoder": cfg.decoder} | changes
    return dataclasses.replace(cfg, **changes)


def crossed_by(cfg: config.Model, params: dict, batch) -> np.ndarray:
    """Output of the first layer's cross-attention on the embeddings of the batch's targets.

    Args:
      cfg: architecture.
      params: weights.
      batch: batch on the mesh.
    """
    stack = cfg.decoder
    layer = Layer(cfg, stack, source=cfg.encoder.embed)
    first = jax.tree.map(lambda leaf: leaf[0], params["decoder"]["layers"])

    def add(self, batch):
        x, encoded = self.embed(batch.targets), self.embed(batch.inputs, for_encoder=True)
        mask = kernels.Mask(batch.target_segments, batch.input_segments)
        mask = kernels.prepare_mask(mask, None)
        context = AttentionContext(batch.target_positions, None, input_mask=mask)
        bound = layer.bind({"params": first})
        return bound.cross_attention.attend_encoded(x, bound.cross_kv(encoded), context)

    def apply(params):
        return model.Transformer(cfg).apply({"params": params}, batch, method=add)

    return np.asarray(jax.jit(apply)(params))
