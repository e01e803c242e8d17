# SPDX-License-Identifier: Apache-2.0
"""A layer, and a tower of them: scanned over stacked weights, or unrolled over separate ones."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from t5x_lite import config, kernels
from t5x_lite.model import positions
from t5x_lite.model.attention import Attention, Traits, View, traits
from t5x_lite.model.cache import Cache
from t5x_lite.model.layers import Mlp, Named, dropout, normalizer, split, weight
from t5x_lite.sharding import batch_shards, spec


class Layer(nn.Module):
    """Self-attention, cross-attention over an encoder `source` wide (None: there is none), Mlp."""

    model: config.Model
    stack: config.Stack
    both_sides: bool = False
    source: int | None = None

    def setup(self):
        self.attention = Attention(self.model, self.stack, self.both_sides)
        self.cross = self.source is not None and not self.stack.merged
        if self.cross:
            kind = {"cross": True, "source": self.source}
            self.cross_attention = Attention(self.model, self.stack, **kind)
        self.mlp = Mlp(self.model, self.stack)

    def __call__(self, x, view: View, own: Traits, key=None):
        """x [b t d] through the layer, every token of the row at once."""
        rate, keys = self.model.dropout, split(key, 4)
        crossed = None if self.source is None else self.crossed(view.encoded)
        merged = crossed if self.stack.merged else None
        x = x + dropout(self.attention(x, view, own, merged), rate, keys[0])
        if self.cross:
            y = self.cross_attention.over_encoded(x, crossed, view.seen)
            x = x + dropout(y, rate, keys[1])
        return x + dropout(self.mlp(x, keys[2]), rate, keys[3])

    def decode(self, x, view: View, own: Traits, cache: Cache, crossed: Cache | None):
        """x [b w d] through the layer, and the layer's cache with the block written into it."""
        merged = crossed if self.stack.merged else None
        y, cache = self.attention.over_cache(x, view, own, cache, merged)
        x = x + y
        if self.cross:
            x = x + self.cross_attention.over_encoded(x, crossed, view.seen)
        return x + self.mlp(x), cache

    def crossed(self, encoded) -> Cache:
        """This layer's keys and values [b k s h] of the inputs."""
        reader = self.cross_attention if self.cross else self.attention
        return Cache(*reader.keys_values(encoded))


class Tower(nn.Module):
    """The layers of a Stack with their positions and the final norm.

    A decoder reads an encoder's output that is `source` wide; None: there is nothing to read.

    scan runs stacked weights (layers first) in one `lax.scan`; otherwise `layers` is a tuple of
    trees, unrolled. remat says what a layer keeps for its backward pass: everything (none), what
    products by weights and attention gave (products), or nothing but its input (layers); unroll how
    many layers one turn of the scan takes.
    """

    model: config.Model
    stack: config.Stack
    both_sides: bool = False
    source: int | None = None
    scan: bool = True
    remat: str = "none"
    unroll: int = 1

    @property
    def sizes(self):
        stack = self.stack
        widths = {"embed": stack.embed, "norm": stack.embed, "positions": stack.max_length}
        return widths | {"buckets": stack.buckets, "heads": stack.heads}

    def setup(self):
        stack = self.stack
        self.layer = Layer(self.model, stack, self.both_sides, self.source, parent=None)
        if self.is_initializing():
            self.param("layers", self.new_layers)
        self.layers = self.get_variable("params", "layers")
        self.norm = normalizer(self, "norm")
        self.relative = stack.positions == "relative" and not stack.bias_per_layer
        if self.relative:
            self.bias = weight(self, "bias", "buckets -> heads", stack.bias_std)
        if stack.positions == "learned":
            self.positions = weight(self, "positions", "-> positions embed", 0.02)

    def new_layers(self, key):
        """The weights of all layers, stacked, boxed with their axes."""
        rows = batch_shards()
        x = jnp.zeros((rows, 1, self.stack.embed), out_sharding=spec("batch length width"))
        where = jnp.zeros((rows, 1), jnp.int32, out_sharding=spec("batch length"))
        mask = jnp.ones((rows, 1, 1), bool, out_sharding=spec("batch length length"))
        encoded = None
        if self.source is not None:
            encoded = jnp.zeros((rows, 1, self.source), out_sharding=spec("batch length width"))
        view = View(where, where, mask, encoded=encoded, seen=mask)
        x, own = x.astype(self.model.activations), one_layer(traits(self.stack), 0)
        draw = lambda key: self.layer.init(key, x, view, own)["params"]
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
            weights, own, key = layer
            return self.layer.apply({"params": weights}, x, view, own, key), None

        keys = None if key is None else jax.random.split(key, self.stack.layers + 1)
        layer_keys = None if key is None else keys[:-1]
        x = self.standing(x, view.where)
        x, _ = self.over_layers(kept(through, self.remat), x, traits(self.stack), layer_keys)
        return dropout(self.norm(x), self.model.dropout, None if key is None else keys[-1])

    def standing(self, x, where):
        """x with learned positions added, where the stack has them."""
        if self.stack.positions != "learned":
            return x
        return x + self.positions.at[where].get(out_sharding=spec("batch length width"))

    def decode(self, x, view: View, cache: Cache, crossed: Cache | None):
        """x [b w d] through every layer over the cache."""
        if self.relative:
            places = view.where, view.stand
            bias = positions.relative_bias_of_blocks(self.bias, self.stack, *places)
            view = view._replace(bias=bias)

        def through(x, layer):
            weights, own, *caches = layer
            return self.layer.apply({"params": weights}, x, view, own, *caches, method="decode")

        x = self.standing(x, view.where)
        x, cache = self.over_layers(through, x, traits(self.stack), cache, crossed)
        return self.norm(x), cache

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
    """What belongs to one layer of Traits, of keys [layers ...] or of a Cache of tuples."""
    if isinstance(part, Cache):
        return Cache(part.keys[layer], part.values[layer])
    return jax.tree.map(lambda rows: rows[layer], part)
