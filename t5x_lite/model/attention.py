# SPDX-License-Identifier: Apache-2.0
"""One attention layer: its weights, and what stands around the kernel."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from t5x_lite import config, kernels
from t5x_lite.model import positions
from t5x_lite.model.cache import Cache, write_rows
from t5x_lite.model.layers import normalizer, project, weight
from t5x_lite.sharding import spec

# A window that hides nothing, for the full layers of a stack that has sliding ones too.
EVERYTHING = 1 << 30


class View(NamedTuple):
    """What every layer of a tower looks at: shared, while x, caches and keys change by layer.

    where [b t] positions of the tokens and stand [#b s] of the keys of self-attention; its mask
    [b t s] and bias [#b n t s]; encoded [b s d] (training) and seen [b #t s] of the inputs; index
    [b] where a block enters the cache.
    """

    where: Any
    stand: Any
    mask: Any
    bias: Any = None
    encoded: Any = None
    seen: Any = None
    index: Any = None


class Traits(NamedTuple):
    """In what the layers of a stack differ besides weights: rows [layers ...] of each.

    window is how far a layer sees, frequency [h/2] by how much it turns; None where none does.
    """

    window: Any
    frequency: Any


def traits(stack: config.Stack) -> Traits:
    """The traits of all layers of stack."""
    window = [stack.window if sliding else EVERYTHING for sliding in stack.sliding]
    frequency = [positions.frequencies(stack, sliding) for sliding in stack.sliding]
    return Traits(
        np.array(window, np.int32) if any(stack.sliding) else None,
        np.stack(frequency) if stack.positions == "rotary" else None,
    )


class Attention(nn.Module):
    """Self-attention, or with `cross` attention over the encoder's output, `source` wide."""

    model: config.Model
    stack: config.Stack
    both_sides: bool = False
    cross: bool = False
    source: int | None = None

    @property
    def sizes(self):
        stack = self.stack
        heads = {"heads": stack.heads, "kv_heads": stack.key_heads, "head_dim": stack.head_dim}
        widths = {"embed": stack.embed, "norm": stack.embed, "encoder_embed": self.source}
        return heads | widths | {"head_norm": stack.head_dim, "buckets": stack.buckets}

    def setup(self):
        stack = self.stack
        # T5 leaves the scores unscaled and draws queries smaller by sqrt(head_dim) instead.
        shrink = stack.head_dim**-0.5 / stack.query_scale
        source = "encoder_embed" if self.cross else "embed"
        self.norm = normalizer(self, "norm")
        self.query = weight(self, "query", "embed -> heads head_dim", stack.embed**-0.5 * shrink)
        self.key = weight(self, "key", f"{source} -> kv_heads head_dim")
        self.value = weight(self, "value", f"{source} -> kv_heads head_dim")
        self.out = weight(self, "out", "heads head_dim -> embed")
        if stack.qkv_bias:
            self.query_bias = weight(self, "query_bias", "heads head_dim", 0.0)
            self.key_bias = weight(self, "key_bias", "kv_heads head_dim", 0.0)
            self.value_bias = weight(self, "value_bias", "kv_heads head_dim", 0.0)
        if stack.out_bias:
            self.out_bias = weight(self, "out_bias", "norm", 0.0)
        if stack.qk_norm:
            self.query_norm = normalizer(self, "query_norm", "head_norm")
            self.key_norm = normalizer(self, "key_norm", "head_norm")
        if stack.post_norms:
            self.post_norm = normalizer(self, "post_norm")
        self.relative = stack.positions == "relative" and stack.bias_per_layer and not self.cross
        if self.relative:
            self.bias = weight(self, "bias", "buckets -> heads", stack.bias_std)

    def __call__(
        self, x: Float[Array, "b t d"], view: View, own: Traits, crossed: Cache | None = None
    ) -> Float[Array, "b t d"]:
        """Self-attention over x itself; in a merged layer over the inputs too."""
        x = self.norm(x)
        q = self.queries(x, view.where, own)
        k, v = self.keys_values(x, view.where, own)
        if self.relative:
            length = x.shape[1]
            bias = positions.relative_bias(self.bias, self.stack, self.both_sides, length)
            view = view._replace(bias=bias[None])
        return self.over(q, k, v, windowed(view, own, self.stack, self.both_sides), crossed)

    def over_cache(
        self, x, view: View, own: Traits, cache: Cache, crossed: Cache | None = None
    ) -> tuple[Float[Array, "b w d"], Cache]:
        """Self-attention of a block over this layer's cache, into which it is written."""
        x = self.norm(x)
        q = self.queries(x, view.where, own)
        k, v = self.keys_values(x, view.where, own)
        keys = write_rows(cache.keys, k, view.index)
        values = write_rows(cache.values, v, view.index)
        if self.relative:
            places = view.where, view.stand
            bias = positions.relative_bias_of_blocks(self.bias, self.stack, *places)
            view = view._replace(bias=bias)
        view = windowed(view, own, self.stack, self.both_sides)
        return self.over(q, keys, values, view, crossed), Cache(keys, values)

    def over_encoded(self, x, crossed: Cache, seen) -> Float[Array, "b t d"]:
        """Cross-attention over keys and values that `keys_values(encoded)` made."""
        q = self.queries(self.norm(x))
        return self.attended(q, crossed.keys, crossed.values, seen, None)

    def queries(self, x, where=None, own: Traits | None = None) -> Float[Array, "b t n h"]:
        q = project(x, self.query, "width -> heads head_dim")
        if self.stack.qkv_bias:
            q = q + self.query_bias
        if self.stack.qk_norm:
            q = self.query_norm(q)
        return turned(q * self.stack.query_scale, where, own)

    def keys_values(
        self,
        source: Float[Array, "b s d"],
        where: Int[Array, "b s"] | None = None,
        own: Traits | None = None,
    ) -> tuple[Float[Array, "b k s h"], Float[Array, "b k s h"]]:
        """Keys and values of source; without `where` they are not turned (an encoder's output)."""
        k = project(source, self.key, "width -> kv_heads head_dim")
        v = project(source, self.value, "width -> kv_heads head_dim")
        if self.stack.qkv_bias:
            k, v = k + self.key_bias, v + self.value_bias
        if self.stack.qk_norm:
            k = self.key_norm(k)
        return jnp.swapaxes(turned(k, where, own), 1, 2), jnp.swapaxes(v, 1, 2)

    def over(self, q, k, v, view: View, crossed: Cache | None) -> Float[Array, "b t d"]:
        """Attention to k and v, and in the same softmax to the inputs where they are `crossed`."""
        if crossed is None:
            return self.attended(q, k, v, view.mask, view.bias)
        k = jnp.concatenate([k, crossed.keys.astype(k.dtype)], axis=2)
        v = jnp.concatenate([v, crossed.values.astype(v.dtype)], axis=2)
        b, t, _ = view.mask.shape
        shape = (b, t, view.seen.shape[2])
        seen = jnp.broadcast_to(view.seen, shape, out_sharding=spec("batch length length"))
        return self.attended(q, k, v, jnp.concatenate([view.mask, seen], axis=2), None)

    def attended(self, q, k, v, mask, bias) -> Float[Array, "b t d"]:
        """What q sees, through the kernel and back to the width of x."""
        group = self.stack.heads // self.stack.key_heads
        b, t, _, h = q.shape
        grouped = "batch length kv_heads group head_dim"
        q = jnp.reshape(q, (b, t, -1, group, h), out_sharding=spec(grouped))
        if bias is not None:
            rows, _, *pairs = bias.shape
            axes = f"{'batch' if rows > 1 else 'whole'} kv_heads group length length"
            bias = jnp.reshape(bias, (rows, -1, group, *pairs), out_sharding=spec(axes))
        y = kernels.attend(q, k, v, mask, bias, self.stack.softcap)
        y = jnp.reshape(y, (b, t, -1, h), out_sharding=spec("batch length heads head_dim"))
        y = project(y, self.out, "heads head_dim -> width")
        if self.stack.out_bias:
            y = y + self.out_bias
        return self.post_norm(y) if self.stack.post_norms else y


def turned(x, where, own: Traits | None):
    """x rotated by its positions, in layers that rotate."""
    rotary = where is not None and own.frequency is not None
    return positions.rotate(x, where, own.frequency) if rotary else x


def windowed(view: View, own: Traits, stack: config.Stack, both_sides: bool) -> View:
    """view with only the keys in its mask that the layer's window shows."""
    if own.window is None:
        return view
    form = stack.window_form if both_sides else "below"
    distance = view.where[:, :, None] - view.stand[:, None, :]
    return view._replace(mask=view.mask & positions.within(distance, own.window, form))
