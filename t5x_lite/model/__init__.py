# SPDX-License-Identifier: Apache-2.0
"""The transformer and its weights. The only room that imports Flax."""

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import config
from t5x_lite.batch import Batch
from t5x_lite.model.cache import Block, Cache, Read, empty_cache, write_rows
from t5x_lite.model.inspection import Given, Inside, Inspected
from t5x_lite.model.layers import Named
from t5x_lite.model.transformer import Transformer
from t5x_lite.sharding import batch_shards, named, spec

__all__ = [
    "Block",
    "Cache",
    "Given",
    "Inside",
    "Inspected",
    "Read",
    "Transformer",
    "axes",
    "count",
    "empty_cache",
    "initialize",
    "shapes",
    "unstack",
    "write_rows",
]


def initialize(cfg: config.Model, key: jax.Array) -> dict:
    """New float32 weights on the mesh in force; the same bits on every mesh."""
    place = lambda leaf: jax.reshard(leaf.value, spec(leaf.axes))
    return jax.jit(lambda key: jax.tree.map(place, boxed(cfg, key), is_leaf=is_named))(key)


def shapes(cfg: config.Model) -> dict:
    """Every weight as a jax.ShapeDtypeStruct with its placement, without making it."""
    place = lambda leaf: jax.ShapeDtypeStruct(
        leaf.value.shape, leaf.value.dtype, sharding=named(leaf.axes)
    )
    return jax.tree.map(place, abstract(cfg), is_leaf=is_named)


def axes(cfg: config.Model) -> dict:
    """The axis names of every weight, such as "layers embed heads head_dim"."""
    return jax.tree.map(lambda leaf: leaf.axes, abstract(cfg), is_leaf=is_named)


def count(cfg: config.Model) -> dict[str, int]:
    """Parameters by part: embedding, encoder, decoder, head."""
    size = lambda part: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(part))
    return {name: size(part) for name, part in abstract(cfg).items()}


def unstack(params: dict) -> dict:
    """params with the layers of each tower as a tuple of trees, for Transformer(scan=False)."""
    towers = {name: part for name, part in params.items() if name in ("encoder", "decoder")}
    return params | {name: tower | {"layers": separate(tower)} for name, tower in towers.items()}


def separate(tower: dict) -> tuple:
    layers = len(jax.tree.leaves(tower["layers"])[0])
    return tuple(one_layer(tower["layers"], layer) for layer in range(layers))


@jax.jit
def one_layer(stacked: dict, layer: jax.Array) -> dict:
    """One layer of stacked weights: one program for all, where a slice each took 5 s to compile."""
    take = lambda weight: jax.lax.dynamic_index_in_dim(weight, layer, keepdims=False)
    return jax.tree.map(take, stacked)


def is_named(leaf) -> bool:
    return isinstance(leaf, Named)


def abstract(cfg: config.Model) -> dict:
    return jax.eval_shape(lambda: boxed(cfg, jax.random.key(0)))


def check_mesh(cfg: config.Model) -> None:
    """Raises ValueError where the mesh in force cannot split a weight evenly, naming the field."""
    mesh = jax.sharding.get_abstract_mesh().shape
    fields = {"vocab": cfg.vocab}
    for name, stack in (("encoder", cfg.encoder), ("decoder", cfg.decoder)):
        if stack is not None:
            parts = ("embed", "heads", "kv_heads", "mlp")
            sizes = (stack.embed, stack.heads, stack.key_heads, stack.mlp)
            fields |= {f"{name}.{part}": size for part, size in zip(parts, sizes, strict=True)}
    if cfg.blockwise is not None and cfg.blockwise.mlp is not None:
        fields["blockwise.mlp"] = cfg.blockwise.mlp
    for field, size in fields.items():
        axis = "fsdp" if field.endswith(".embed") else "tensor"
        if size % mesh[axis]:
            raise ValueError(
                f"Mesh.{axis}={mesh[axis]} cannot split Model.{field}={size} evenly: choose a "
                f"Mesh.{axis} that divides it"
            )


def boxed(cfg: config.Model, key: jax.Array) -> dict:
    """New weights, each boxed with the names of its axes."""
    check_mesh(cfg)
    rows = batch_shards()
    zeros = jnp.zeros((rows, 1), jnp.int32, out_sharding=spec("batch length"))
    batch = Batch(*[zeros] * 7)
    params = Transformer(cfg).init(key, batch)["params"]
    return params
