# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoder, decoder-only and encoder-only transformers.

One alphabet, here and in every kernel and test:
  b batch    t query position    s key position    w width of a decoded block    d model width
  n heads    k key heads         g heads per key head     h head size
  f mlp width   v vocabulary     (in relative positions: k buckets)
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from t5x_lite import config
from t5x_lite.batch import Batch
from t5x_lite.model import pooling
from t5x_lite.model.attention import View
from t5x_lite.model.cache import Block, Cache, Read
from t5x_lite.model.layers import dropout, split, weight
from t5x_lite.model.tower import Tower
from t5x_lite.sharding import spec

NOTHING = Read()


class Transformer(nn.Module):
    """The model that `cfg` describes; every method is pure: caches and keys go in and come out.

    scan False wants weights from `unstack`, unrolls the layers and is what decoding uses.
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
        embed = (cfg.decoder or cfg.encoder).embed
        sizes = {"vocab": cfg.vocab, "embed": embed, "norm": embed}
        if cfg.encoder:
            sizes |= {"encoder_embed": cfg.encoder.embed}
        return sizes | ({"projected": cfg.pooling.project} if cfg.pooling else {})

    def setup(self):
        cfg = self.cfg
        how = {"scan": self.scan, "remat": self.remat, "unroll": self.unroll}
        table = {"std": cfg.embedding_std}
        self.embedding = weight(self, "embedding", "-> vocab embed", **table)
        if cfg.separate_embeddings:
            self.encoder_embedding = weight(
                self, "encoder_embedding", "-> vocab encoder_embed", **table
            )
        if cfg.eoi is not None:
            self.eoi_embedding = weight(self, "eoi_embedding", "norm", 0.0)
        if not cfg.tied:
            self.head = weight(self, "head", "embed -> vocab")
        if cfg.pooling and cfg.pooling.project:
            self.projection = weight(self, "projection", "embed -> projected")
        if cfg.encoder:
            self.encoder = Tower(cfg, cfg.encoder, both_sides=True, **how)
        if cfg.decoder:
            source = cfg.encoder.embed if cfg.encoder else None
            self.decoder = Tower(cfg, cfg.decoder, source=source, **how)

    def __call__(self, batch: Batch, key=None) -> Float[Array, "b t v"]:
        """The logits of every target, each seeing only the targets before it."""
        return self.logits(self.hidden(batch, key))

    def hidden(self, batch: Batch, key=None) -> Float[Array, "b t d"]:
        """What the logits are read from, for every target of batch."""
        reader, writer = split(key, 2)
        if self.cfg.layout == "aligned":
            return self.encode(batch.inputs, batch.input_segments, batch.input_positions, reader)
        segments, where = batch.target_segments, batch.target_positions
        encoded, seen = None, None
        if self.cfg.layout == "pair":
            encoded = self.encode(batch.inputs, batch.input_segments, batch.input_positions, reader)
            seen = same(segments, batch.input_segments)
        tokens = shift_right(batch.targets, where, self.cfg.start)
        view = View(where, where, self.causal(batch), encoded=encoded, seen=seen)
        embedder, writer = split(writer, 2)
        return self.decoder(self.embed(tokens, embedder), view, writer)

    def encode(self, inputs, segments, where, key=None) -> Float[Array, "b s d"]:
        """The encoder's output for inputs [b s]; segment 0 is padding, seen by nobody."""
        embedder, key = split(key, 2)
        view = View(where, where, same(segments, segments))
        return self.encoder(self.embed(inputs, embedder, reader=True), view, key)

    def crossed(self, encoded: Float[Array, "b s d"]) -> Cache:
        """Every decoder layer's cross-attention keys and values."""
        return self.decoder.crossed(encoded)

    def decode(
        self, block: Block, cache: Cache, read: Read = NOTHING
    ) -> tuple[Float[Array, "b w d"], Cache]:
        """Hidden states of a block of tokens, and the cache with the block written into it."""
        block, read = on_rows(block), read._replace(seen=on_rows(read.seen))
        slots = (cache.keys if self.scan else cache.keys[0]).shape[-2]
        depth = jnp.arange(block.tokens.shape[1]) if block.depth is None else block.depth
        where = block.index[:, None] + depth
        mask, stand = block_mask(block.index, depth, block.ancestors, slots)
        if block.prefix is not None and self.cfg.prefix_lm:
            inside = jnp.arange(slots) < block.prefix[:, None]
            mask = mask | (inside[:, None, :] & (where < block.prefix[:, None])[:, :, None])
        seen = None if read.seen is None else read.seen[:, None, :]
        view = View(where, stand, mask, seen=seen, index=block.index)
        return self.decoder.decode(self.embed(block.tokens), view, cache, read.crossed)

    def embed(self, ids: Int[Array, "b t"], key=None, reader=False) -> Float[Array, "b t d"]:
        """What the decoder, or as reader the encoder, has for each id."""
        separate = reader and self.cfg.separate_embeddings
        table = self.encoder_embedding if separate else self.embedding
        x = table.at[ids].get(out_sharding=spec("batch length width"))
        if self.cfg.scale_embedding:
            # In the dtype of activations, as Gemma was trained: bfloat16 rounds it.
            x = x * jnp.asarray(x.shape[-1] ** 0.5, x.dtype)
        if self.cfg.eoi is not None:
            x = jnp.where((ids == self.cfg.eoi)[:, :, None], self.eoi_embedding, x)
        return dropout(x, self.cfg.dropout, key)

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Float32 logits."""
        if self.cfg.scale_logits:
            hidden = hidden * hidden.shape[-1] ** -0.5
        if self.cfg.tied:
            logits = jnp.einsum("btd,vd->btv", hidden, self.embedding)
        else:
            logits = jnp.einsum("btd,dv->btv", hidden, self.head)
        logits = logits.astype(jnp.float32)
        cap = self.cfg.logits_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def pooled(self, inputs, segments, where) -> Float[Array, "b d"]:
        """One float32 vector for each row of inputs [b s]; segment 0 is padding, on either side.

        Of the encoder's output, or a lone decoder's; `Model.pooling` says how.
        """
        if self.cfg.encoder:
            x = self.encode(inputs, segments, where)
        else:
            past = where[:, None, :] <= where[:, :, None]
            view = View(where, where, past & same(segments, segments))
            x = self.decoder(self.embed(inputs), view)
        x = pooling.pool(x, segments > 0, self.cfg.pooling.kind)
        if self.cfg.pooling.project:
            x = jnp.einsum("bd,dp->bp", x, self.projection.astype(jnp.float32))
        return pooling.normalized(x) if self.cfg.pooling.normalize else x

    def causal(self, batch: Batch) -> Bool[Array, "b t t"]:
        """Who sees whom among the targets: the past of the same segment, and a prefix whole."""
        length = batch.targets.shape[1]
        past = jnp.arange(length)[None, :] <= jnp.arange(length)[:, None]
        if batch.prefix is not None and self.cfg.prefix_lm:
            # The decoder's input at i is the target before it: the first target's query is still
            # a token of the prefix, and so is the start token.
            begins = batch.target_positions == 0
            inside = begins | jnp.pad(batch.prefix[:, :-1], ((0, 0), (1, 0)))
            past = past | (inside[:, :, None] & inside[:, None, :])
        return past & same(batch.target_segments, batch.target_segments)


def same(queries: Int[Array, "b t"], keys: Int[Array, "b s"]) -> Bool[Array, "b t s"]:
    """Pairs of one segment; padding (segment 0) is seen by nobody."""
    return (queries[:, :, None] == keys[:, None, :]) & (keys > 0)[:, None, :]


def shift_right(
    targets: Int[Array, "b t"], where: Int[Array, "b t"], start: int
) -> Int[Array, "b t"]:
    """Decoder inputs: the target before, and start where an example begins."""
    return jnp.where(where == 0, start, jnp.pad(targets[:, :-1], ((0, 0), (1, 0))))


def on_rows(rows):
    """rows [b ...] placed with the batch, wherever the caller made them; a Block keeps its shape
    (depth, ancestors), which no row owns.
    """
    if rows is None:
        return None
    if isinstance(rows, Block):
        fields = ("tokens", "index", "prefix")
        return rows._replace(**{name: on_rows(getattr(rows, name)) for name in fields})
    return jax.reshard(rows, spec("batch" + " length" * (rows.ndim - 1)))


def block_mask(index, depth, ancestors, slots: int):
    """What a block sees [b w s], and the positions [b s] at which the slots of the cache stand."""
    slot = jnp.arange(slots)[None, :]
    offset = slot - index[:, None]
    if ancestors is None:
        return offset[:, None, :] <= jnp.arange(depth.shape[0])[:, None], slot
    inside = (offset >= 0) & (offset < depth.shape[0])
    offset = jnp.clip(offset, 0, depth.shape[0] - 1)
    within = ancestors.T.at[offset].get(out_sharding=spec("batch length length"))
    mask = (slot < index[:, None])[:, None, :] | (inside[:, None, :] & jnp.swapaxes(within, 1, 2))
    deep = depth.at[offset].get(out_sharding=spec("batch length"))
    return mask, jnp.where(inside, index[:, None] + deep, slot)
