# SPDX-License-Identifier: Apache-2.0
"""A Transformer as the Target of the decoding loop: weights, encoded inputs, a filled cache.

b rows    w nodes of a block    s inputs    p prompt tokens    d model width
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from t5x_lite import config, model
from t5x_lite.config.kv_cache import CacheFormat, parse_kv_cache
from t5x_lite.decoding import chunked_prefill, sampling
from t5x_lite.decoding.protocol import LayerRange, Prompts, Target, TargetHeads, Tree
from t5x_lite.model.computation import cast_params, dtype_of_computation
from t5x_lite.utils.not_none import not_none

# Least room for a block in the caches of windowed layers: few drafters need more.
BLOCK_ROOM = 64


def prepare_params(cfg: config.Model, params: Any) -> Any:
    """Converts trained params for decoding: one tree per layer, in the dtype of computation.

    Quantized weights are not converted.
    """
    return model.unstack(cast_params(params, dtype_of_computation(cfg)))


def cache_format(decode: config.Decode, tree: Tree) -> CacheFormat:
    """Returns the form of a model's caches, with room for blocks of that tree.

    Raises:
      ValueError: a block is wider than what is kept token by token.
    """
    form, block = parse_kv_cache(decode.kv_cache), max(BLOCK_ROOM, tree.width)
    if form.segment and block > form.recent:
        raise ValueError(
            f"Decode.kv_cache {decode.kv_cache} keeps {form.recent} recent tokens, and blocks of "
            f"Decode.drafter {decode.drafter} have {block}: keep as many, or set "
            "Decode.draft_length"
        )
    return form._replace(block=block)


def encode_inputs(
    cfg: config.Model,
    params: Any,
    inputs: Int[Array, "b s"],
    length: Int[Array, " b"],
    form: CacheFormat = model.WHOLE,
) -> model.EncoderMemory:
    """Runs the encoder, and projects its output to the keys and values of cross-attention.

    Args:
      cfg: config of the model.
      params: weights from `prepare_params`.
      inputs: encoder tokens, right-padded.
      length: their lengths.
      form: form of keys and values.

    Returns:
      Keys and values of every decoder layer, and which of the inputs exist.
    """
    where = jnp.arange(inputs.shape[1])
    exists = where < length[:, None]
    transformer = model.Transformer(cfg, scan=False)
    encoded = transformer.apply(
        {"params": params},
        inputs,
        exists.astype(jnp.int32),
        jnp.where(exists, where, 0),
        method=model.Transformer.encode,
    )
    cross_kv = transformer.apply({"params": params}, encoded, method=model.Transformer.cross_kv)
    return model.quantize_memory(model.EncoderMemory(cross_kv, exists), form)


def make_target(cfg: config.Model, params: Any, encoded: model.EncoderMemory) -> Target:
    """Returns the loop's view of a model whose inputs are encoded.

    Args:
      cfg: config of the model.
      params: weights from `prepare_params`.
      encoded: the encoded inputs; empty for a model without an encoder.
    """
    transformer = model.Transformer(cfg, scan=False)

    def forward(tokens, index, cache, tree: Tree | None = None):
        block = with_tree(model.TokenBlock(tokens, index), tree)
        return transformer.apply(
            {"params": params}, block, cache, encoded, method=model.Transformer.decode
        )

    def logits(hidden):
        scores = transformer.apply({"params": params}, hidden, method=model.Transformer.logits)
        return sampling.gather_vocabulary(scores)

    return Target(
        forward=forward,
        logits=logits,
        layer_range=functools.partial(layer_range, cfg, params, encoded),
        num_layers=not_none(cfg.decoder).layers,
        vocab=cfg.vocab,
        heads=target_heads(cfg, params),
    )


def target_heads(cfg: config.Model, params: Any) -> TargetHeads | None:
    """Returns the draft heads of a model, or None if it has none."""
    if cfg.draft_heads is None:
        return None

    transformer = model.Transformer(cfg, scan=False)
    apply = functools.partial(
        transformer.apply, {"params": params}, method=model.Transformer.draft_hidden
    )
    return TargetHeads(apply, cfg.draft_heads.count, cfg.draft_heads.sequential)


def layer_range(
    cfg: config.Model, params: Any, encoded: model.EncoderMemory, first: int, last: int
) -> LayerRange:
    """Returns the layers first <= layer < last of the decoder.

    Args:
      cfg: config of the model.
      params: weights from `prepare_params`.
      encoded: the encoded inputs.
      first: the first layer.
      last: the layer after the last one.
    """
    layers = slice(first, last)

    def take_cache(cache):
        return cache[layers]

    transformer = model.Transformer(keep_layers(cfg, first, last), scan=False)
    decoder = params["decoder"] | {"layers": params["decoder"]["layers"][layers]}
    apply = functools.partial(transformer.apply, {"params": params | {"decoder": decoder}})
    cross_kv = None if encoded.cross_kv is None else take_cache(encoded.cross_kv)
    encoded = model.EncoderMemory(cross_kv, encoded.input_mask)

    def embed(tokens, index):
        return apply(model.TokenBlock(tokens, index), method=model.Transformer.embed_block)

    def apply_layers(x, index, cache, tree: Tree | None = None):
        # Of the tokens of a block only the width is used here: x takes their place.
        block = with_tree(model.TokenBlock(jnp.zeros_like(x[:, :, 0], jnp.int32), index), tree)
        return apply(x, block, cache, encoded, method=model.Transformer.decode_layers)

    def final_norm(x):
        return apply(x, method=model.Transformer.final_norm)

    def put_cache(cache, part):
        return (*cache[:first], *part, *cache[last:])

    return LayerRange(embed, apply_layers, final_norm, take_cache, put_cache)


def keep_layers(cfg: config.Model, first: int, last: int) -> config.Model:
    """Returns cfg with only the layers first <= layer < last in its decoder.

    Args:
      cfg: config of the model.
      first: the first layer.
      last: the layer after the last one.
    """
    decoder = not_none(cfg.decoder)
    sliding = decoder.sliding[first:last]
    pattern = tuple("sliding" if each else "full" for each in sliding)
    window = decoder.window if any(sliding) else None
    changes = {"layers": last - first, "pattern": pattern, "window": window, "causal": None}
    decoder = dataclasses.replace(decoder, **changes)
    return dataclasses.replace(cfg, decoder=decoder)


def with_tree(block: model.TokenBlock, tree: Tree | None) -> model.TokenBlock:
    """Adds the depths and the mask of a tree to a block; a block without them is a chain."""
    if tree is None or tree.is_chain:
        return block
    return block._replace(depth=jnp.array(tree.depth), ancestors=jnp.asarray(tree.ancestors))


def prefill(
    cfg: config.Model,
    params: Any,
    encoded: model.EncoderMemory,
    prompts: Prompts,
    slots: int,
    form: CacheFormat = model.WHOLE,
) -> tuple[model.CacheStore, ...]:
    """Fills a new cache with the prompts, in one pass, or chunk by chunk if they are long.

    Slots of the padding are overwritten before they are read. The last token of a prompt is written
    too, because in a prefix-LM those before it attend to it; the loop writes the same again.

    Args:
      cfg: config of the model.
      params: weights from `prepare_params`.
      encoded: the encoded inputs.
      prompts: tokens [b p] and their lengths.
      slots: slots per row of the cache.
      form: form of keys and values.

    Returns:
      The cache.
    """
    rows, length = prompts.tokens.shape
    stores = model.empty_cache(cfg, rows, slots, scan=False, form=form)
    if length == 1:
        return stores
    start = jnp.zeros_like(prompts.length)
    # In a cache of the prompts' size: queries would attend to every empty slot of the whole one.
    whole = form._replace(block=0)
    if length > chunked_prefill.CHUNK and not cfg.prefix_lm:
        filled = chunked_prefill.fill_cache(cfg, params, encoded, *prompts, form=whole)
    else:
        _, filled = model.Transformer(cfg, scan=False).apply(
            {"params": params},
            model.TokenBlock(prompts.tokens, start, prefix=prompts.length),
            model.empty_cache(cfg, rows, length, scan=False, form=whole),
            encoded,
            method=model.Transformer.decode,
        )
    pairs = zip(stores, filled, strict=True)
    return tuple(store.load(read, prompts.length) for store, read in pairs)
