# SPDX-License-Identifier: Apache-2.0
"""One text read by a model with everything kept that analysis looks at: ids in, numpy out."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from t5x_lite import config, decoding, model, sharding
from t5x_lite.decoding import generation, sampling
from t5x_lite.decoding.request import check_ids, prompt

# How attention is shared grows with the square of a text: beyond this many bytes a shorter text, or
# a smaller model, shows the same.
MOST_BYTES = 1 << 31


class Text(NamedTuple):
    """What is looked into: the encoder's inputs (none for a lone decoder), the decoder's own tokens
    of which the first `prompt` were given to it, and what it wrote."""

    inputs: list[int]
    tokens: list[int]
    prompt: int

    @property
    def written(self) -> list[int]:
        return self.tokens[self.prompt :]

    @property
    def read(self) -> list[int]:
        """The tokens that something is written after: all but the last."""
        return self.tokens[:-1]


class Guesses(NamedTuple):
    """What is thought to come next, best first, and of what did: all [... t] over the written.

    ids and log_probability [... t k] are the best k tokens; rank is 0 where the one that came was
    thought the most probable.
    """

    ids: np.ndarray
    log_probability: np.ndarray
    rank: np.ndarray
    log_probability_of_written: np.ndarray


class Reading(NamedTuple):
    """guesses of every layer, [layers + 1 t ...]: the last are the model's own. The rest as in
    `model.Inside`, of the one text: [layers n t s]."""

    guesses: Guesses
    decoder: np.ndarray
    cross: np.ndarray | None
    encoder: np.ndarray | None


def text_of(cfg: config.Model, example: Sequence[int], written: Sequence[int]) -> Text:
    """example, ids for the encoder or the prompt of a lone decoder, with what is written after it.

    Raises:
      ValueError: there is no decoder, nothing is written, or ids are outside of the vocabulary.
    """
    if cfg.decoder is None:
        raise ValueError("An encoder alone writes nothing to explain: the model needs a decoder")
    check_ids(cfg, "Input", [example], empty=cfg.encoder is None)
    check_ids(cfg, "Target", [written])
    before = [cfg.start] if cfg.encoder else prompt(cfg, example)
    inputs = [*example] if cfg.encoder else []
    text = Text(inputs, [*before, *written], len(before))
    most = cfg.decoder.max_length
    if most is not None and len(text.read) > most:
        raise ValueError(
            f"The text has {len(text.read)} tokens, but the model {most} positions "
            "(Stack.max_length): give it a shorter one"
        )
    check_size(cfg, text)
    return text


def check_size(cfg: config.Model, text: Text) -> None:
    """Raises ValueError for a text whose attention would not fit."""
    t, s = decoding.bucket(len(text.read)), decoding.bucket(len(text.inputs))
    pairs = cfg.decoder.layers * cfg.decoder.heads * t * (t + s)
    if cfg.encoder:
        pairs += cfg.encoder.layers * cfg.encoder.heads * s * s
    # One copy on the device, one on the host.
    if 8 * pairs > MOST_BYTES:
        raise ValueError(
            f"How this model shares its attention over {len(text.inputs) + len(text.read)} tokens "
            f"takes {8 * pairs / 1e9:.1f} GB: explain at most "
            f"{int((t + s) * (MOST_BYTES / 8 / pairs) ** 0.5)} tokens at once"
        )


def given(text: Text, rows: int) -> model.Given:
    """text in each of `rows` rows: the mesh wants as many, one is looked at."""
    repeat = lambda ids: decoding.pad([ids] * rows, decoding.bucket(len(ids)))
    made = model.Given(*repeat(text.read), np.full(rows, text.prompt, np.int32))
    return made._replace(**dict(zip(("inputs", "inputs_length"), repeat(text.inputs), strict=True)))


def read(cfg: config.Model, params: Any, text: Text, top: int) -> Reading:
    """text as the model reads it, with its best `top` guesses; params come from
    `decoding.prepare`."""
    if not 1 <= top <= cfg.vocab:
        raise ValueError(f"top must be in 1..{cfg.vocab}, the vocabulary; got {top}")
    cfg = decoding.precise(cfg)
    placed = placed_for(cfg, text)
    inside = compiled(cfg, params, placed)
    wanted = jnp.asarray(decoding.pad([text.tokens[1:]], placed.tokens.shape[1])[0][0])
    guesses = jax.device_get(guessed(cfg, top, params, inside.states, wanted))
    cut = slice(text.prompt - 1, len(text.read))
    guesses = Guesses(*(each[:, cut] for each in guesses))
    t, s = len(text.read), len(text.inputs)
    part = lambda shares, rows, columns: (
        None if shares is None else np.asarray(shares[:, :, :rows, :columns], np.float32)
    )
    shares = jax.device_get(inside._replace(states=None))
    return Reading(
        guesses,
        part(shares.decoder, t, t),
        part(shares.cross, t, s),
        part(shares.encoder, s, s),
    )


def placed_for(cfg: config.Model, text: Text) -> model.Given:
    rows = given(text, sharding.batch_shards())
    if cfg.encoder is None:
        rows = rows._replace(inputs=None, inputs_length=None)
    return generation.place(rows)


@functools.partial(jax.jit, static_argnums=0)
def compiled(cfg: config.Model, params: Any, placed: model.Given) -> model.Inside:
    """What happens inside over the first row, whole on every device."""
    transformer = model.Inspected(cfg, scan=False)
    inside = transformer.apply({"params": params}, placed, method="inside")
    return jax.tree.map(lambda x: jax.reshard(x, P())[:, 0], inside)


@functools.partial(jax.jit, static_argnums=(0, 1))
def guessed(
    cfg: config.Model,
    top: int,
    params: Any,
    states: Float[Array, "layers t d"],
    wanted: Int[Array, " t"],
) -> Guesses:
    """The logit lens (nostalgebraist, 2020): the head reads the states of every layer.

    One layer at a time: all logits at once would take layers x t x v floats.
    """
    transformer = model.Transformer(cfg, scan=False)
    rows = sharding.batch_shards()

    def layer(x):
        x = jnp.broadcast_to(x, (rows, *x.shape))
        x = jax.reshard(x, sharding.spec("batch length width"))
        logits = transformer.apply({"params": params}, x, method="logits")
        logits = jax.reshard(sampling.whole(logits), P())[0]
        log_probability = jax.nn.log_softmax(logits)
        best, ids = jax.lax.top_k(log_probability, top)
        # Summed and not taken by index: a table has no place on the mesh.
        here = jnp.arange(logits.shape[-1]) == wanted[:, None]
        own = jnp.sum(jnp.where(here, log_probability, 0), axis=-1)
        rank = jnp.sum(log_probability > own[:, None], axis=-1)
        return Guesses(ids, best, rank, own)

    return jax.lax.map(layer, states)
