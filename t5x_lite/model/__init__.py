# SPDX-License-Identifier: Apache-2.0
"""The transformer and its weights. The only package that imports Flax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import config
from t5x_lite.batch import Batch
from t5x_lite.model.cache import Cache, CacheStore, EncoderMemory, TokenBlock
from t5x_lite.model.empty_cache import WHOLE, empty_cache, make_stores, quantize_memory
from t5x_lite.model.inspection import Activations, Inspected, InspectionInputs
from t5x_lite.model.layers import is_partitioned
from t5x_lite.model.shared_weights import drop_shared
from t5x_lite.model.transformer import Transformer
from t5x_lite.sharding import batch_shards, named_sharding, spec

__all__ = [
    "TokenBlock",
    "Cache",
    "CacheStore",
    "WHOLE",
    "InspectionInputs",
    "Activations",
    "Inspected",
    "EncoderMemory",
    "Transformer",
    "axes",
    "count",
    "drop_shared",
    "empty_cache",
    "initialize",
    "make_stores",
    "quantize_memory",
    "shapes",
    "unstack",
]


@functools.partial(jax.jit, static_argnums=0)
def initialize(cfg: config.Model, key: jax.Array) -> dict:
    """Initializes float32 weights on the mesh in force; the same bits on every mesh."""

    def place(leaf):
        return jax.reshard(leaf.value, spec(leaf.axes))

    return jax.tree.map(place, boxed(cfg, key), is_leaf=is_partitioned)


def shapes(cfg: config.Model) -> dict:
    """Returns every weight as a jax.ShapeDtypeStruct with its sharding, without creating it."""

    def describe(leaf):
        sharding = named_sharding(leaf.axes)
        return jax.ShapeDtypeStruct(leaf.value.shape, leaf.value.dtype, sharding=sharding)

    return jax.tree.map(describe, abstract(cfg), is_leaf=is_partitioned)


def axes(cfg: config.Model) -> dict:
    """Returns the axis names of every weight, such as "layers embed heads head_dim"."""
    return jax.tree.map(lambda leaf: leaf.axes, abstract(cfg), is_leaf=is_partitioned)


def count(cfg: config.Model) -> dict[str, int]:
    """Counts parameters by part: embedding, encoder, decoder, head."""

    def size(part):
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(part))

    return {name: size(part) for name, part in abstract(cfg).items()}


def unstack(params: dict) -> dict:
    """Splits the layers of each stack into a tuple of trees, for Transformer(scan=False)."""
    stacks = {name: part for name, part in params.items() if name in ("encoder", "decoder")}
    return params | {
        name: stack | {"layers": unstack_layers(stack["layers"])} for name, stack in stacks.items()
    }


def unstack_layers(stacked: dict) -> tuple:
    """Returns a tree of weights for each layer of stacked ones [layers ...]."""
    layers = len(jax.tree.leaves(stacked)[0])
    return tuple(one_layer(stacked, layer) for layer in range(layers))


@jax.jit
def one_layer(stacked: dict, layer: jax.Array) -> dict:
    """Slices one layer: one program for all layers, where a slice each took 5 s to compile."""

    def take(weight):
        return jax.lax.dynamic_index_in_dim(weight, layer, keepdims=False)

    return jax.tree.map(take, stacked)


def abstract(cfg: config.Model) -> dict:
    """Returns every weight as a shape and dtype, boxed with the names of its axes."""
    return traced_weights.eval_shape(cfg)


@functools.partial(jax.jit, static_argnums=0)
def traced_weights(cfg: config.Model) -> dict:
    """Initializes boxed weights; jitted because jax keeps the trace of a config and mesh."""
    return boxed(cfg, jax.random.key(0))


def check_mesh(cfg: config.Model) -> None:
    """Checks that the mesh in force splits every weight evenly.

    Raises:
      ValueError: it does not; the message names the field.
    """
    mesh = jax.sharding.get_abstract_mesh().shape
    fields = {"vocab": cfg.vocab}
    for name, stack in (("encoder", cfg.encoder), ("decoder", cfg.decoder)):
        if stack is not None:
            parts = ("embed", "heads", "kv_heads", "mlp")
            sizes = (stack.embed, stack.heads, stack.key_heads, stack.mlp)
            fields |= {f"{name}.{part}": size for part, size in zip(parts, sizes, strict=True)}
    if cfg.draft_heads is not None and cfg.draft_heads.mlp is not None:
        fields["draft_heads.mlp"] = cfg.draft_heads.mlp
    for field, size in fields.items():
        axis = "fsdp" if field.endswith(".embed") else "tensor"
        if size % mesh[axis]:
            raise ValueError(
                f"Mesh.{axis}={mesh[axis]} cannot split Model.{field}={size} evenly: choose a "
                f"Mesh.{axis} that divides it"
            )


def boxed(cfg: config.Model, key: jax.Array) -> dict:
    """Initializes weights, each boxed with the names of its axes."""
    check_mesh(cfg)
    rows = batch_shards()
    zeros = jnp.zeros((rows, 1), jnp.int32, out_sharding=spec("batch length"))
    batch = Batch(zeros, zeros, zeros, zeros, zeros, zeros, zeros)
    return drop_shared(cfg, Transformer(cfg).init(key, batch)["params"])
