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
from jaxtyping import Array, Float, Int

from t5x_lite import config, kernels
from t5x_lite.batch import Batch
from t5x_lite.kernels import TokenLosses
from t5x_lite.model import pooling
from t5x_lite.model.attention import View
from t5x_lite.model.cache import Block, Cache, Read
from t5x_lite.model.heads import Heads
from t5x_lite.model.layers import dropout, gathered, split, stored, weight
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
        self.embedding = stored(self, "embedding", "-> vocab embed", **table)
        if cfg.separate_embeddings:
            self.encoder_embedding = weight(
                self, "encoder_embedding", "-> vocab encoder_embed", **table
            )
        if cfg.eoi is not None:
            self.eoi_embedding = weight(self, "eoi_embedding", "norm", 0.0)
        if not cfg.tied:
            self.head = stored(self, "head", "embed -> vocab")
        if cfg.pooling and cfg.pooling.project:
            self.projection = weight(self, "projection", "embed -> projected")
        if cfg.encoder:
            self.encoder = Tower(cfg, cfg.encoder, both_sides=True, **how)
        if cfg.decoder:
            source = cfg.encoder.embed if cfg.encoder else None
            self.decoder = Tower(cfg, cfg.decoder, source=source, **how)
        if cfg.blockwise:
            self.heads = Heads(cfg)

    def __call__(self, batch: Batch, key=None) -> Float[Array, "b t v"]:
        """The logits of every target, each seeing only the targets before it."""
        hidden = self.hidden(batch, key)
        if self.is_initializing() and self.cfg.blockwise:
            self.guess(hidden, slice(0, 1), batch.targets[:, :, None])
        return self.logits(hidden)

    def hidden(self, batch: Batch, key=None) -> Float[Array, "b t d"]:
        """What the logits are read from, for every target of batch."""
        if self.cfg.layout == "aligned":
            reader, _ = split(key, 2)
            return self.encode(batch.inputs, batch.input_segments, batch.input_positions, reader)
        return self.decoder(*self.written(batch, key))

    def skipping(
        self, batch: Batch, key, rates: Float[Array, " l"]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "l b t d"]]:
        """`hidden`, with rows that skip layers of the decoder as often as rates say; and what each
        of them gave, of which `finish` makes what logits are read from.
        """
        return self.decoder.skipping(*self.written(batch, key), rates)

    def written(self, batch: Batch, key) -> tuple[Float[Array, "b t d"], View, jax.Array | None]:
        """What the decoder is given for the targets of batch, and the key that is left for it."""
        reader, writer = split(key, 2)
        segments, where = on_rows(batch.target_segments), on_rows(batch.target_positions)
        encoded, seen = None, None
        if self.cfg.layout == "pair":
            encoded = self.encode(batch.inputs, batch.input_segments, batch.input_positions, reader)
            seen = self.sight(segments, on_rows(batch.input_segments))
        tokens = on_rows(shift_right(batch.targets, batch.target_positions, self.cfg.start))
        view = View(where, self.causal(batch), encoded=encoded, seen=seen, how=self.how)
        embedder, writer = split(writer, 2)
        return self.embed(tokens, embedder), view, writer

    def encode(self, inputs, segments, where, key=None) -> Float[Array, "b s d"]:
        """The encoder's output for inputs [b s]; segment 0 is padding, seen by nobody."""
        embedder, key = split(key, 2)
        inputs, segments, where = map(on_rows, (inputs, segments, where))
        view = View(where, self.sight(segments, segments), how=self.how)
        return self.encoder(self.embed(inputs, embedder, reader=True), view, key)

    def crossed(self, encoded: Float[Array, "b s d"]) -> Cache:
        """Every decoder layer's cross-attention keys and values."""
        return self.decoder.crossed(encoded)

    def decode(
        self, block: Block, cache: Cache, read: Read = NOTHING
    ) -> tuple[Float[Array, "b w d"], Cache]:
        """Hidden states of a block of tokens, and the cache with the block written into it."""
        view = self.view(block, cache, read)
        return self.decoder.decode(self.embed(on_rows(block).tokens), view, cache, read.crossed)

    def begin(self, block: Block) -> Float[Array, "b w d"]:
        """What the first layer of the decoder is given for a block."""
        block = on_rows(block)
        depth = jnp.arange(block.tokens.shape[1]) if block.depth is None else block.depth
        return self.decoder.standing(self.embed(block.tokens), block.index[:, None] + depth)

    def through(
        self, x: Float[Array, "b w d"], block: Block, cache: Cache, read: Read = NOTHING
    ) -> tuple[Float[Array, "b w d"], Cache]:
        """x in place of the block's tokens through the layers alone; with `begin` before it and
        `finish` after it this is `decode`.
        """
        return self.decoder.through(x, self.view(block, cache, read), cache, read.crossed)

    def finish(self, x: Float[Array, "b w d"]) -> Float[Array, "b w d"]:
        """What the logits are read from, for what the last layer gave."""
        return self.decoder.norm(x)

    def view(self, block: Block, cache: Cache, read: Read) -> View:
        """What the tokens of a block see of the cache and of the inputs."""
        block, seen = on_rows(block), on_rows(read.seen)
        slots = (cache.keys if self.scan else cache.keys[0]).shape[-2]
        prefix = block.prefix if self.cfg.prefix_lm else None
        width = block.tokens.shape[1]
        sight = kernels.BlockSight(
            block.index, width, slots, block.depth, block.ancestors, prefix=prefix
        )
        if seen is not None:
            seen = kernels.prepared(seen, self.how)
        where, sight = sight.query_positions(), kernels.prepared(sight, self.how)
        return View(where, sight, seen=seen, index=block.index, how=self.how)

    def embed(self, ids: Int[Array, "b t"], key=None, reader=False) -> Float[Array, "b t d"]:
        """What the decoder, or as reader the encoder, has for each id."""
        separate = reader and self.cfg.separate_embeddings
        table = self.encoder_embedding if separate else gathered(self.embedding, "vocab embed")
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
        axes = "vocab embed" if self.cfg.tied else "embed vocab"
        table = gathered(self.embedding if self.cfg.tied else self.head, axes)
        if self.cfg.tied and kernels.device()[0] == "cpu":
            # The table first, as XLA's CPU would otherwise pack all of it anew for a few rows: 8
            # rows of T5-base take 9.7 ms of one core for 17.4, 64 rows 43 for 50 (jaxlib 0.10.2).
            logits = jnp.moveaxis(jnp.einsum("vd,btd->vbt", table, hidden), 0, 2)
        elif self.cfg.tied:
            logits = jnp.einsum("btd,vd->btv", hidden, table)
        else:
            logits = jnp.einsum("btd,dv->btv", hidden, table)
        logits = logits.astype(jnp.float32)
        cap = self.cfg.logits_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def guess(
        self,
        hidden: Float[Array, "b t d"],
        which: slice,
        since: Int[Array, "b t j"] | None = None,
    ) -> Float[Array, "b t g d"]:
        """What the logits of these heads are read from. Heads that are told the tokens since
        hidden are asked for one at a time: head i = which.start with i + 1 of them.
        """
        if not self.cfg.blockwise.sequential:
            return self.heads(hidden, which)
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
        """The losses [b t] of targets, each read from its hidden; logits are made in pieces."""
        cfg = self.cfg
        scale = self.sizes["embed"] ** -0.5 if cfg.scale_logits else 1.0
        rule = kernels.VocabularyRule(cfg.tied, smoothing, z_loss, cfg.logits_softcap, scale)
        table = self.embedding if cfg.tied else self.head
        return kernels.cross_entropy(hidden, table, targets, rule, self.how)

    def pooled(self, inputs, segments, where) -> Float[Array, "b d"]:
        """One float32 vector for each row of inputs [b s]; segment 0 is padding, on either side.

        Of the encoder's output, or a lone decoder's; `Model.pooling` says how.
        """
        if self.cfg.encoder:
            x = self.encode(inputs, segments, where)
        else:
            view = View(where, self.sight(segments, segments, causal=True), how=self.how)
            x = self.decoder(self.embed(inputs), view)
        x = pooling.pool(x, segments > 0, self.cfg.pooling.kind)
        if self.cfg.pooling.project:
            x = jnp.einsum("bd,dp->bp", x, self.projection.astype(jnp.float32))
        return pooling.normalized(x) if self.cfg.pooling.normalize else x

    @property
    def how(self) -> kernels.How | None:
        return kernels.chosen(self.cfg.attention)

    def sight(self, queries: Int[Array, "b t"], keys: Int[Array, "b s"], **more):
        """What queries see of keys, both given by their segments, ready for the kernel."""
        return kernels.prepared(kernels.Sight(queries, keys, **more), self.how)

    def causal(self, batch: Batch):
        """Who sees whom among the targets: the past of the same segment, and a prefix whole."""
        inside = None
        if batch.prefix is not None and self.cfg.prefix_lm:
            # The decoder's input at i is the target before it: the first target's query is still
            # a token of the prefix, and so is the start token.
            begins = batch.target_positions == 0
            inside = on_rows(begins | jnp.pad(batch.prefix[:, :-1], ((0, 0), (1, 0))))
        segments = on_rows(batch.target_segments)
        prefix = {"query_prefix": inside, "key_prefix": inside}
        return self.sight(segments, segments, causal=True, **prefix)


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
