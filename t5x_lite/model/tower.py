# SPDX-License-Identifier: Apache-2.0
"""A layer, and a tower of them: scanned over stacked weights, or unrolled over separate ones."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from t5x_lite import config, kernels
from t5x_lite.model import positions
from t5x_lite.model.attention import Attention
from t5x_lite.model.cache import Cache
from t5x_lite.model.layers import Mlp, Named, dropout, rms_norm, split, weight
from t5x_lite.sharding import batch_shards, spec


class View(NamedTuple):
    """What every layer of a tower looks at: shared, while x, caches and keys change by layer.

    where [b t] positions of the tokens; mask [b t s] and bias [#b n t s] of self-attention;
    encoded [b s d] (training) and seen [b t s] of cross-attention; index [b] where a block enters
    the cache.
    """

    where: Any
    mask: Any
    bias: Any = None
    encoded: Any = None
    seen: Any = None
    index: Any = None


class Layer(nn.Module):
    model: config.Model
    stack: config.Stack
    cross: bool = False

    def setup(self):
        self.attention = Attention(self.model, self.stack)
        if self.cross:
            self.cross_attention = Attention(self.model, self.stack, cross=True)
        self.mlp = Mlp(self.model, self.stack)

    def __call__(self, x, view: View, key=None):
        """x [b t d] through the layer, every token of the row at once."""
        rate, keys = self.model.dropout, split(key, 4)
        x = x + dropout(self.attention(x, view.where, view.mask, view.bias), rate, keys[0])
        if self.cross:
            k, v = self.cross_attention.keys_values(view.encoded)
            y = self.cross_attention.over_encoded(x, k, v, view.seen)
            x = x + dropout(y, rate, keys[1])
        return x + dropout(self.mlp(x, keys[2]), rate, keys[3])

    def decode(self, x, view: View, cache: Cache, crossed: Cache | None):
        """x [b w d] through the layer, and the layer's cache with the block written into it."""
        y, cache = self.attention.over_cache(x, view, cache)
        x = x + y
        if self.cross:
            x = x + self.cross_attention.over_encoded(x, crossed.keys, crossed.values, view.seen)
        return x + self.mlp(x), cache

    def crossed(self, encoded) -> Cache:
        """This layer's cross-attention keys and values [b k s h]."""
        return Cache(*self.cross_attention.keys_values(encoded))


class Tower(nn.Module):
    """The layers of a Stack with their shared position bias and the final norm.

    scan runs stacked weights (layers first) in one `lax.scan`; otherwise `layers` is a tuple of
    trees, unrolled. remat says what a layer keeps for its backward pass: everything (none), what
    products by weights and attention gave (products), or nothing but its input (layers); unroll how
    many layers one turn of the scan takes.
    """

    model: config.Model
    stack: config.Stack
    both_sides: bool = False
    cross: bool = False
    scan: bool = True
    remat: str = "none"
    unroll: int = 1

    @property
    def sizes(self):
        stack = self.stack
        return {"norm": stack.embed, "buckets": stack.buckets, "heads": stack.heads}

    def setup(self):
        self.layer = Layer(self.model, self.stack, self.cross, parent=None)
        if self.is_initializing():
            self.param("layers", self.new_layers)
        self.layers = self.get_variable("params", "layers")
        self.norm = weight(self, "norm", "norm")
        self.relative = self.stack.positions == "relative"
        if self.relative:
            self.bias = weight(self, "bias", "buckets -> heads", self.stack.bias_std)

    def new_layers(self, key):
        """The weights of all layers, stacked, boxed with their axes."""
        rows = batch_shards()
        x = jnp.zeros((rows, 1, self.stack.embed), out_sharding=spec("batch length width"))
        where = jnp.zeros((rows, 1), jnp.int32, out_sharding=spec("batch length"))
        mask = jnp.ones((rows, 1, 1), bool, out_sharding=spec("batch length length"))
        view = View(where, mask, encoded=x, seen=mask)
        draw = lambda key: self.layer.init(key, x.astype(self.model.activations), view)["params"]
        stacked = jax.vmap(draw)(jax.random.split(key, self.stack.layers))
        is_named = lambda leaf: isinstance(leaf, Named)
        return jax.tree.map(
            lambda named: named.replace(axes=f"layers {named.axes}"), stacked, is_leaf=is_named
        )

    def __call__(self, x, view: View, key=None):
        """x [b t d] through every layer and the final norm."""
        if self.relative:
            bias = positions.relative_bias(self.bias, self.stack, self.both_sides, x.shape[1])
            view = view._replace(bias=bias[None])

        def through(x, layer):
            weights, key = layer
            return self.layer.apply({"params": weights}, x, view, key), None

        keys = None if key is None else jax.random.split(key, self.stack.layers + 1)
        layer_keys = None if key is None else keys[:-1]
        x, _ = self.over_layers(kept(through, self.remat), x, layer_keys)
        x = rms_norm(x, self.norm)
        return dropout(x, self.model.dropout, None if key is None else keys[-1])

    def decode(self, x, view: View, slots, cache: Cache, crossed: Cache | None):
        """x [b w d] through every layer over the cache, whose slots stand at positions [b s]."""
        if self.relative:
            view = view._replace(
                bias=positions.relative_bias_of_blocks(self.bias, self.stack, view.where, slots)
            )

        def through(x, layer):
            weights, cache, crossed = layer
            return self.layer.apply({"params": weights}, x, view, cache, crossed, method="decode")

        x, cache = self.over_layers(through, x, cache, crossed)
        return rms_norm(x, self.norm), cache

    def crossed(self, encoded) -> Cache:
        """The cross-attention keys and values of every layer, computed once for a request."""

        def through(_, layer):
            weights, _ = layer
            return None, self.layer.apply({"params": weights}, encoded, method="crossed")

        return self.over_layers(through, None, None)[1]

    def over_layers(self, through, x, *per_layer):
        """x carried through the layers, and what each gave back, stacked as the weights are."""
        if self.scan:
            return jax.lax.scan(through, x, (self.layers, *per_layer), unroll=self.unroll)
        given = []
        for layer, weights in enumerate(self.layers):
            x, gives = through(x, (weights, *(one_layer(part, layer) for part in per_layer)))
            given.append(gives)
        if not isinstance(given[0], Cache):
            return x, None
        return x, Cache(*(tuple(parts) for parts in zip(*given, strict=True)))


def kept(through, remat: str):
    """through with what its backward pass keeps; scans need no guard against merging (CSE)."""
    if remat == "none":
        return through
    policies = jax.checkpoint_policies
    products = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(kernels.KEPT)
    )
    policy = products if remat == "products" else None
    return jax.checkpoint(through, prevent_cse=False, policy=policy)


def one_layer(part, layer: int):
    """What belongs to one layer of keys [layers ...] or of a Cache of tuples."""
    if isinstance(part, Cache):
        return Cache(part.keys[layer], part.values[layer])
    return None if part is None else part[layer]
