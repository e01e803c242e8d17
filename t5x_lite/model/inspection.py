# SPDX-License-Identifier: Apache-2.0
"""Inspection of a transformer: hidden states and attention probabilities of every layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite.model.attention import AttentionContext
from t5x_lite.model.contexts import on_rows, rotate_cross, split_chunks
from t5x_lite.model.transformer import Transformer
from t5x_lite.utils.not_none import not_none


class InspectionInputs(NamedTuple):
    """Token ids as the model reads them, int32 on the host or on devices; rows are padded at their
    end.

    Attributes:
      tokens: [b t] ids that the decoder reads, the start token included.
      length: [b] number of tokens that are not padding.
      prompt: [b] number of tokens that belong to the prompt.
      inputs: [b s] ids that the encoder reads; None for a lone decoder.
      inputs_length: [b] number of inputs that are not padding; None for a lone decoder.
    """

    tokens: Any
    length: Any
    prompt: Any
    inputs: Any = None
    inputs_length: Any = None


class Activations(NamedTuple):
    """Activations of a forward pass, layers first.

    Attributes:
      states: [layers + 1 b t d] decoder states before each layer and after the last, each through
        the final norm.
      decoder: [layers b n t t] probabilities of the decoder's self-attention.
      cross: [layers b n t s] probabilities of cross-attention; None for a lone decoder. In a merged
        layer a row of decoder and the same row of cross sum to 1 together.
      encoder: [layers b n s s] probabilities of the encoder's self-attention; None for a lone
        decoder.
    """

    states: Any
    decoder: Any
    cross: Any = None
    encoder: Any = None


class Inspected(Transformer):
    """Transformer that returns its activations; in plain XLA, with the weights of `unstack`.

    It is built with scan=False. `Model.attention` does not matter.
    """

    backend = None

    def inside(self, inputs: InspectionInputs) -> Activations:
        """Hidden states and attention probabilities of every layer."""
        inputs = InspectionInputs(*map(on_rows, inputs))
        encoded = encoder = None
        if self.cfg.encoder:
            states, encoder = self.encoder_activations(inputs)
            encoded, encoder = states[-1], jnp.stack([probs for probs, _ in encoder])
        states, layers = self.decoder.inspect(*self.decoder_context(inputs, encoded))
        decoder, cross = jnp.stack([probs for probs, _ in layers]), None
        if self.cfg.encoder and not_none(self.cfg.decoder).merged:
            decoder, cross = jnp.split(decoder, [inputs.tokens.shape[1]], axis=-1)
        elif self.cfg.encoder:
            cross = jnp.stack([cross_probs for _, cross_probs in layers])
        return Activations(jnp.stack(states), decoder, cross, encoder)

    def encoded_by_layer(self, inputs: InspectionInputs) -> Float[Array, "layers+1 b s d"]:
        """Encoder output of an encoder cut off before each layer, and of the whole encoder."""
        return jnp.stack(self.encoder_activations(InspectionInputs(*map(on_rows, inputs)))[0])

    def next_token_logits(self, inputs: InspectionInputs) -> Float[Array, "b t v"]:
        """Logits of the token after each token."""
        inputs = InspectionInputs(*map(on_rows, inputs))
        encoded = None
        if self.cfg.encoder:
            input_ids = not_none(inputs.inputs)
            segments, where = segments_and_positions(input_ids, not_none(inputs.inputs_length))
            encoded = self.encode(input_ids, segments, where)
        return self.logits(self.decoder(*self.decoder_context(inputs, encoded)))

    def encoder_activations(self, inputs: InspectionInputs) -> tuple[list, list]:
        """States and attention probabilities of the encoder, as `LayerStack.inspect` has them."""
        input_ids = not_none(inputs.inputs)
        segments, where = segments_and_positions(input_ids, not_none(inputs.inputs_length))
        # All pairs of rows, whose probabilities are returned.
        segments, where, _ = split_chunks(not_none(self.cfg.encoder), segments, where)
        context = AttentionContext(where, self.mask(segments, segments))
        return self.encoder.inspect(self.embed(input_ids, for_encoder=True), context)

    def decoder_context(self, inputs: InspectionInputs, encoded) -> tuple[Any, AttentionContext]:
        """Embedded tokens of the decoder, and the context of its layers."""
        segments, where = segments_and_positions(inputs.tokens, inputs.length)
        prefix = None
        if self.cfg.prefix_lm:
            prefix = jnp.arange(inputs.tokens.shape[1]) < inputs.prompt[:, None]
        options = {"query_prefix": prefix, "key_prefix": prefix}
        mask = self.mask(segments, segments, causal=self.cfg.causal_decoder, **options)
        context = AttentionContext(where, mask, encoded=encoded)
        if encoded is not None:
            rows = segments_and_positions(not_none(inputs.inputs), not_none(inputs.inputs_length))
            context = context._replace(input_mask=self.mask(segments, rows[0]))
            stack = not_none(self.cfg.decoder)
            context = rotate_cross(context, stack, (segments, where), rows)
        return self.embed(inputs.tokens), context


def segments_and_positions(
    ids: Int[Array, "b t"], length: Int[Array, " b"]
) -> tuple[jax.Array, jax.Array]:
    """Segments and positions [b t] of padded ids, of which row b has length[b]."""
    where = jnp.arange(ids.shape[1])
    exists = where < length[:, None]
    return exists.astype(jnp.int32), jnp.where(exists, where, 0)
