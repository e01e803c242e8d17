# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoders of transformers beside ours: the same ids, encoder output and logits."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import parity
import torch
from parity import Pair, apply, tensor

from t5x_lite import config, model, sharding
from t5x_lite.batch import Batch

INPUTS, TARGETS = 13, 9


class Ids(NamedTuple):
    """Token ids of a parity test.

    Attributes:
      inputs: [b s] ids of the encoder.
      exists: [b s] False for padding, which is on both sides.
      decoder: [b t] decoder inputs.
    """

    inputs: np.ndarray
    exists: np.ndarray
    decoder: np.ndarray


def drawn_ids(vocab: int, start: int, seed: int) -> Ids:
    """Random ids in three rows padded left, right and not at all.

    Args:
      vocab: size of the vocabulary; ids are drawn from 3 on, as no family gives those a meaning.
      start: start token of the decoder.
      seed: seed of the draw.
    """
    draw = np.random.default_rng(seed)
    exists = np.ones((3, INPUTS), bool)
    exists[0, :3] = False
    exists[1, -4:] = False
    inputs = np.where(exists, draw.integers(3, vocab, exists.shape), 0).astype(np.int32)
    decoder = draw.integers(3, vocab, (3, TARGETS)).astype(np.int32)
    decoder[:, 0] = start
    return Ids(inputs, exists, decoder)


def their_results(theirs, ids: Ids) -> tuple[np.ndarray, np.ndarray]:
    """Encoder output [b s d] and logits [b t v], in one pass."""
    with torch.no_grad():
        out = theirs(**their_inputs(ids), decoder_input_ids=tensor(ids.decoder), use_cache=False)
    return out.encoder_last_hidden_state.numpy(), out.logits.numpy()


def their_outputs(theirs: torch.nn.Module, ids: Ids) -> np.ndarray:
    """Logits [b t v], in one pass."""
    return their_results(theirs, ids)[1]


def their_cached_logits(theirs, ids: Ids) -> np.ndarray:
    """Logits [b t v], token by token over a cache."""
    cache, logits = None, []
    with torch.no_grad():
        encoded = theirs.get_encoder()(**their_inputs(ids))
        for i in range(ids.decoder.shape[1]):
            out = theirs(
                encoder_outputs=encoded,
                attention_mask=tensor(ids.exists),
                decoder_input_ids=tensor(ids.decoder[:, i : i + 1]),
                use_cache=True,
                **parity.cache_argument(theirs, cache),
            )
            cache = out.past_key_values
            logits.append(out.logits.numpy())
    return np.concatenate(logits, axis=1)


def their_inputs(ids: Ids) -> dict:
    """Keyword arguments of an encoder of transformers."""
    return {"input_ids": tensor(ids.inputs), "attention_mask": tensor(ids.exists)}


def our_results(pair: Pair, ids: Ids) -> tuple[np.ndarray, np.ndarray]:
    """Encoder output [b s d] and logits [b t v], teacher-forced."""
    cfg = cfg_from(pair.cfg, ids)

    def both(params, batch):
        read = batch.inputs, batch.input_segments, batch.input_positions
        return apply(cfg, params, *read, method=model.Transformer.encode), apply(cfg, params, batch)

    encoded, logits = jax.jit(both)(pair.params, batch_of(ids))
    return np.asarray(encoded), np.asarray(logits)


def our_cached_logits(pair: Pair, ids: Ids) -> np.ndarray:
    """Logits [b t v], token by token over a cache with room to spare."""
    cfg, rows = pair.cfg, ids.decoder.shape[0]

    def begin(params, batch):
        read = batch.inputs, batch.input_segments, batch.input_positions
        return apply(
            cfg,
            params,
            apply(cfg, params, *read, method=model.Transformer.encode),
            method=model.Transformer.cross_kv,
        )

    def step(params, tokens, index, cache, read):
        block = model.TokenBlock(tokens, index)
        hidden, cache = apply(cfg, params, block, cache, read, method=model.Transformer.decode)
        return apply(cfg, params, hidden, method=model.Transformer.logits), cache

    read = model.EncoderMemory(jax.jit(begin)(pair.params, batch_of(ids)), jnp.asarray(ids.exists))
    cache, logits = model.empty_cache(cfg, rows, TARGETS + 2), []
    step = jax.jit(step)
    for i in range(ids.decoder.shape[1]):
        index = jnp.full((rows,), i, jnp.int32)
        step_logits, cache = step(pair.params, ids.decoder[:, i : i + 1], index, cache, read)
        logits.append(np.asarray(step_logits))
    return np.concatenate(logits, axis=1)


def cfg_from(cfg: config.Model, ids: Ids) -> config.Model:
    """cfg with the start token of ids."""
    return dataclasses.replace(cfg, decoder_start_token_id=int(ids.decoder[0, 0]))


def batch_of(ids: Ids) -> Batch:
    """ids as a training batch: the targets are the decoder's inputs one place earlier."""
    targets = np.roll(ids.decoder, -1, axis=1)
    ones = np.ones_like(targets)
    where = positions(targets)
    weights = ones.astype(np.float32)
    exists = ids.exists.astype(np.int32)
    batch = Batch(targets, ones, where, weights, ids.inputs, exists, positions(ids.inputs))
    return sharding.place_batch(batch)


def positions(ids: np.ndarray) -> np.ndarray:
    """Positions [b t], from 0 in each row."""
    return np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)


def assert_alike(pair: Pair, ids: Ids) -> None:
    """Encoder outputs, teacher-forced logits and cached logits agree to 1e-4 where tokens are."""
    encoded, logits = their_results(pair.theirs, ids)
    our_encoded, our_logits = our_results(pair, ids)
    np.testing.assert_allclose(our_encoded[ids.exists], encoded[ids.exists], atol=1e-4, rtol=0)
    np.testing.assert_allclose(our_logits, logits, atol=1e-4, rtol=0)
    cached = their_cached_logits(pair.theirs, ids)
    np.testing.assert_allclose(our_cached_logits(pair, ids), cached, atol=1e-4, rtol=0)


def assert_gradients_alike(pair: Pair, ids: Ids) -> None:
    """The gradient of the mean cross-entropy, weight by weight, within 1e-3 of its largest."""
    batch = batch_of(ids)
    labels = tensor(np.asarray(batch.targets))
    out = pair.theirs(**their_inputs(ids), decoder_input_ids=tensor(ids.decoder), use_cache=False)
    their_loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())

    def loss(params):
        logits = apply(cfg_from(pair.cfg, ids), params, batch)
        chosen = jnp.sum(
            jax.nn.log_softmax(logits) * jax.nn.one_hot(batch.targets, pair.cfg.vocab), -1
        )
        return -jnp.mean(chosen)

    # A bias of keys moves all scores of a query alike: its gradient is rounding errors only.
    stack = pair.cfg.decoder
    # These are up to eight units in the last place of the largest gradient.
    floor = 1e-3 if stack.qkv_bias and stack.softcap is None else 0.0
    parity.assert_gradients_alike(pair, their_loss, loss, floor)
