# SPDX-License-Identifier: Apache-2.0
"""A Transformer made ready to decode: weights unstacked, inputs read once, the cache filled."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from t5x_lite import config, model
from t5x_lite.decoding import sampling
from t5x_lite.decoding.loop import Target


class Prompts(NamedTuple):
    """Decoder tokens that are given, beginning with Model.start; right-padded."""

    tokens: Int[Array, "b p"]
    length: Int[Array, " b"]


def precise(cfg: config.Model) -> config.Model:
    """cfg with float32 activations on a CPU, where XLA runs bfloat16 5 to 20 times slower."""
    on_cpu = jax.default_backend() == "cpu"
    return dataclasses.replace(cfg, activations="float32") if on_cpu else cfg


def prepare(cfg: config.Model, params: Any) -> Any:
    """Trained params as decoding reads them: one tree per layer, in the dtype of activations."""
    dtype = precise(cfg).activations
    return model.unstack(jax.tree.map(lambda weight: jnp.asarray(weight, dtype), params))


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

    def forward(tokens, index, cache):
        return transformer.apply(
            {"params": params}, model.Block(tokens, index), cache, read, method="decode"
        )

    def logits(hidden):
        return sampling.whole(transformer.apply({"params": params}, hidden, method="logits"))

    return Target(forward, logits)


def prefill(
    cfg: config.Model, params: Any, read: model.Read, prompts: Prompts, slots: int
) -> model.Cache:
    """A cache of `slots` slots per row that holds the prompts, written in one pass.

    Slots of the padding hold what nobody sees before it is overwritten. The last token of a prompt
    is written too, because in a prefix-LM those before it see it; the loop writes the same again.
    """
    rows, length = prompts.tokens.shape
    cache = model.empty_cache(cfg, rows, slots, scan=False)
    if length == 1:
        return cache
    start = jnp.zeros_like(prompts.length)
    _, cache = model.Transformer(cfg, scan=False).apply(
        {"params": params},
        model.Block(prompts.tokens, start, prefix=prompts.length),
        cache,
        read,
        method="decode",
    )
    return cache
