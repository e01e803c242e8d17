# SPDX-License-Identifier: Apache-2.0
"""The log-probability of given targets, in one teacher-forced pass."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from t5x_lite import config, model
from t5x_lite.batch import Batch
from t5x_lite.decoding import generation, loop, target
from t5x_lite.decoding.request import bucket, check, check_ids, pad, prompt
from t5x_lite.decoding.sampling import whole


class Scores(NamedTuple):
    """log_probability [b] of each target, and of its tokens [b t], 0 after their lengths [b]."""

    log_probability: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray


def score(
    cfg: config.Model,
    params: Any,
    inputs: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
) -> Scores:
    """How probable the model finds each row of targets after its inputs, in nats.

    inputs are what `generation.generate` is asked to continue: ids for the encoder, or the prompts
    of a lone decoder. params come from `prepare`. The number of rows must be a multiple of
    `sharding.batch_shards()`.

    Raises:
      ValueError: lengths differ, something is empty, or ids are outside of the vocabulary.
    """
    check(cfg, inputs)
    check_ids(cfg, "Target", targets)
    if len(inputs) != len(targets):
        raise ValueError(f"{len(inputs)} inputs but {len(targets)} targets: they must pair up")
    if cfg.encoder is None and not cfg.starts_prompts:
        inputs = [prompt(cfg, row) for row in inputs]
        rows = continued(cfg, params, inputs, targets)
    else:
        batch = teacher_forced(cfg, inputs, targets)
        rows = jax.device_get(compiled(target.precise(cfg), params, generation.place(batch)))
    begins = np.zeros(len(targets), int) if cfg.encoder else np.array([len(x) for x in inputs])
    lengths = np.array([len(row) for row in targets])
    width = max(lengths)
    where = begins[:, None] + np.arange(width)
    inside = np.arange(width) < lengths[:, None]
    there = np.take_along_axis(rows, np.minimum(where, rows.shape[1] - 1), axis=1)
    tokens = np.where(inside, there, 0)
    return Scores(tokens.sum(axis=1, dtype=np.float64), tokens, lengths)


def teacher_forced(
    cfg: config.Model, inputs: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> Batch:
    """One example per row, unpacked."""
    if cfg.encoder is None:
        rows = [[*before, *after] for before, after in zip(inputs, targets, strict=True)]
        begins = np.array([len(row) for row in inputs])
    else:
        rows, begins = targets, np.zeros(len(targets), int)
    ids, lengths = pad(rows, bucket(max(map(len, rows))))
    where = np.arange(ids.shape[1], dtype=np.int32)
    inside = where < lengths[:, None]
    batch = Batch(
        targets=ids,
        target_segments=inside.astype(np.int32),
        target_positions=np.where(inside, where, 0).astype(np.int32),
        loss_weights=(inside & (where >= begins[:, None])).astype(np.float32),
    )
    if cfg.encoder is None:
        return batch._replace(prefix=where < begins[:, None])
    ids, lengths = pad(inputs, bucket(max(map(len, inputs))))
    where = np.arange(ids.shape[1], dtype=np.int32)
    inside = where < lengths[:, None]
    return batch._replace(
        inputs=ids,
        input_segments=inside.astype(np.int32),
        input_positions=np.where(inside, where, 0).astype(np.int32),
    )


@functools.partial(jax.jit, static_argnums=0)
def compiled(cfg: config.Model, params, batch: Batch):
    """The log-probability of every target [b t], 0 where none is asked for."""
    logits = model.Transformer(cfg, scan=False).apply({"params": params}, batch)
    tokens = loop.token_log_probability(whole(logits), batch.targets)
    return jax.reshard(jnp.where(batch.loss_weights > 0, tokens, 0), P())


def continued(cfg: config.Model, params, inputs, targets) -> np.ndarray:
    """The log-probability of every token [b t] of inputs and targets after those before it.

    For a lone decoder whose texts have no start: the first token, which nothing precedes, has 0.
    """
    rows = [[*before, *after] for before, after in zip(inputs, targets, strict=True)]
    ids, _ = pad(rows, bucket(max(map(len, rows))))
    prefix = np.array([len(row) for row in inputs], np.int32)
    placed = generation.place((ids, prefix))
    return jax.device_get(compiled_block(target.precise(cfg), params, *placed))


@functools.partial(jax.jit, static_argnums=0)
def compiled_block(cfg: config.Model, params, ids, prefix):
    """What `continued` gives: each row read as one block on an empty cache, as prompts are."""
    transformer = model.Transformer(cfg, scan=False)
    block = model.Block(ids, jnp.zeros_like(prefix), prefix=prefix)
    cache = model.empty_cache(cfg, *ids.shape, scan=False)
    hidden, _ = transformer.apply({"params": params}, block, cache, method="decode")
    logits = whole(transformer.apply({"params": params}, hidden, method="logits"))
    tokens = loop.token_log_probability(logits[:, :-1], ids[:, 1:])
    return jax.reshard(jnp.pad(tokens, ((0, 0), (1, 0))), P())
