# SPDX-License-Identifier: Apache-2.0
"""An attention layer: its weights, projections, and the call of the attention kernel."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from t5x_lite import config
from t5x_lite.kernels import api as kernels
from t5x_lite.model import positions
from t5x_lite.model.cache import Cache, CacheStore, TokenBlock
from t5x_lite.model.layer_config import LayerConfig, apply_rope
from t5x_lite.model.layers import (
    input_normalizer,
    normalize,
    normalize_heads,
    normalizer,
    param,
    project,
    weight,
)
from t5x_lite.sharding import spec
from t5x_lite.utils.not_none import not_none


class AttentionContext(NamedTuple):
    """Inputs that all layers of a stack share, while x, caches and keys change by layer.

    Attributes:
      where: [b t] int32 positions of the tokens.
      mask: mask of the keys of self-attention (`kernels.Mask` or `kernels.CacheMask`).
      relative: position bias of self-attention; None without one.
      encoded: [b s d] encoder output, in training; None otherwise.
      input_mask: mask of the keys of cross-attention; None for a lone stack.
      block: the tokens in decoding, with their place in the cache; None outside decoding.
      backend: kernel backend that computes attention; None for plain XLA.
      cross_where: [b t] positions of the queries of cross-attention; None without rotation.
      encoded_where: [b s] positions of the encoder's output; None without rotation, and outside
        training.
    """

    where: Any
    mask: Any
    relative: Any = None
    encoded: Any = None
    input_mask: Any = None
    block: TokenBlock | None = None
    backend: kernels.Backend | None = None
    cross_where: Any = None
    encoded_where: Any = None


class Attention(nn.Module):
    """Multi-head attention with grouped keys: over x itself or over the encoder's output.

    Attributes:
      model: architecture of the whole model.
      stack: architecture of the stack that the layer belongs to.
      both_sides: bidirectional; it decides the buckets of a position bias of the layer's own.
      cross: cross-attention instead of self-attention.
      source: width of the encoder's output; None without cross-attention.
    """

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
        # T5 leaves scores unscaled and initializes queries smaller by sqrt(head_dim) instead.
        init_scale = stack.head_dim**-0.5 / stack.query_scale
        source = "encoder_embed" if self.cross else "embed"
        self.norm = input_normalizer(self)
        self.query = param(self, "query", "embed -> heads head_dim", stack.embed**-0.5 * init_scale)
        self.key = param(self, "key", f"{source} -> kv_heads head_dim")
        self.value = param(self, "value", f"{source} -> kv_heads head_dim")
        self.out = param(self, "out", "heads head_dim -> embed")
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
        self.has_vectors = stack.bias_vectors and not self.cross
        if self.has_vectors:
            self.bias_vectors = weight(self, "bias_vectors", "-> buckets head_dim", 0.02)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        context: AttentionContext,
        layer_config: LayerConfig,
        cross_kv: Cache | None = None,
    ) -> Float[Array, "b t d"]:
        """Self-attention over x; in a merged layer over the encoder's output too.

        Args:
          x: [b t d] hidden states.
          context: inputs that all layers share.
          layer_config: settings of this layer.
          cross_kv: keys and values [b k s h] of the encoder's output, in a merged layer only.
        """
        inputs = self.attention_inputs(x, context, layer_config, cross_kv)
        return self.attend(*inputs, context.backend)

    def attend_cache(
        self,
        x: Float[Array, "b w d"],
        context: AttentionContext,
        layer_config: LayerConfig,
        cache: CacheStore,
        cross_kv: Cache | None = None,
    ) -> tuple[Float[Array, "b w d"], CacheStore]:
        """Self-attention of a block over this layer's cache, into which it is written.

        Args:
          x: [b w d] hidden states of the block.
          context: inputs that all layers share.
          layer_config: settings of this layer.
          cache: this layer's keys and values.
          cross_kv: keys and values of the encoder's output, in a merged layer only.

        Returns:
          The layer's output [b w d], and the cache with the block in it.
        """
        x = self.norm(x)
        q = self.queries(x, context.where, layer_config)
        k, v = self.keys_values(x, context.where, layer_config)
        block = not_none(context.block)
        cache = cache.append(k, v, block.index)
        # Read from the cache, the block too: what a query attends to is the same in every block.
        stored = Cache(*cache.read(block, q.dtype))
        context = self.layer_context(context, layer_config, q, stored.keys)
        sources = self.sources(stored, context, cross_kv)
        return self.attend(q, sources, context.backend), cache

    def attend_encoded(
        self,
        x: Float[Array, "b t d"],
        cross_kv: Cache,
        context: AttentionContext,
        layer_config: LayerConfig | None = None,
    ) -> Float[Array, "b t d"]:
        """Cross-attention over the encoder's output.

        Args:
          x: [b t d] hidden states.
          cross_kv: the output of `keys_values` for the encoder's output.
          context: inputs that all layers share.
          layer_config: settings of this layer, where queries are rotated.
        """
        inputs = self.cross_attention_inputs(x, cross_kv, context, layer_config)
        return self.attend(*inputs, context.backend)

    def attention_probs(
        self,
        x: Float[Array, "b t d"],
        context: AttentionContext,
        layer_config: LayerConfig,
        cross_kv: Cache | None = None,
    ) -> Float[Array, "b n t s"]:
        """Attention probabilities of `__call__`; in a merged layer those of the inputs come last.

        Args:
          x: [b t d] hidden states.
          context: inputs that all layers share.
          layer_config: settings of this layer.
          cross_kv: keys and values of the encoder's output, in a merged layer only.
        """
        return self.probabilities(*self.attention_inputs(x, context, layer_config, cross_kv))

    def cross_attention_probs(
        self,
        x: Float[Array, "b t d"],
        cross_kv: Cache,
        context: AttentionContext,
        layer_config: LayerConfig,
    ) -> Float[Array, "b n t s"]:
        """Attention probabilities of `attend_encoded`.

        Args:
          x: [b t d] hidden states.
          cross_kv: the output of `keys_values` for the encoder's output.
          context: inputs that all layers share.
          layer_config: settings of this layer.
        """
        inputs = self.cross_attention_inputs(x, cross_kv, context, layer_config)
        return self.probabilities(*inputs)

    def attention_inputs(
        self,
        x: Float[Array, "b t d"],
        context: AttentionContext,
        layer_config: LayerConfig,
        cross_kv: Cache | None = None,
    ) -> tuple[jax.Array, tuple[kernels.AttentionSource, ...]]:
        """Queries and key sources of self-attention, as the kernel takes them.

        Args:
          x: [b t d] hidden states, before the norm.
          context: inputs that all layers share.
          layer_config: settings of this layer.
          cross_kv: keys and values of the encoder's output, in a merged layer only.
        """
        x = self.norm(x)
        q = self.queries(x, context.where, layer_config)
        k, v = self.keys_values(x, context.where, layer_config)
        context = self.layer_context(context, layer_config, q, k)
        return q, self.sources(Cache(k, v), context, cross_kv)

    def cross_attention_inputs(
        self,
        x: Float[Array, "b t d"],
        cross_kv: Cache,
        context: AttentionContext,
        layer_config: LayerConfig | None,
    ) -> tuple[jax.Array, tuple[kernels.AttentionSource, ...]]:
        """Queries and key source of cross-attention, as the kernel takes them.

        Args:
          x: [b t d] hidden states, before the norm.
          cross_kv: the output of `keys_values` for the encoder's output.
          context: inputs that all layers share.
          layer_config: settings of this layer, where queries are rotated.
        """
        q = self.queries(self.norm(x), context.cross_where, layer_config)
        return q, (encoder_source(cross_kv, context, q.dtype),)

    def layer_context(
        self,
        context: AttentionContext,
        layer_config: LayerConfig,
        q: Float[Array, "b t n h"],
        keys: Float[Array, "b k s h"],
    ) -> AttentionContext:
        """Context with the layer's own position bias and window.

        Args:
          context: inputs that all layers share.
          layer_config: settings of this layer.
          q: [b t n h] queries.
          keys: [b k s h] keys.
        """
        if self.relative:
            bias = positions.relative(self.bias, self.stack, self.both_sides)
            context = context._replace(relative=kernels.prepare_bias(bias, context.mask))
        if self.has_vectors:
            shared = positions.relative(self.bias_vectors, self.stack, self.both_sides)
            buckets = shared.bucket(-context.mask.distance)
            keys = keys * self.stack.query_scale
            added = positions.vector_bias(self.bias_vectors, q, keys, buckets)
            # Without a bias in the pass that draws the weights alone.
            added = added if context.relative is None else context.relative + added
            context = context._replace(relative=added)
        return context._replace(mask=context.mask.with_window(layer_config.window_size))

    def queries(
        self,
        x: Float[Array, "b t d"],
        where: Int[Array, "b t"] | None = None,
        layer_config: LayerConfig | None = None,
    ) -> Float[Array, "b t n h"]:
        """Scaled queries, rotated in rotary layers.

        Args:
          x: [b t d] hidden states, after the norm.
          where: [b t] positions; None in cross-attention that does not rotate.
          layer_config: settings of this layer; needed with `where`.
        """
        q = project(x, self.query, "embed -> heads head_dim")
        if self.stack.qkv_bias:
            q = q + self.query_bias
        if self.stack.qk_norm:
            q = self.query_norm(q)
        if self.stack.qkv_norm:
            q = normalize(q, self.stack)
        return apply_rope(q * self.stack.query_scale, where, layer_config, self.stack)

    def keys_values(
        self,
        source: Float[Array, "b s d"],
        where: Int[Array, "b s"] | None = None,
        layer_config: LayerConfig | None = None,
    ) -> tuple[Float[Array, "b k s h"], Float[Array, "b k s h"]]:
        """Keys and values, the keys rotated in rotary layers.

        Args:
          source: [b s d] hidden states after the norm, or the encoder's output.
          where: [b s] positions; None for an encoder's output that is not rotated.
          layer_config: settings of this layer; needed with `where`.
        """
        axes = "encoder_embed" if self.cross else "embed"
        axes = f"{axes} -> kv_heads head_dim"
        k, v = (project(source, matrix, axes) for matrix in (self.key, self.value))
        if self.stack.qkv_bias:
            k, v = k + self.key_bias, v + self.value_bias
        if self.stack.qk_norm:
            k = self.key_norm(k)
        if self.stack.qkv_norm:
            k, v = normalize(k, self.stack), normalize(v, self.stack)
        k = apply_rope(k, where, layer_config, self.stack)
        return jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)

    def sources(
        self, keys_values: Cache, context: AttentionContext, cross_kv: Cache | None
    ) -> tuple[kernels.AttentionSource, ...]:
        """Key sources that share one softmax.

        Args:
          keys_values: keys and values of self-attention.
          context: inputs of this layer, from `layer_context`.
          cross_kv: keys and values of the encoder's output in a merged layer; None otherwise.
        """
        sources = (kernels.AttentionSource(*keys_values, context.mask, context.relative),)
        if cross_kv is None:
            return sources
        return sources + (encoder_source(cross_kv, context, keys_values.keys.dtype),)

    def group_heads(self, q: Float[Array, "b t n h"]) -> Float[Array, "b t k g h"]:
        """Splits the query heads into one group per key head."""
        group = self.stack.heads // self.stack.key_heads
        shape = (*q.shape[:2], -1, group, q.shape[-1])
        return jnp.reshape(q, shape, out_sharding=spec("batch length kv_heads group head_dim"))

    def probabilities(
        self, q: Float[Array, "b t n h"], sources: tuple[kernels.AttentionSource, ...]
    ) -> Float[Array, "b n t s"]:
        """Softmax over the keys of all sources, in plain XLA."""
        return kernels.attention_probs(self.group_heads(q), sources, self.stack.softcap)

    def attend(
        self,
        q: Float[Array, "b t n h"],
        sources: tuple[kernels.AttentionSource, ...],
        backend: kernels.Backend | None,
    ) -> Float[Array, "b t d"]:
        """Attention output, projected back to the width of the stack.

        Args:
          q: [b t n h] queries.
          sources: keys, values, masks and biases that share one softmax.
          backend: kernel backend; None for plain XLA.
        """
        b, t, _, h = q.shape
        grouped = self.group_heads(q)
        y = kernels.dot_product_attention(grouped, sources, self.stack.softcap, backend)
        y = jnp.reshape(y, (b, t, -1, h), out_sharding=spec("batch length heads head_dim"))
        if self.stack.output_norm:
            y = normalize_heads(y, self.stack)
        y = project(y, self.out, "heads head_dim -> embed")
        if self.stack.out_bias:
            y = y + self.out_bias
        return self.post_norm(y) if self.stack.post_norms else y


def encoder_source(cross_kv: Cache, context: AttentionContext, dtype) -> kernels.AttentionSource:
    """Returns the encoder's output as a source of keys and values.

    Args:
      cross_kv: its keys and values.
      context: inputs that all layers share.
      dtype: of keys and values that are quantized.
    """
    return kernels.AttentionSource(*cross_kv.read(None, dtype), context.input_mask)
