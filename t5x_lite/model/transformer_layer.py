# SPDX-License-Identifier: Apache-2.0
"""One transformer layer: self-attention, cross-attention, Mlp, in training and in decoding."""

from t5x_lite import config
from t5x_lite.model.attention import Attention, AttentionContext
from t5x_lite.model.cache import Cache, CacheStore
from t5x_lite.model.layer_config import LayerConfig
from t5x_lite.model.layers import FlaxModule, Mlp, dropout, normalizer, split
from t5x_lite.utils.not_none import not_none


class Layer(FlaxModule):
    """Transformer layer: self-attention, cross-attention in a decoder, Mlp.

    Attributes:
      model: architecture of the whole model.
      stack: architecture of the stack that the layer belongs to.
      both_sides: bidirectional, as in an encoder.
      source: width of the encoder's output; None without cross-attention.
    """

    model: config.Model
    stack: config.Stack
    both_sides: bool = False
    source: int | None = None

    @property
    def sizes(self):
        return {"norm": self.stack.embed}

    def setup(self):
        self.attention = Attention(self.model, self.stack, self.both_sides)
        self.cross = self.source is not None and not self.stack.merged
        if self.cross:
            self.cross_attention = Attention(self.model, self.stack, cross=True, source=self.source)
        self.mlp = Mlp(self.model, self.stack)
        if self.stack.norm_order == "post":
            self.attention_norm = normalizer(self, "attention_norm")
            self.mlp_norm = normalizer(self, "mlp_norm")
            if self.cross:
                self.cross_attention_norm = normalizer(self, "cross_attention_norm")

    def add_residual(self, x, y, sublayer: str):
        """Adds the output of a sublayer to the residual stream, and normalizes it in post-norm.

        Args:
          x: [b t d] hidden states.
          y: [b t d] output of the sublayer.
          sublayer: its name, which the norm is named after.
        """
        x = x + y
        return x if self.stack.norm_order == "pre" else getattr(self, f"{sublayer}_norm")(x)

    def __call__(self, x, context: AttentionContext, layer_config: LayerConfig, key=None):
        """Applies the layer to whole rows.

        Args:
          x: [b t d] hidden states.
          context: inputs that all layers share.
          layer_config: settings of this layer.
          key: dropout key; None for no dropout.
        """
        rate, keys = self.model.dropout, split(key, 4)
        cross_kv = self.context_kv(context, layer_config)
        merged = cross_kv if self.stack.merged else None
        y = dropout(self.attention(x, context, layer_config, merged), rate, keys[0])
        x = self.add_residual(x, y, "attention")
        if self.cross:
            y = self.cross_attention.attend_encoded(x, not_none(cross_kv), context, layer_config)
            x = self.add_residual(x, dropout(y, rate, keys[1]), "cross_attention")
        return self.add_residual(x, dropout(self.mlp(x, keys[2]), rate, keys[3]), "mlp")

    def inspect(self, x, context: AttentionContext, layer_config: LayerConfig) -> tuple:
        """Applies the layer as `__call__` does and also returns its attention probabilities.

        Args:
          x: [b t d] hidden states.
          context: inputs that all layers share; its backend has to be None (plain XLA).
          layer_config: settings of this layer.

        Returns:
          The layer's output [b t d], and a pair of probabilities [b n t s]: of self-attention, and
          of cross-attention (None if the layer has no separate cross-attention).
        """
        cross_kv = self.context_kv(context, layer_config)
        merged = cross_kv if self.stack.merged else None
        probs, cross_probs = self.attention.attention_probs(x, context, layer_config, merged), None
        y = self.attention(x, context, layer_config, merged)
        x = self.add_residual(x, y, "attention")
        if self.cross:
            assert cross_kv is not None
            cross_probs = self.cross_attention.cross_attention_probs(
                x, cross_kv, context, layer_config
            )
            y = self.cross_attention.attend_encoded(x, cross_kv, context, layer_config)
            x = self.add_residual(x, y, "cross_attention")
        return self.add_residual(x, self.mlp(x), "mlp"), (probs, cross_probs)

    def decode(
        self,
        x,
        context: AttentionContext,
        layer_config: LayerConfig,
        cache: CacheStore,
        cross_kv: Cache | None,
    ):
        """Applies the layer to a block of tokens over the layer's cache.

        Args:
          x: [b w d] hidden states of the block.
          context: inputs that all layers share.
          layer_config: settings of this layer.
          cache: this layer's keys and values.
          cross_kv: keys and values of the encoder's output; None for a lone decoder.

        Returns:
          The layer's output [b w d], and the cache with the block written into it.
        """
        merged = cross_kv if self.stack.merged else None
        y, cache = self.attention.attend_cache(x, context, layer_config, cache, merged)
        x = self.add_residual(x, y, "attention")
        if self.cross:
            y = self.cross_attention.attend_encoded(x, not_none(cross_kv), context, layer_config)
            x = self.add_residual(x, y, "cross_attention")
        return self.add_residual(x, self.mlp(x), "mlp"), cache

    def context_kv(self, context: AttentionContext, layer_config: LayerConfig) -> Cache | None:
        """This layer's keys and values of the encoder's output; None for a lone stack."""
        if self.source is None:
            return None
        return self.cross_kv(context.encoded, context.encoded_where, layer_config)

    def cross_kv(self, encoded, where=None, layer_config: LayerConfig | None = None) -> Cache:
        """This layer's keys and values [b k s h] of the encoder's output.

        Args:
          encoded: [b s d] the encoder's output.
          where: [b s] positions by which the keys are rotated; None for no rotation.
          layer_config: settings of this layer, where keys are rotated.
        """
        attention = self.cross_attention if self.cross else self.attention
        return Cache(*attention.keys_values(encoded, where, layer_config))
