# SPDX-License-Identifier: Apache-2.0
"""Lone decoders of transformers beside ours: the same ids, logits in one pass and over a cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import parity
import torch
from parity import Pair, apply, tensor

from t5x_lite import model
from t5x_lite.batch import Batch

LENGTH = 11


class Ids(NamedTuple):
    """Tokens [b t], and which of them exist: rows padded on the left, on the right, not at all."""

    tokens: np.ndarray
    exists: np.ndarray


def drawn_ids(vocab: int, start: int, seed: int) -> Ids:
    """Three rows that begin with the start token: padded left, right, and not at all.

    Args:
      vocab: size of the vocabulary.
      start: id of the start token.
      seed: seed of the draw.
    """
    draw = np.random.default_rng(seed)
    exists = np.ones((3, LENGTH), bool)
    exists[0, :3] = False
    exists[1, -4:] = False
    tokens = np.where(exists, draw.integers(0, vocab, exists.shape), 0)
    tokens[[0, 1, 2], exists.argmax(axis=1)] = start
    return Ids(tokens.astype(np.int32), exists)


def where(ids: Ids) -> np.ndarray:
    """Positions [b t], 0 for padding."""
    return np.maximum(np.cumsum(ids.exists, axis=1) - 1, 0).astype(np.int32)


def inputs(ids: Ids, columns=slice(None)) -> dict:
    """Arguments of theirs for some columns of ids, with all before them in its cache."""
    exists = ids.exists if columns.stop is None else ids.exists[:, : columns.stop]
    return {
        "input_ids": tensor(ids.tokens[:, columns]),
        "position_ids": tensor(where(ids)[:, columns]),
        "attention_mask": tensor(exists),
    }


def their_outputs(theirs: torch.nn.Module, ids: Ids) -> np.ndarray:
    """Logits [n v] of all tokens that exist, in one pass."""
    with torch.no_grad():
        return theirs(**inputs(ids), use_cache=False).logits.numpy()[ids.exists]


def their_cached_logits(theirs: torch.nn.Module, ids: Ids) -> np.ndarray:
    """Logits [b t v], token by token over a cache."""
    cache, logits = None, []
    with torch.no_grad():
        for i in range(LENGTH):
            step_inputs = inputs(ids, slice(i, i + 1))
            out = theirs(**step_inputs, use_cache=True, **parity.cache_argument(theirs, cache))
            cache = out.past_key_values
            logits.append(out.logits.numpy())
    return np.concatenate(logits, axis=1)


def batch_of(ids: Ids) -> Batch:
    """ids as a training batch: its targets are the tokens one place earlier."""
    targets = np.roll(ids.tokens, -1, axis=1)
    predicted = ids.exists & np.pad(ids.exists[:, 1:], ((0, 0), (0, 1)))
    return Batch(targets, ids.exists.astype(np.int32), where(ids), predicted.astype(np.float32))


def our_logits(pair: Pair, ids: Ids) -> np.ndarray:
    """Logits [b t v], teacher-forced, with the padding of ids."""
    forward = jax.jit(lambda params, batch: apply(pair.cfg, params, batch))
    return np.asarray(forward(pair.params, batch_of(ids)))


def our_cached_logits(pair: Pair, ids: Ids) -> np.ndarray:
    """Logits [b t v], token by token over a cache with room to spare; rows begin at its slot 0."""
    cfg, rows = pair.cfg, len(ids.tokens)

    @jax.jit
    def step(params, tokens, index, cache):
        block = model.TokenBlock(tokens, index)
        hidden, cache = apply(cfg, params, block, cache, method=model.Transformer.decode)
        return apply(cfg, params, hidden, method=model.Transformer.logits), cache

    begins = ids.exists.argmax(axis=1)
    tokens = np.stack([np.roll(ids.tokens[b], -begins[b]) for b in range(rows)])
    cache, logits = model.empty_cache(cfg, rows, LENGTH + 2), []
    for i in range(LENGTH):
        index = jnp.full((rows,), i, jnp.int32)
        step_logits, cache = step(pair.params, tokens[:, i : i + 1], index, cache)
        logits.append(np.asarray(step_logits))
    aligned = np.concatenate(logits, axis=1)
    return np.stack([np.roll(aligned[b], begins[b], axis=0) for b in range(rows)])


def assert_alike(pair: Pair, ids: Ids) -> None:
    """Logits agree to 1e-4 wherever there are tokens, in one pass and token by token."""
    expected = their_outputs(pair.theirs, ids)
    assert np.ptp(expected) > 0.5, "logits too small for the comparison to mean anything"
    for actual in (our_logits(pair, ids), our_cached_logits(pair, ids)):
        np.testing.assert_allclose(actual[ids.exists], expected, atol=1e-4, rtol=0)
    cached = their_cached_logits(pair.theirs, ids)[ids.exists]
    np.testing.assert_allclose(cached, expected, atol=1e-4, rtol=0)


def assert_gradients_alike(pair: Pair, ids: Ids) -> None:
    """The gradient of the mean cross-entropy, weight by weight, within 1e-3 of its largest."""
    batch = batch_of(ids)
    predicted = torch.from_numpy(batch.loss_weights)
    logits = pair.theirs(**inputs(ids), use_cache=False).logits.flatten(0, 1)
    labels = tensor(batch.targets).flatten()
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    their_loss = torch.sum(losses * predicted.flatten()) / predicted.sum()

    def loss(params):
        likely = jax.nn.log_softmax(apply(pair.cfg, params, batch))
        chosen = jnp.sum(likely * jax.nn.one_hot(batch.targets, pair.cfg.vocab), axis=-1)
        return -jnp.sum(chosen * batch.loss_weights) / jnp.sum(batch.loss_weights)

    # A bias of keys moves all scores of a query alike: its gradient is rounding errors only.
    parity.assert_gradients_alike(pair, their_loss, loss, floor=1e-4)
