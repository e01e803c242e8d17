# SPDX-License-Identifier: Apache-2.0
"""One attention layer: its weights, and what stands around the kernel."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from t5x_lite import config, kernels
from t5x_lite.model import positions
from t5x_lite.model.cache import Cache, write_rows
from t5x_lite.model.layers import project, rms_norm, weight
from t5x_lite.sharding import spec


class Attention(nn.Module):
    """Self-attention, or with `cross` attention over the encoder's output."""

    model: config.Model
    stack: config.Stack
    cross: bool = False

    @property
    def sizes(self):
        stack = self.stack
        heads = {"heads": stack.heads, "kv_heads": stack.key_heads, "head_dim": stack.head_dim}
        return heads | {"embed": stack.embed, "norm": stack.embed}

    def setup(self):
        # T5 leaves the scores unscaled and draws queries smaller by sqrt(head_dim) instead.
        shrink = self.stack.head_dim**-0.5 / self.stack.query_scale
        std = self.stack.embed**-0.5 * shrink
        self.norm = weight(self, "norm", "norm")
        self.query = weight(self, "query", "embed -> heads head_dim", std)
        self.key = weight(self, "key", "embed -> kv_heads head_dim")
        self.value = weight(self, "value", "embed -> kv_heads head_dim")
        self.out = weight(self, "out", "heads head_dim -> embed")

    def __call__(
        self,
        x: Float[Array, "b t d"],
        where: Int[Array, "b t"],
        mask: Bool[Array, " b #t s"],
        bias: Float[Array, "#b n t s"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Self-attention over x itself, the tokens standing at positions `where`."""
        x = rms_norm(x, self.norm)
        q, (k, v) = self.queries(x, where), self.keys_values(x, where)
        return self.attended(q, k, v, mask, bias)

    def over_cache(self, x, view, cache: Cache) -> tuple[Float[Array, "b w d"], Cache]:
        """Self-attention of a block over this layer's cache, into which it is written."""
        x = rms_norm(x, self.norm)
        q, (k, v) = self.queries(x, view.where), self.keys_values(x, view.where)
        keys = write_rows(cache.keys, k, view.index)
        values = write_rows(cache.values, v, view.index)
        return self.attended(q, keys, values, view.mask, view.bias), Cache(keys, values)

    def over_encoded(self, x, keys, values, seen):
        """Cross-attention over keys and values that `keys_values(encoded)` made."""
        return self.attended(self.queries(rms_norm(x, self.norm)), keys, values, seen, None)

    def queries(self, x, where=None) -> Float[Array, "b t n h"]:
        q = project(x, self.query, "width -> heads head_dim") * self.stack.query_scale
        return self.turned(q, where)

    def keys_values(
        self, source: Float[Array, "b s d"], where: Int[Array, "b s"] | None = None
    ) -> tuple[Float[Array, "b k s h"], Float[Array, "b k s h"]]:
        k = self.turned(project(source, self.key, "width -> kv_heads head_dim"), where)
        v = project(source, self.value, "width -> kv_heads head_dim")
        return jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)

    def turned(self, x, where):
        rotary = self.stack.positions == "rotary" and not self.cross
        return positions.rotate(x, where, self.stack.rotary_base) if rotary else x

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
        y = kernels.attend(q, k, v, mask, bias)
        y = jnp.reshape(y, (b, t, -1, h), out_sharding=spec("batch length heads head_dim"))
        return project(y, self.out, "heads head_dim -> width")
