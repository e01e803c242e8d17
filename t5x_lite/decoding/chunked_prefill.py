# SPDX-License-Identifier: Apache-2.0
"""Chunked prefill: a long prompt fills its cache a chunk of tokens at a time.

The queries of a chunk attend to its own slots and those before it: attention holds the scores of a
chunk, however long the prompt is. A prefix-LM reads its prompts in both directions, and whole.

b rows    p prompt tokens    c tokens of a chunk    w slots of the cache that is filled
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from t5x_lite import config, model, sharding
from t5x_lite.config.kv_cache import CacheFormat

# Tokens of a chunk where one program reads the whole prompt: products with weights are as fast as
# at any width, and the scores of 8,192 slots take 16 MB a head.
CHUNK = 512
# A store for each layer, with a slot for every token: of a format without a block.
WholeRows = tuple[Any, ...]


def fill_cache(
    cfg: config.Model,
    params: Any,
    encoded: model.EncoderMemory,
    tokens: Int[Array, "b p"],
    length: Int[Array, " b"],
    chunk: int = CHUNK,
    form: CacheFormat = model.WHOLE,
) -> WholeRows:
    """Fills a cache of p slots with prompts, up to the last chunk that has a token.

    Args:
      cfg: config of the model.
      params: weights from `target.prepare_params`.
      encoded: the encoded inputs.
      tokens: the prompts, right-padded.
      length: their lengths.
      chunk: c.
      form: form of keys and values, without a block.

    Returns:
      The cache. Slots of the padding are zeros, or overwritten before they are read.
    """
    rows, size = tokens.shape
    count = -(-size // chunk)
    padded = jnp.pad(tokens, ((0, 0), (0, count * chunk - size)))
    last = (jnp.max(length) + chunk - 1) // chunk

    def read(number: Array, cache: WholeRows) -> WholeRows:
        index = jnp.zeros_like(length) + number * chunk
        block = jax.lax.dynamic_slice_in_dim(padded, number * chunk, chunk, axis=1)
        return decode_block(cfg, params, encoded, block, index, cache)

    empty = model.empty_cache(cfg, rows, count * chunk, scan=False, form=form)
    return resize_cache(jax.lax.fori_loop(0, last, read, empty), size)


def decode_block(
    cfg: config.Model,
    params: Any,
    encoded: model.EncoderMemory,
    tokens: Int[Array, "b c"],
    index: Int[Array, " b"],
    cache: WholeRows,
) -> WholeRows:
    """Returns the cache with the keys and values of a block of prompt tokens.

    Args:
      cfg: config of the model.
      params: weights from `target.prepare_params`.
      encoded: the encoded inputs.
      tokens: the block.
      index: slot of the first token of each row.
      cache: the cache, all slots before index filled.
    """
    _, cache = model.Transformer(cfg, scan=False).apply(
        {"params": params},
        model.TokenBlock(tokens, index),
        cache,
        encoded,
        method=model.Transformer.decode,
    )
    return cache


def resize_cache(cache: WholeRows, slots: int) -> WholeRows:
    """Returns a cache of `slots` slots: the first ones, or all and zeros after them."""

    def resize(each: Array) -> Array:
        added = max(slots - each.shape[2], 0)
        return jnp.pad(each[:, :, :slots], ((0, 0), (0, 0), (0, added), (0, 0)))

    return jax.tree.map(resize, cache)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def start_cache(cfg: config.Model, slots: int, form: CacheFormat = model.WHOLE) -> WholeRows:
    """Returns an empty cache for one prompt: a row for each shard of the batch, all alike.

    Args:
      cfg: config of the model.
      slots: w.
      form: form of keys and values.
    """
    rows = sharding.batch_shards()
    return model.empty_cache(cfg, rows, slots, scan=False, form=form._replace(block=0))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def read_chunk(
    cfg: config.Model,
    params: Any,
    cache: WholeRows,
    tokens: Int[Array, "b c"],
    index: Int[Array, " b"],
) -> tuple[WholeRows, WholeRows]:
    """Reads one chunk of a prompt of a lone decoder.

    Args:
      cfg: config of the model.
      params: weights from `target.prepare_params`.
      cache: w slots, those before the chunk filled; donated.
      tokens: the chunk.
      index: slot of its first token.

    Returns:
      The cache with the chunk, and the c slots of the chunk alone.
    """
    tokens, index = sharding.by_rows((tokens, index))
    cache = decode_block(cfg, params, model.EncoderMemory(), tokens, index, cache)

    def take(slots: Array, start: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(slots, start, tokens.shape[1], axis=1)

    return cache, jax.tree.map(lambda each: jax.vmap(take)(each, index), cache)


@functools.partial(jax.jit, donate_argnums=0)
def put_chunk(cache: WholeRows, chunk: WholeRows, index: Int[Array, " b"]) -> WholeRows:
    """Returns a cache with the slots of a chunk that was read before.

    Args:
      cache: w slots; donated.
      chunk: c slots, from `read_chunk`.
      index: slot of the first of them.
    """
    index = sharding.by_rows(index)

    def put(slots: Array, new: Array, start: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(slots, new, start, axis=1)

    return jax.tree.map(lambda each, new: jax.vmap(put)(each, new, index), cache, chunk)


# Jitted for the host: one call for the arrays of all layers.
widen_cache = jax.jit(resize_cache, static_argnums=1)
