# SPDX-License-Identifier: Apache-2.0
"""Stacks of transformer layers: scanned over stacked weights, or unrolled."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from t5x_lite import config
from t5x_lite.kernels import api as kernels
from t5x_lite.model import positions
from t5x_lite.model.attention import AttentionContext
from t5x_lite.model.cache import CacheStore
from t5x_lite.model.layer_config import LayerConfig, layer_configs
from t5x_lite.model.layers import (
    draw_skips,
    dropout,
    identity,
    is_partitioned,
    normalizer,
    weight,
)
from t5x_lite.model.transformer_layer import Layer
from t5x_lite.sharding import batch_shards, spec
from t5x_lite.utils.not_none import not_none


class LayerStack(nn.Module):
    """Encoder or decoder: position embeddings, the layers of a `config.Stack`, the final norm.

    In a post-norm stack `norm` is the identity.

    Attributes:
      model: architecture of the whole model.
      stack: architecture of this stack.
      both_sides: bidirectional, as in an encoder.
      source: width of the encoder's output; None without cross-attention.
      scan: runs stacked weights (layers first) in one `lax.scan`; otherwise `layers` is a tuple of
        trees, and the loop over them is unrolled.
      remat: what a layer keeps for its backward pass, as `config.Train.remat`: everything (none),
        products with weights and attention outputs (minimal), or its input alone (full).
      unroll: layers per iteration of the scan.
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
        rows = (stack.max_length or 0) + stack.position_offset
        widths = {"embed": stack.embed, "norm": stack.embed, "positions": rows}
        return widths | {"buckets": stack.buckets, "heads": stack.heads}

    @property
    def layer_configs(self) -> LayerConfig:
        return layer_configs(self.stack, self.both_sides)

    def setup(self):
        stack = self.stack
        self.layer = Layer(self.model, stack, self.both_sides, self.source, parent=None)
        if self.is_initializing():
            self.param("layers", self.init_layers)
        self.layers = self.get_variable("params", "layers")
        # In a post-norm stack the last layer's own norm is the last.
        self.norm = normalizer(self, "norm") if stack.norm_order == "pre" else identity
        if stack.embedding_norm:
            self.embedding_norm = normalizer(self, "embedding_norm")
        self.relative = stack.positions == "relative" and not stack.bias_per_layer
        if self.relative:
            self.bias = weight(self, "bias", "buckets -> heads", stack.bias_std)
        if stack.positions == "learned":
            self.positions = weight(self, "positions", "-> positions embed", 0.02)

    def init_layers(self, key):
        """Returns new weights of all layers, stacked and boxed with their axes."""
        rows = batch_shards()
        x = jnp.zeros((rows, 1, self.stack.embed), out_sharding=spec("batch length width"))
        where = jnp.zeros((rows, 1), jnp.int32, out_sharding=spec("batch length"))
        mask = kernels.prepare_mask(kernels.Mask(where, where), None)
        encoded = None
        if self.source is not None:
            encoded = jnp.zeros((rows, 1, self.source), out_sharding=spec("batch length width"))
        context = AttentionContext(where, mask, encoded=encoded, input_mask=mask)
        x, layer_config = x.astype(self.model.dtype), take_layer(self.layer_configs, 0)

        def init_layer(key):
            return self.layer.init(key, x, context, layer_config)["params"]

        def add_layer_axis(boxed):
            return boxed.replace(axes=f"layers {boxed.axes}")

        stacked = jax.vmap(init_layer)(jax.random.split(key, self.stack.layers))
        return jax.tree.map(add_layer_axis, stacked, is_leaf=is_partitioned)

    def __call__(self, x, context: AttentionContext, key=None):
        """Applies every layer and the final norm to whole rows.

        Args:
          x: [b t d] embedded tokens.
          context: inputs that all layers share.
          key: dropout key; None for no dropout.
        """
        context = self.with_position_bias(context)

        def apply_layer(x, layer):
            weights, layer_config, key = layer
            return self.layer.apply({"params": weights}, x, context, layer_config, key), None

        layer_keys = last_key = None
        if key is not None:
            keys = jax.random.split(key, self.stack.layers + 1)
            layer_keys, last_key = keys[:-1], keys[-1]
        x = self.add_position_embeddings(x, context.where)
        apply_layer = remat_layer(apply_layer, self.remat)
        x, _ = self.scan_layers(apply_layer, x, self.layer_configs, layer_keys)
        return dropout(self.norm(x), self.model.dropout, last_key)

    def with_layer_skip(self, x, context: AttentionContext, key, rates):
        """Applies the stack with stochastic layer skip: each row skips each layer at random.

        The weights have to be stacked.

        Args:
          x: [b t d] embedded tokens.
          context: inputs that all layers share.
          key: random key of dropout and of the skips.
          rates: [layers] float32 probability of skipping each layer.

        Returns:
          The final hidden states [b t d], and the states [layers b t d] after every layer.
        """
        context = self.with_position_bias(context)
        *layer_keys, last = jax.random.split(key, self.stack.layers + 1)

        def apply_layer(x, layer):
            weights, layer_config, key, rate = layer
            y = self.layer.apply({"params": weights}, x, context, layer_config, key)
            x = jnp.where(draw_skips(x, rate, key), x, y)
            return x, x

        x = self.add_position_embeddings(x, context.where)
        per_layer = (self.layer_configs, jnp.stack(layer_keys), rates)
        x, states = self.scan_layers(remat_layer(apply_layer, self.remat), x, *per_layer)
        return dropout(self.norm(x), self.model.dropout, last), states

    def inspect(self, x, context: AttentionContext) -> tuple[list, list]:
        """Applies unstacked layers and returns what they compute on the way.

        Returns:
          The final norm of the state before every layer and after the last (layers + 1 of
          [b t d]), and the attention probabilities of each layer, as `Layer.inspect` has them.
        """
        context = self.with_position_bias(context)
        x = self.add_position_embeddings(x, context.where)
        states, probs = [self.norm(x)], []
        for layer, weights in enumerate(self.layers):
            layer_config = take_layer(self.layer_configs, layer)
            x, layer_probs = self.layer.apply(
                {"params": weights}, x, context, layer_config, method=Layer.inspect
            )
            states.append(self.norm(x))
            probs.append(layer_probs)
        return states, probs

    def with_position_bias(self, context: AttentionContext) -> AttentionContext:
        """Returns context with the position bias that all layers share, if the stack has one."""
        if self.relative:
            shared = positions.relative(self.bias, self.stack, self.both_sides)
        elif self.stack.positions == "alibi":
            shared = positions.alibi(self.stack)
        else:
            return context
        return context._replace(relative=kernels.prepare_bias(shared, context.mask))

    def add_position_embeddings(self, x, where):
        """Adds position embeddings at positions where [b t], and applies the norm after them, as
        far as the stack has them."""
        stack = self.stack
        if stack.segment_length is not None:
            where = where % stack.segment_length
        added = stack.position_functions.added
        if added == "learned":
            x = x + positions.look_up_positions(self.positions, where, stack)
        elif added == "sinusoidal":
            x = x + positions.sinusoids(where, stack).astype(x.dtype)
        return self.embedding_norm(x) if stack.embedding_norm else x

    def decode(self, x, context: AttentionContext, cache: Any, cross_kv: Any):
        """Applies every layer over the cache, and the final norm.

        Args:
          x: [b w d] embedded tokens of the block.
          context: inputs that all layers share.
          cache: stores of all layers.
          cross_kv: cross-attention keys and values of all layers; None for a lone decoder.

        Returns:
          The hidden states [b w d], and the cache with the block written into it.
        """
        x = self.add_position_embeddings(x, context.where)
        x, cache = self.decode_layers(x, context, cache, cross_kv)
        return self.norm(x), cache

    def decode_layers(self, x, context: AttentionContext, cache: Any, cross_kv: Any):
        """Applies the layers alone over the cache: no position embeddings, no final norm.

        Args:
          x: [b w d] hidden states of the block.
          context: inputs that all layers share.
          cache: stores of all layers.
          cross_kv: cross-attention keys and values of all layers; None for a lone decoder.

        Returns:
          The state after the last layer [b w d], and the cache with the block written into it.
        """
        stores = (cache,) if self.scan else cache
        by_layout = {store.layout: store for store in stores}
        masked = {
            layout: self.with_cache_mask(context, store) for layout, store in by_layout.items()
        }

        def apply_layer(x, layer):
            weights, layer_config, store, layer_kv = layer
            layer_context = masked[store.layout]
            inputs = x, layer_context, layer_config, store, layer_kv
            return self.layer.apply({"params": weights}, *inputs, method=Layer.decode)

        return self.scan_layers(apply_layer, x, self.layer_configs, cache, cross_kv)

    def with_cache_mask(self, context: AttentionContext, store: CacheStore) -> AttentionContext:
        """Returns context with mask and position bias of its block over a store."""
        block = not_none(context.block)
        mask = store.mask(block)
        if not isinstance(mask, kernels.DenseMask):
            mask = kernels.prepare_mask(mask, context.backend)
        context = self.with_position_bias(context._replace(mask=mask))
        counts = store.log_counts(block.tokens.shape[1])
        if counts is None:
            return context
        bias = jnp.broadcast_to(
            counts,
            (1, self.stack.heads, block.tokens.shape[1], len(counts)),
            out_sharding=spec("whole heads length whole"),
        )
        return context._replace(
            relative=bias if context.relative is None else context.relative + bias
        )

    def cross_kv(self, encoded) -> Any:
        """Returns cross-attention keys and values of every layer, computed once per request; if
        they are rotated, encoded [b s d] begins at position 0."""
        where = None
        if self.stack.cross_rotary:
            where = jnp.broadcast_to(
                jnp.arange(encoded.shape[1]), encoded.shape[:2], out_sharding=spec("batch length")
            )

        def apply_layer(_, layer):
            weights, layer_config = layer
            arguments = encoded, where, layer_config
            return None, self.layer.apply({"params": weights}, *arguments, method=Layer.cross_kv)

        return self.scan_layers(apply_layer, None, self.layer_configs)[1]

    def scan_layers(self, apply_layer, x, *per_layer):
        """Carries x through the layers, by `lax.scan` or by an unrolled loop.

        Args:
          apply_layer: function of (x, (weights, *per_layer)) of one layer, which returns x and the
            layer's output.
          x: [b t d] hidden states; None if the layers carry nothing.
          *per_layer: trees with a first axis of layers, or tuples of one for each layer; None stays
            None.

        Returns:
          x after the last layer, and the layers' outputs, stacked or in a tuple as the weights are.
        """
        if self.scan:
            return jax.lax.scan(apply_layer, x, (self.layers, *per_layer), unroll=self.unroll)
        outputs, apply_layer = [], jax.jit(apply_layer)  # traced once for all layers that are alike
        for layer, weights in enumerate(self.layers):
            slices = (take_layer(part, layer) for part in per_layer)
            x, output = apply_layer(x, (weights, *slices))
            outputs.append(output)
        return x, None if outputs[0] is None else tuple(outputs)


def remat_layer(apply_layer, remat: str):
    """Wraps apply_layer in `jax.checkpoint` with the policy `remat`.

    prevent_cse is False because the layer is scanned.
    """
    if remat == "none":
        return apply_layer
    policies = jax.checkpoint_policies
    products = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable,
        kernels.save_attention,
    )
    policy = products if remat == "minimal" else None
    return jax.checkpoint(apply_layer, prevent_cse=False, policy=policy)


def take_layer(part, layer: int):
    """Returns one layer's part of a LayerConfig, of keys [layers ...] or of a tuple of stores."""
    if type(part) is tuple:  # not a NamedTuple
        return part[layer]
    return jax.tree.map(lambda rows: rows[layer], part)
