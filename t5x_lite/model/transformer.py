# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoder, decoder-only and encoder-only transformers.

Axis letters, here and in every kernel and test:
  b batch    t query position    s key position    w width of a decoded block    d model width
  n heads    k key heads         g heads per key head     h head size
  f mlp width   v vocabulary     (in relative positions: k buckets)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite import config
from t5x_lite.batch import Batch
from t5x_lite.kernels import api as kernels
from t5x_lite.kernels.api import TokenLosses
from t5x_lite.model import contexts, outputs
from t5x_lite.model.attention import AttentionContext
from t5x_lite.model.cache import EncoderMemory, TokenBlock
from t5x_lite.model.contexts import on_rows, shift_right
from t5x_lite.model.draft_heads import Heads
from t5x_lite.model.layers import all_gather, dropout, param, split, weight
from t5x_lite.model.readout import ReadoutHead
from t5x_lite.model.shared_weights import SharingModule
from t5x_lite.model.stack import LayerStack
from t5x_lite.sharding import spec
from t5x_lite.utils.not_none import not_none

NO_MEMORY = EncoderMemory()


class Transformer(SharingModule):
    """The model of a `config.Model`; every method is pure: caches go in and come out.

    Attributes:
      cfg: the architecture.
      scan: stacked weights and a `lax.scan` over layers, as in training; False needs the weights
        of `unstack` and unrolls the layers, as in decoding.
      remat: what layers keep for the backward pass, as `config.Train.remat`.
      unroll: layers per iteration of the scan.
    """

    cfg: config.Model
    scan: bool = True
    remat: str = "none"
    unroll: int = 1

    @property
    def model(self):
        return self.cfg

    @property
    def sizes(self):
        cfg = self.cfg
        sizes = {"vocab": cfg.vocab} | dict.fromkeys(("embed", "norm"), cfg.last_stack.embed)
        return sizes | ({"encoder_embed": cfg.encoder.embed} if cfg.encoder else {})

    def setup(self):
        cfg = self.cfg
        options: dict[str, Any] = dict(scan=self.scan, remat=self.remat, unroll=self.unroll)
        self.embedding = param(self, "embedding", "-> vocab embed", cfg.embedding_std)
        if cfg.separate_embeddings:
            axes = "-> vocab encoder_embed"
            self.encoder_embedding = weight(self, "encoder_embedding", axes, cfg.embedding_std)
        if cfg.eoi is not None:
            self.eoi_embedding = weight(self, "eoi_embedding", "norm", 0.0)
        # A tied model has a head of its own where it is quantized and the embedding is not.
        self.has_head = cfg.writes and (not cfg.tied or self.has_variable("params", "head"))
        if self.has_head:
            self.head = param(self, "head", "embed -> vocab")
        has_bias = cfg.logits_bias and cfg.writes
        self.logits_bias = weight(self, "logits_bias", "vocab", 0.0) if has_bias else None
        if cfg.encoder:
            self.encoder = LayerStack(cfg, cfg.encoder, both_sides=True, **options)
        if cfg.decoder:
            source = cfg.encoder.embed if cfg.encoder else None
            self.decoder = LayerStack(cfg, cfg.decoder, cfg.reads_ahead, source, **options)
        if cfg.draft_heads:
            self.heads = Heads(cfg)
        if cfg.readout:
            self.readout_head = ReadoutHead(cfg, name="readout")

    def __call__(self, batch: Batch, key=None) -> Float[Array, "b t v"]:
        """Logits of every target given the targets before it, with teacher forcing; with
        Model.readout its outputs.

        key is the dropout key; None for no dropout.
        """
        if self.cfg.readout:
            return self.readout(batch, key)
        hidden = self.hidden(batch, key)
        if self.is_initializing() and self.cfg.draft_heads:
            self.draft_hidden(hidden, slice(0, 1), batch.targets[:, :, None])
        return self.logits(hidden)

    def hidden(self, batch: Batch, key=None) -> Float[Array, "b t d"]:
        """Hidden states before the output projection, for every target of batch.

        key is the dropout key; None for no dropout.
        """
        if self.cfg.layout == "encoder_only":
            encoder_key, _ = split(key, 2)
            return self.encode(
                batch.inputs, batch.input_segments, batch.input_positions, encoder_key
            )
        hidden = self.decoder(*self.decoder_inputs(batch, key))
        # Of rows with masks; those without, which may stand behind them, predict nothing.
        return hidden if batch.canvas is None else hidden[:, : batch.targets.shape[1]]

    def hidden_with_layer_skip(
        self, batch: Batch, key: jax.Array, rates: Float[Array, " l"]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "l b t d"]]:
        """`hidden` where rows skip decoder layers at random (LayerSkip, Elhoushi et al., 2024).

        Args:
          batch: token ids with segments and positions.
          key: random key of dropout and of the skips.
          rates: [layers] probability of skipping each layer.

        Returns:
          The hidden states, and the state after each layer, to which `final_norm` applies.
        """
        return self.decoder.with_layer_skip(*self.decoder_inputs(batch, key), rates)

    def decoder_inputs(
        self, batch: Batch, key: jax.Array | None
    ) -> tuple[Float[Array, "b t d"], AttentionContext, jax.Array | None]:
        """Decoder inputs for the targets of batch: embedded tokens, context, and a dropout key."""
        encoder_key, decoder_key = split(key, 2)
        rows, stack = contexts.decoder_rows(self.cfg, batch), not_none(self.cfg.decoder)
        encoded, input_mask = None, None
        if self.cfg.layout == "encoder_decoder":
            inputs = batch.inputs, batch.input_segments, batch.input_positions
            encoded = self.encode(*inputs, encoder_key)
            input_mask = self.mask(rows.segments, on_rows(batch.input_segments))
        where = contexts.draw_positions(stack, rows.segments, rows.where, decoder_key)
        mask = kernels.prepare_mask(rows.mask, self.backend)
        context = AttentionContext(where, mask, None, encoded, input_mask, None, self.backend)
        context = contexts.rotate_cross(context, stack, rows[1:3], batch[5:7])
        embedding_key, decoder_key = split(decoder_key, 2)
        return self.embed(rows.tokens, embedding_key), context, decoder_key

    def encode(
        self,
        inputs: Int[Array, "b s"],
        segments: Int[Array, "b s"],
        where: Int[Array, "b s"],
        key: jax.Array | None = None,
    ) -> Float[Array, "b s d"]:
        """Encoder output.

        Args:
          inputs: [b s] token ids.
          segments: [b s] segment ids; tokens attend within a segment, 0 is padding.
          where: [b s] positions within each segment.
          key: dropout key; None for no dropout.
        """
        embedding_key, key = split(key, 2)
        inputs, segments, where = map(on_rows, (inputs, segments, where))
        stack = not_none(self.cfg.encoder)
        segments, where, span = contexts.split_chunks(stack, segments, where)
        where = contexts.draw_positions(stack, segments, where, key)
        mask = self.mask(segments, segments, span=span)
        context = AttentionContext(where, mask, backend=self.backend)
        return self.encoder(self.embed(inputs, embedding_key, for_encoder=True), context, key)

    def readout(self, batch: Batch, key: jax.Array | None = None) -> Float[Array, "b t r"]:
        """Outputs of `Model.readout` for every target of batch, float32.

        Those of tags are for the input at the same place, all others for the inputs of the target's
        segment, so that packed rows are read as rows of their own.

        Args:
          batch: inputs, and segments of the targets.
          key: dropout key; None for no dropout.
        """
        key, head_key = split(key, 2)
        segments = on_rows(batch.input_segments)
        states = self.input_states(batch.inputs, segments, batch.input_positions, key)
        return self.readout_head(states, segments, on_rows(batch.target_segments), head_key)

    def input_states(
        self,
        inputs: Int[Array, "b s"],
        segments: Int[Array, "b s"],
        where: Int[Array, "b s"],
        key: jax.Array | None = None,
    ) -> Float[Array, "b s d"]:
        """States of the last stack at the inputs.

        The decoder of an encoder-decoder reads them shifted right, a decoder alone as they are.

        Args:
          inputs: [b s] token ids.
          segments: [b s] segment ids; tokens attend within a segment, 0 is padding.
          where: [b s] positions within each segment.
          key: dropout key; None for no dropout.
        """
        if self.cfg.decoder is None:
            return self.encode(inputs, segments, where, key)
        encoder_key, key = split(key, 2)
        encoded, input_mask = None, None
        segments, where = on_rows(segments), on_rows(where)
        mask = self.decoder_mask(segments, segments > 0 if self.cfg.prefix_lm else None)
        if self.cfg.encoder:
            encoded = self.encode(inputs, segments, where, encoder_key)
            input_mask = self.mask(segments, segments)
            inputs = shift_right(inputs, where, self.cfg.decoder_start_token_id)
        stack, rows = self.cfg.decoder, (segments, where)
        where = contexts.draw_positions(stack, *rows, key)
        context = AttentionContext(where, mask, None, encoded, input_mask, None, self.backend)
        context = contexts.rotate_cross(context, stack, rows, rows)
        embedding_key, key = split(key, 2)
        return self.decoder(self.embed(on_rows(inputs), embedding_key), context, key)

    def cross_kv(self, encoded: Float[Array, "b s d"]) -> Any:
        """Cross-attention keys and values of every decoder layer; rows begin at position 0."""
        return self.decoder.cross_kv(encoded)

    def decode(
        self, block: TokenBlock, cache: Any, encoder_memory: EncoderMemory = NO_MEMORY
    ) -> tuple[Float[Array, "b w d"], Any]:
        """Decodes a block of tokens in one forward pass.

        Args:
          block: tokens, their place in the cache, and their tree if they are one.
          cache: stores of all layers.
          encoder_memory: the encoder's output as keys and values; empty for a lone decoder.

        Returns:
          The hidden states [b w d], and the cache with the block written into it.
        """
        context = self.block_context(block, encoder_memory.input_mask)
        x = self.embed(on_rows(block).tokens)
        return self.decoder.decode(x, context, cache, encoder_memory.cross_kv)

    def embed_block(self, block: TokenBlock) -> Float[Array, "b w d"]:
        """Input of the first decoder layer for a block: token and position embeddings."""
        block = on_rows(block)
        depth = jnp.arange(block.tokens.shape[1]) if block.depth is None else block.depth
        return self.decoder.add_position_embeddings(
            self.embed(block.tokens), block.index[:, None] + depth
        )

    def decode_layers(
        self,
        x: Float[Array, "b w d"],
        block: TokenBlock,
        cache: Any,
        encoder_memory: EncoderMemory = NO_MEMORY,
    ) -> tuple[Float[Array, "b w d"], Any]:
        """`decode` without embeddings and final norm: `embed_block` and `final_norm` complete it.

        Args:
          x: [b w d] hidden states in place of the block's tokens.
          block: place in the cache, and tree; of its tokens only the shape matters.
          cache: stores of the layers.
          encoder_memory: the encoder's output as keys and values; empty for a lone decoder.

        Returns:
          The state after the last layer [b w d], and the cache with the block written into it.
        """
        context = self.block_context(block, encoder_memory.input_mask)
        return self.decoder.decode_layers(x, context, cache, encoder_memory.cross_kv)

    def final_norm(self, x: Float[Array, "b w d"]) -> Float[Array, "b w d"]:
        """Hidden states before the output projection, from the state after the last layer."""
        return self.decoder.norm(x)

    def block_context(self, block: TokenBlock, input_mask: jax.Array | None) -> AttentionContext:
        """Context of a decoded block, from `contexts.block_context`.

        Args:
          block: tokens, their place in the cache, and their tree if they are one.
          input_mask: [b s] mask of the inputs; None for a lone decoder.
        """
        block = on_rows(block if self.cfg.prefix_lm else block._replace(prefix=None))
        rotated = not_none(self.cfg.decoder).cross_rotary
        return contexts.block_context(block, on_rows(input_mask), self.backend, rotated)

    def embed(
        self, ids: Int[Array, "b t"], key: jax.Array | None = None, for_encoder: bool = False
    ) -> Float[Array, "b t d"]:
        """Token embeddings, without positions.

        Args:
          ids: [b t] token ids.
          key: dropout key; None for no dropout.
          for_encoder: looks ids up in the encoder's table, if it has one of its own.
        """
        separate = for_encoder and self.cfg.separate_embeddings
        table = self.encoder_embedding if separate else all_gather(self.embedding, "vocab embed")
        x = table.at[ids].get(out_sharding=spec("batch length width"))
        if self.cfg.scale_embedding:
            # In the dtype of activations, as Gemma was trained: bfloat16 rounds it.
            x = x * jnp.asarray(x.shape[-1] ** 0.5, x.dtype)
        if self.cfg.eoi is not None:
            x = jnp.where((ids == self.cfg.eoi)[:, :, None], self.eoi_embedding, x)
        return dropout(x, self.cfg.dropout, key)

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Float32 logits of hidden states."""
        table = self.head if self.has_head else self.embedding
        return outputs.token_logits(self.cfg, hidden, table, not self.has_head, self.logits_bias)

    def draft_hidden(
        self,
        hidden: Float[Array, "b t d"],
        which: slice,
        since: Int[Array, "b t j"] | None = None,
    ) -> Float[Array, "b t g d"]:
        """Hidden states of draft heads, from which `logits` computes their predictions.

        Sequential heads (hydra) run one at a time: head i = which.start with i + 1 tokens.

        Args:
          hidden: [b t d] hidden states of the model.
          which: the heads to run.
          since: [b t j] tokens after each hidden state; for sequential heads only.
        """
        if not not_none(self.cfg.draft_heads).sequential:
            return self.heads(hidden, which)
        assert since is not None
        rows, length, tokens = since.shape
        flat = jnp.reshape(since, (rows, length * tokens), out_sharding=spec("batch length"))
        embedded = self.embed(flat)
        shape = (rows, length, tokens, embedded.shape[-1])
        placed = spec("batch length whole width")
        return self.heads(hidden, which, jnp.reshape(embedded, shape, out_sharding=placed))

    def losses(
        self,
        hidden: Float[Array, "b t d"],
        targets: Int[Array, "b t"],
        smoothing: float,
        z_loss: float,
    ) -> TokenLosses:
        """Cross-entropy [b t] of targets, without all logits in memory at once.

        Args:
          hidden: [b t d] hidden states.
          targets: [b t] token ids.
          smoothing: label smoothing.
          z_loss: coefficient of the squared log normalizer.
        """
        table = self.embedding if self.cfg.tied else self.head
        rule = outputs.cross_entropy_config(self.cfg, smoothing, z_loss)
        # Its kernels are not those of attention, which may be lacking.
        backend = kernels.select_backend(self.cfg.attention)
        return kernels.cross_entropy(hidden, table, targets, rule, backend, self.logits_bias)

    def pooled(
        self,
        inputs: Int[Array, "b s"],
        segments: Int[Array, "b s"],
        where: Int[Array, "b s"],
        key: jax.Array | None = None,
    ) -> Float[Array, "b r"]:
        """Outputs of `Model.readout` for rows of one text each, float32: its vectors.

        Args:
          inputs: [b s] token ids.
          segments: [b s] 1 for tokens; 0 is padding, on either side.
          where: [b s] positions.
          key: dropout key; None for no dropout.
        """
        key, head_key = split(key, 2)
        states, segments = self.input_states(inputs, segments, where, key), on_rows(segments)
        return self.readout_head(states, segments, jnp.ones_like(segments[:, :1]), head_key)[:, 0]

    @property
    def backend(self) -> kernels.Backend | None:
        """Backend of attention; None for plain XLA."""
        return kernels.select_backend(self.cfg.attention, self.cfg.lacks_kernel)

    def mask(self, queries: Int[Array, "b t"], keys: Int[Array, "b s"], **options):
        """Mask of tokens that share a segment, prepared for the backend.

        Args:
          queries: [b t] segment ids of the queries.
          keys: [b s] segment ids of the keys.
          **options: further fields of `kernels.Mask`, such as causal.
        """
        return kernels.prepare_mask(kernels.Mask(queries, keys, **options), self.backend)

    def decoder_mask(self, segments: Int[Array, "b t"], inside: Bool[Array, "b t"] | None):
        """Mask among a decoder's tokens: causal, unless a layer is not; inside is the prefix."""
        prefix = {"query_prefix": inside, "key_prefix": inside}
        return self.mask(segments, segments, causal=self.cfg.causal_decoder, **prefix)
