# SPDX-License-Identifier: Apache-2.0
"""A Transformer made ready to decode: weights unstacked, inputs read once, the cache filled."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from t5x_lite import config, model, quantization
from t5x_lite.decoding import sampling
from t5x_lite.decoding.protocol import Heads, Part, Prompts, Target, Tree


def precise(cfg: config.Model) -> config.Model:
    """cfg with float32 activations on a CPU, where XLA runs bfloat16 5 to 20 times slower."""
    on_cpu = jax.default_backend() == "cpu"
    return dataclasses.replace(cfg, activations="float32") if on_cpu else cfg


def prepare(cfg: config.Model, params: Any) -> Any:
    """Trained params as decoding reads them: one tree per layer, in the dtype of activations.

    Quantised weights stay what they are.
    """
    dtype = precise(cfg).activations
    cast = lambda weight: weight if quantization.few(weight) else jnp.asarray(weight, dtype)
    return model.unstack(jax.tree.map(cast, params, is_leaf=quantization.few))


def read(
    cfg: config.Model, params: Any, inputs: Int[Array, "b s"], length: Int[Array, " b"]
) -> model.Read:
    """The inputs, of which the first length[b] of row b exist, through the encoder, once."""
    where = jnp.arange(inputs.shape[1])
    seen = where < length[:, None]
    transformer = model.Transformer(cfg, scan=False)
    encoded = transformer.apply(
        {"params": params},
        inputs,
        seen.astype(jnp.int32),
        jnp.where(seen, where, 0),
        method="encode",
    )
    return model.Read(transformer.apply({"params": params}, encoded, method="crossed"), seen)


def of(cfg: config.Model, params: Any, read: model.Read) -> Target:
    """The loop's view of a model that has read its inputs."""
    transformer = model.Transformer(cfg, scan=False)

    def forward(tokens, index, cache, tree: Tree | None = None):
        block = shaped(model.Block(tokens, index), tree)
        return transformer.apply({"params": params}, block, cache, read, method="decode")

    def logits(hidden):
        return sampling.whole(transformer.apply({"params": params}, hidden, method="logits"))

    part = functools.partial(part_of, cfg, params, read)
    return Target(forward, logits, part, cfg.decoder.layers, heads_of(cfg, params))


def heads_of(cfg: config.Model, params: Any) -> Heads | None:
    """The heads of a model, if it has any."""
    if cfg.blockwise is None:
        return None

    transformer = model.Transformer(cfg, scan=False)
    guess = functools.partial(transformer.apply, {"params": params}, method="guess")
    return Heads(guess, cfg.blockwise.count, cfg.blockwise.sequential)


def part_of(cfg: config.Model, params: Any, read: model.Read, first: int, last: int) -> Part:
    """The layers first <= layer < last of the decoder, as a Part."""
    own = slice(first, last)
    of = lambda cache: model.Cache(cache.keys[own], cache.values[own])
    transformer = model.Transformer(between(cfg, first, last), scan=False)
    decoder = params["decoder"] | {"layers": params["decoder"]["layers"][own]}
    apply = functools.partial(transformer.apply, {"params": params | {"decoder": decoder}})
    seen = model.Read(None if read.crossed is None else of(read.crossed), read.seen)

    def begin(tokens, index):
        return apply(model.Block(tokens, index), method="begin")

    def through(x, index, cache, tree: Tree | None = None):
        # Only the width of the tokens is looked at: x stands in their place.
        block = shaped(model.Block(jnp.zeros_like(x[:, :, 0], jnp.int32), index), tree)
        return apply(x, block, cache, seen, method="through")

    def joined(cache, part):
        put = lambda whole, part: (*whole[:first], *part, *whole[last:])
        return model.Cache(put(cache.keys, part.keys), put(cache.values, part.values))

    finish = lambda x: apply(x, method="finish")
    return Part(begin, through, finish, of, joined)


def between(cfg: config.Model, first: int, last: int) -> config.Model:
    """cfg with only the layers first <= layer < last in its decoder."""
    sliding = cfg.decoder.sliding[first:last]
    pattern = tuple("sliding" if each else "full" for each in sliding)
    window = cfg.decoder.window if any(sliding) else None
    decoder = dataclasses.replace(cfg.decoder, layers=last - first, pattern=pattern, window=window)
    return dataclasses.replace(cfg, decoder=decoder)


def shaped(block: model.Block, tree: Tree | None) -> model.Block:
    """block in the shape of tree; a chain is what it is anyway."""
    if tree is None or tree.is_chain:
        return block
    return block._replace(depth=jnp.array(tree.depth), ancestors=tree.ancestors)


def prefill(
    cfg: config.Model, params: Any, read: model.Read, prompts: Prompts, slots: int
) -> model.Cache:
    """A cache of `slots` slots per row that holds the prompts, written in one pass.

    Slots of the padding hold what nobody sees before it is overwritten. The last token of a prompt
    is written too, because in a prefix-LM those before it see it; the loop writes the same again.
    """
    rows, length = prompts.tokens.shape
    empty = functools.partial(model.empty_cache, cfg, rows, scan=False)
    if length == 1:
        return empty(slots)
    start = jnp.zeros_like(prompts.length)
    # Over a cache of the prompts alone: queries would be put to every slot that is still empty.
    _, filled = model.Transformer(cfg, scan=False).apply(
        {"params": params},
        model.Block(prompts.tokens, start, prefix=prompts.length),
        empty(length),
        read,
        method="decode",
    )
    put = lambda whole, own: model.write_rows(whole, own, start)
    return jax.tree.map(put, empty(slots), filled)
