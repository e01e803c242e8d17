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

# Folded into a layer's key, which its dropout splits, for the draw of the rows that skip it.
SKIPPING = 1 << 31


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
            y = self.cross_attention.over_encoded(x, crossed, view)
            x = x + dropout(y, rate, keys[1])
        return x + dropout(self.mlp(x, keys[2]), rate, keys[3])

    def watched(self, x, view: View, own: Traits) -> tuple:
        """x through the layer as in `__call__`, and how both kinds of attention are shared:
        [b n t s], None where there is no cross-attention of its own; plain XLA alone tells."""
        crossed = None if self.source is None else self.crossed(view.encoded)
        merged = crossed if self.stack.merged else None
        shares, shares_of_encoded = self.attention.shares(x, view, own, merged), None
        x = x + self.attention(x, view, own, merged)
        if self.cross:
            shares_of_encoded = self.cross_attention.shares_of_encoded(x, crossed, view)
            x = x + self.cross_attention.over_encoded(x, crossed, view)
        return x + self.mlp(x), (shares, shares_of_encoded)

    def decode(self, x, view: View, own: Traits, cache: Cache, crossed: Cache | None):
        """x [b w d] through the layer, and the layer's cache with the block written into it."""
        merged = crossed if self.stack.merged else None
        y, cache = self.attention.over_cache(x, view, own, cache, merged)
        x = x + y
        if self.cross:
            x = x + self.cross_attention.over_encoded(x, crossed, view)
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

    @property
    def traits(self) -> Traits:
        return traits(self.stack, self.both_sides)

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
        sight = kernels.prepared(kernels.Sight(where, where), None)
        encoded = None
        if self.source is not None:
            encoded = jnp.zeros((rows, 1, self.source), out_sharding=spec("batch length width"))
        view = View(where, sight, encoded=encoded, seen=sight)
        x, own = x.astype(self.model.activations), one_layer(self.traits, 0)
        draw = lambda key: self.layer.init(key, x, view, own)["params"]
        stacked = jax.vmap(draw)(jax.random.split(key, self.stack.layers))
        is_named = lambda leaf: isinstance(leaf, Named)
        return jax.tree.map(
            lambda named: named.replace(axes=f"layers {named.axes}"), stacked, is_leaf=is_named
        )

    def __call__(self, x, view: View, key=None):
        """x [b t d] through every layer and the final norm."""
        view = self.biased(view)

        def through(x, layer):
            weights, own, key = layer
            return self.layer.apply({"params": weights}, x, view, own, key), None

        keys = None if key is None else jax.random.split(key, self.stack.layers + 1)
        layer_keys = None if key is None else keys[:-1]
        x = self.standing(x, view.where)
        x, _ = self.over_layers(kept(through, self.remat), x, self.traits, layer_keys)
        return dropout(self.norm(x), self.model.dropout, None if key is None else keys[-1])

    def skipping(self, x, view: View, key, rates):
        """x [b t d] through every layer and the final norm, each row past a layer where it skips
        it, which it does as often as its rate [layers] says; and the states [layers b t d] after
        all of them. The weights are stacked.
        """
        view = self.biased(view)
        *layer_keys, last = jax.random.split(key, self.stack.layers + 1)

        def through(x, layer):
            weights, own, key, rate = layer
            y = self.layer.apply({"params": weights}, x, view, own, key)
            x = jnp.where(skips(x, rate, key), x, y)
            return x, x

        x = self.standing(x, view.where)
        per_layer = (self.traits, jnp.stack(layer_keys), rates)
        x, states = self.over_layers(kept(through, self.remat), x, *per_layer)
        return dropout(self.norm(x), self.model.dropout, last), states

    def watched(self, x, view: View) -> tuple[list, list]:
        """What the final norm makes of x before every layer and after the last, layers + 1 of
        [b t d], and how each layer shares its attention; for weights that are not stacked."""
        view = self.biased(view)
        x = self.standing(x, view.where)
        states, shares = [self.norm(x)], []
        for layer, weights in enumerate(self.layers):
            given = (x, view, one_layer(self.traits, layer))
            x, shared = self.layer.apply({"params": weights}, *given, method="watched")
            states.append(self.norm(x))
            shares.append(shared)
        return states, shares

    def biased(self, view: View) -> View:
        """view with the bias that all layers share, where the stack has one."""
        if not self.relative:
            return view
        shared = positions.relative(self.bias, self.stack, self.both_sides)
        return view._replace(relative=kernels.laid(shared, view.sight))

    def standing(self, x, where):
        """x with learned positions added, where the stack has them."""
        if self.stack.positions != "learned":
            return x
        return x + self.positions.at[where].get(out_sharding=spec("batch length width"))

    def decode(self, x, view: View, cache: Cache, crossed: Cache | None):
        """x [b w d] through every layer over the cache, and the final norm."""
        x, cache = self.through(self.standing(x, view.where), view, cache, crossed)
        return self.norm(x), cache

    def through(self, x, view: View, cache: Cache, crossed: Cache | None):
        """x [b w d] through the layers alone, over the cache."""
        view = self.biased(view)

        def through(x, layer):
            weights, own, *caches = layer
            return self.layer.apply({"params": weights}, x, view, own, *caches, method="decode")

        return self.over_layers(through, x, self.traits, cache, crossed)

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


def skips(x, rate, key):
    """Which rows [b 1 1] of x pass a layer by; drawn from what no dropout in it is drawn from."""
    key = jax.random.fold_in(key, SKIPPING)
    placed = jax.typeof(x).sharding
    return jax.random.bernoulli(key, rate, (x.shape[0], 1, 1), out_sharding=placed)


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
