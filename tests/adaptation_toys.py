# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints to adapt, and what models compute of them."""

import dataclasses
from pathlib import Path

import conversion_toys as toys
import jax
import jax.numpy as jnp
import numpy as np
from conftest import FAMILIES, toy_batch

from t5x_lite import adaptation, config, kernels, model, sharding
from t5x_lite.conversion import matching
from t5x_lite.model import positions
from t5x_lite.model.attention import View
from t5x_lite.model.tower import Layer

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
    """Drawn weights of cfg in a run folder; matrices not so large that softmax saturates."""
    drawn = toys.Drawn(cfg, dtype, seed)
    for name, array in drawn.arrays.items():
        array *= array.dtype.type(1.0 if name.endswith("embedding") else 0.3)
    toys.write_ours(folder, cfg, drawn)
    return drawn


def adapted(cfg: config.Model, seed: int = 0, **how) -> tuple[dict, adaptation.Report]:
    """What `adaptation.initialize` gives a run of cfg."""
    how = {name: str(value) if name.endswith("source") else value for name, value in how.items()}
    run = config.Run(model_dir="none", model=cfg, adaptation=config.Adaptation(**how), seed=seed)
    return adaptation.initialize(run)


def flat(params) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in matching.flat(params).items()}


def nested(arrays: dict[str, np.ndarray], cfg: config.Model) -> dict:
    """Arrays by path as params on the mesh in force."""
    shapes = model.shapes(cfg)
    place = lambda path, leaf: jax.device_put(
        arrays[jax.tree_util.keystr(path, simple=True, separator="/")], leaf.sharding
    )
    return jax.tree_util.tree_map_with_path(place, shapes)


def relative(stack: config.Stack, both_sides: bool):
    """The relative positions of a stack, with a table of zeros."""
    return positions.relative(np.zeros((stack.buckets, stack.heads)), stack, both_sides)


def one_device() -> None:
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])


def batch_for(layout: str, seed: int = 0):
    return sharding.place_batch(toy_batch(layout, seed=seed))


def logits(cfg: config.Model, params: dict, batch) -> np.ndarray:
    apply = lambda params: model.Transformer(cfg).apply({"params": params}, batch)
    return np.asarray(jax.jit(apply)(params))


def hidden(cfg: config.Model, params: dict, tower: str, ids: np.ndarray) -> np.ndarray:
    """What a tower that sees the past alone makes of ids [b t], read with its own table."""
    where = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    ids, where = (sharding.place(array, "batch length") for array in (ids, where))

    def read(self):
        ones = jnp.ones_like(where)
        sight = self.sight(ones, ones, causal=True)
        x = self.embed(ids, reader=tower == "encoder")
        return getattr(self, tower)(x, View(where, sight))

    apply = lambda params: model.Transformer(cfg).apply({"params": params}, method=read)
    return np.asarray(jax.jit(apply)(params))


def pair_of(cfg: config.Model, **changes) -> config.Model:
    """An encoder-decoder of two decoders like cfg's."""
    changes = {"encoder": cfg.decoder} | changes
    return dataclasses.replace(cfg, **changes)


def crossed_by(cfg: config.Model, params: dict, batch) -> np.ndarray:
    """What the first layer's cross-attention adds to the embeddings of the batch's targets."""
    stack = cfg.decoder
    layer = Layer(cfg, stack, source=cfg.encoder.embed)
    first = jax.tree.map(lambda leaf: leaf[0], params["decoder"]["layers"])

    def add(self, batch):
        x, encoded = self.embed(batch.targets), self.embed(batch.inputs, reader=True)
        sight = kernels.Sight(batch.target_segments, batch.input_segments)
        sight = kernels.prepared(sight, None)
        view = View(batch.target_positions, None, seen=sight)
        bound = layer.bind({"params": first})
        return bound.cross_attention.over_encoded(x, bound.crossed(encoded), view)

    apply = lambda params: model.Transformer(cfg).apply({"params": params}, batch, method=add)
    return np.asarray(jax.jit(apply)(params))
