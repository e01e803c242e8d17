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
from t5x_lite.model.layers import normalizer, project, stored, weight
from t5x_lite.sharding import spec

# A window that hides nothing, for the full layers of a stack that has sliding ones too.
EVERYTHING = 1 << 30


class View(NamedTuple):
    """What every layer of a tower looks at: shared, while x, caches and keys change by layer.

    where [b t] positions of the tokens; sight of the keys of self-attention and relative, their
    bias; encoded [b s d] (training) and seen, the sight of the inputs; index [b] where a block
    enters the cache. how is what computes attention: a kernel, or None for plain XLA.
    """

    where: Any
    sight: Any
    relative: Any = None
    encoded: Any = None
    seen: Any = None
    index: Any = None
    how: kernels.How | None = None


class Traits(NamedTuple):
    """In what the layers of a stack differ besides weights: rows [layers ...] of each.

    reach [2] is how far behind and ahead a layer sees, frequency [h/2] by how much it turns; None
    where none does.
    """

    reach: Any
    frequency: Any


def traits(stack: config.Stack, both_sides: bool) -> Traits:
    """The traits of all layers of stack."""
    form = stack.window_form if both_sides else "below"
    windows = [stack.window if sliding else EVERYTHING for sliding in stack.sliding]
    frequency = [positions.frequencies(stack, sliding) for sliding in stack.sliding]
    reach = np.array([positions.reach(window, form) for window in windows], np.int32)
    return Traits(
        reach if any(stack.sliding) else None,
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
        self.query = stored(self, "query", "embed -> heads head_dim", stack.embed**-0.5 * shrink)
        self.key = stored(self, "key", f"{source} -> kv_heads head_dim")
        self.value = stored(self, "value", f"{source} -> kv_heads head_dim")
        self.out = stored(self, "out", "heads head_dim -> embed")
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
        return self.attended(*self.asked(x, view, own, crossed), view.how)

    def over_cache(
        self, x, view: View, own: Traits, cache: Cache, crossed: Cache | None = None
    ) -> tuple[Float[Array, "b w d"], Cache]:
        """Self-attention of a block over this layer's cache, into which it is written."""
        x = self.norm(x)
        q = self.queries(x, view.where, own)
        k, v = self.keys_values(x, view.where, own)
        keys = write_rows(cache.keys, k, view.index)
        values = write_rows(cache.values, v, view.index)
        cache = Cache(keys, values)
        sources = self.sources(cache, self.seen(view, own), crossed)
        return self.attended(q, sources, view.how), cache

    def over_encoded(self, x, crossed: Cache, view: View) -> Float[Array, "b t d"]:
        """Cross-attention over keys and values that `keys_values(encoded)` made."""
        return self.attended(*self.asked_of_encoded(x, crossed, view), view.how)

    def shares(self, x, view: View, own: Traits, crossed: Cache | None = None):
        """How `__call__` shares its attention [b n t s]; in a merged layer the inputs come last."""
        return self.probabilities(*self.asked(x, view, own, crossed))

    def shares_of_encoded(self, x, crossed: Cache, view: View) -> Float[Array, "b n t s"]:
        """How `over_encoded` shares its attention."""
        return self.probabilities(*self.asked_of_encoded(x, crossed, view))

    def asked(self, x, view: View, own: Traits, crossed: Cache | None = None):
        """The queries of x, and what they are put to."""
        x = self.norm(x)
        q = self.queries(x, view.where, own)
        k, v = self.keys_values(x, view.where, own)
        return q, self.sources(Cache(k, v), self.seen(view, own), crossed)

    def asked_of_encoded(self, x, crossed: Cache, view: View):
        return self.queries(self.norm(x)), (kernels.Source(*crossed, view.seen),)

    def seen(self, view: View, own: Traits) -> View:
        """view as this layer sees it: with its own bias and as far as it reaches."""
        if self.relative:
            own_bias = positions.relative(self.bias, self.stack, self.both_sides)
            view = view._replace(relative=kernels.laid(own_bias, view.sight))
        return view._replace(sight=view.sight.within(own.reach))

    def queries(self, x, where=None, own: Traits | None = None) -> Float[Array, "b t n h"]:
        q = project(x, self.query, "embed -> heads head_dim")
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
        axes = "encoder_embed" if self.cross else "embed"
        axes = f"{axes} -> kv_heads head_dim"
        k, v = (project(source, matrix, axes) for matrix in (self.key, self.value))
        if self.stack.qkv_bias:
            k, v = k + self.key_bias, v + self.value_bias
        if self.stack.qk_norm:
            k = self.key_norm(k)
        return jnp.swapaxes(turned(k, where, own), 1, 2), jnp.swapaxes(v, 1, 2)

    def sources(self, own: Cache, view: View, crossed: Cache | None) -> tuple[kernels.Source, ...]:
        """Own keys, and for the same softmax those of the inputs where they are `crossed`."""
        sources = (kernels.Source(*own, view.sight, view.relative),)
        return sources if crossed is None else sources + (kernels.Source(*crossed, view.seen),)

    def grouped(self, q: Float[Array, "b t n h"]) -> Float[Array, "b t k g h"]:
        """The queries of every key head."""
        group = self.stack.heads // self.stack.key_heads
        shape = (*q.shape[:2], -1, group, q.shape[-1])
        return jnp.reshape(q, shape, out_sharding=spec("batch length kv_heads group head_dim"))

    def probabilities(self, q, sources: tuple[kernels.Source, ...]) -> Float[Array, "b n t s"]:
        return kernels.probabilities(self.grouped(q), sources, self.stack.softcap)

    def attended(self, q, sources: tuple[kernels.Source, ...], how) -> Float[Array, "b t d"]:
        """What q sees, through the kernel and back to the width of x."""
        b, t, _, h = q.shape
        y = kernels.attend(self.grouped(q), sources, self.stack.softcap, how)
        y = jnp.reshape(y, (b, t, -1, h), out_sharding=spec("batch length heads head_dim"))
        y = project(y, self.out, "heads head_dim -> embed")
        if self.stack.out_bias:
            y = y + self.out_bias
        return self.post_norm(y) if self.stack.post_norms else y


def turned(x, where, own: Traits | None):
    """x rotated by its positions, in layers that rotate."""
    rotary = where is not None and own.frequency is not None
    return positions.rotate(x, where, own.frequency) if rotary else x
