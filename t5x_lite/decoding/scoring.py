# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of targets, in one teacher-forced pass.

b rows    t target tokens, padded
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from t5x_lite import config, model
from t5x_lite.batch import Batch
from t5x_lite.config.canvas import check_left_to_right
from t5x_lite.decoding import generation, verification
from t5x_lite.decoding.request import (
    bucket_length,
    check_examples,
    check_ids,
    check_positions,
    decoder_prompt,
    pad_rows,
)
from t5x_lite.decoding.sampling import gather_vocabulary
from t5x_lite.model.computation import with_dtype_of


class Scores(NamedTuple):
    """Log-probabilities of targets.

    Attributes:
      log_probability: [b], of each target.
      tokens: [b t], of each of its tokens, 0 after the last.
      lengths: [b], lengths of the targets.
      greedy: [b], true where every token of a target is the most probable one of its place.
      ends: [b t], that the text ends before each of the tokens; None unless asked for.
    """

    log_probability: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    greedy: np.ndarray
    ends: np.ndarray | None = None


class PlaceScores(NamedTuple):
    """Statistics of every place of padded rows.

    Attributes:
      tokens: [b t], log-probability of the token there.
      greedy: [b t], the token is the most probable one.
      ends: [b t], log-probability that the text ends there instead; None unless asked for.
    """

    tokens: Any
    greedy: Any
    ends: Any


def score(
    cfg: config.Model,
    params: Any,
    inputs: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    stops: Sequence[int] | None = None,
) -> Scores:
    """Computes the log-probability of each target after its inputs, in nats.

    The number of rows must be a multiple of `sharding.batch_shards()`.

    Args:
      cfg: config of the model.
      params: weights from `prepare_params`.
      inputs: ids that `generation.generate` would continue: encoder inputs, or prompts of a
        decoder-only model.
      targets: ids of each target.
      stops: ids of which each ends a text, for Scores.ends; None without.

    Raises:
      ValueError: as `check_pairs`.
    """
    check_pairs(cfg, inputs, targets)
    if cfg.encoder is None and not cfg.add_bos:
        inputs = [decoder_prompt(cfg, row) for row in inputs]
        places = score_as_blocks(cfg, params, inputs, targets, stops)
    else:
        batch = generation.shard_rows(teacher_forced_batch(cfg, inputs, targets))
        scored = compiled_scores(with_dtype_of(cfg, params), params, batch, stop_ids(stops))
        places = jax.device_get(scored)
    begins = np.zeros(len(targets), int) if cfg.encoder else np.array([len(x) for x in inputs])
    lengths = np.array([len(row) for row in targets])
    width = max(lengths)
    where = np.minimum(begins[:, None] + np.arange(width), places.tokens.shape[1] - 1)
    inside = np.arange(width) < lengths[:, None]

    def take_targets(array):
        return np.where(inside, np.take_along_axis(array, where, axis=1), 0)

    tokens = take_targets(places.tokens)
    greedy = np.all(take_targets(places.greedy) | ~inside, axis=1)
    ends = None if places.ends is None else take_targets(places.ends)
    return Scores(tokens.sum(axis=1, dtype=np.float64), tokens, lengths, greedy, ends)


def stop_ids(stops: Sequence[int] | None) -> np.ndarray | None:
    """Returns ids as an array."""
    return None if stops is None else np.array(stops, np.int32)


def end_log_probability(
    logits: Float[Array, "b t v"], stops: Int[Array, " e"] | None
) -> Float[Array, "b t"] | None:
    """Log-probability that the next token is one of `stops`; None without them."""
    if stops is None:
        return None
    ends = jnp.any(jnp.arange(logits.shape[-1]) == stops[:, None], axis=0)
    of_ends = jax.nn.logsumexp(jnp.where(ends, logits, -jnp.inf), axis=-1)
    return of_ends - jax.nn.logsumexp(logits, axis=-1)


def check_pairs(
    cfg: config.Model, inputs: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> None:
    """Checks that the model can read inputs with their targets.

    Args:
      cfg: config of the model.
      inputs: ids of encoder inputs, or of prompts of a decoder-only model.
      targets: ids of each target.

    Raises:
      ValueError: lengths differ, something is empty, ids are outside of the vocabulary, or the
        model has too few learned positions.
    """
    check_left_to_right(cfg, "The log-probability of a text")
    check_examples(cfg, inputs)
    check_ids(cfg, "Target", targets)
    if len(inputs) != len(targets):
        raise ValueError(f"{len(inputs)} inputs but {len(targets)} targets: they must pair up")
    check_positions(cfg, "Input", inputs, [len(target) for target in targets])


def teacher_forced_batch(
    cfg: config.Model, inputs: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> Batch:
    """Returns a batch with one example per row, unpacked.

    Args:
      cfg: config of the model.
      inputs: ids of encoder inputs, or of prompts of a decoder-only model.
      targets: ids of each target.
    """
    if cfg.encoder is None:
        rows = [[*before, *after] for before, after in zip(inputs, targets, strict=True)]
        begins = np.array([len(row) for row in inputs])
    else:
        rows, begins = targets, np.zeros(len(targets), int)
    ids, lengths = pad_rows(rows, bucket_length(max(map(len, rows))))
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
    ids, lengths = pad_rows(inputs, bucket_length(max(map(len, inputs))))
    where = np.arange(ids.shape[1], dtype=np.int32)
    inside = where < lengths[:, None]
    return batch._replace(
        inputs=ids,
        input_segments=inside.astype(np.int32),
        input_positions=np.where(inside, where, 0).astype(np.int32),
    )


@functools.partial(jax.jit, static_argnums=0)
def compiled_scores(
    cfg: config.Model, params: Any, batch: Batch, stops: Int[Array, " e"] | None = None
) -> PlaceScores:
    """Computes statistics of every target token; its log-probability is 0 where its loss weight is.

    Args:
      cfg: config of the model.
      params: weights from `prepare_params`.
      batch: the rows, on the mesh.
      stops: ids that end a text; None without ends.
    """
    logits = gather_vocabulary(model.Transformer(cfg, scan=False).apply({"params": params}, batch))
    scored = score_places(logits, batch.targets, stops)
    tokens = jnp.where(batch.loss_weights > 0, scored.tokens, 0)
    return jax.tree.map(lambda x: jax.reshard(x, P()), scored._replace(tokens=tokens))


def score_places(
    logits: Float[Array, "b t v"], tokens: Int[Array, "b t"], stops: Int[Array, " e"] | None
) -> PlaceScores:
    """Computes statistics of tokens under the logits of their places.

    Args:
      logits: of each place.
      tokens: the token there.
      stops: ids that end a text; None without ends.
    """
    return PlaceScores(
        verification.token_log_probability(logits, tokens),
        jnp.argmax(logits, axis=-1) == tokens,
        end_log_probability(logits, stops),
    )


def score_as_blocks(
    cfg: config.Model,
    params: Any,
    inputs: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    stops: Sequence[int] | None = None,
) -> PlaceScores:
    """Computes statistics of every token of inputs and targets after those before it.

    For decoder-only models whose texts have no start token: the first token has 0.

    Args:
      cfg: config of the model.
      params: weights from `prepare_params`.
      inputs: ids of the prompts.
      targets: ids of the targets.
      stops: ids that end a text; None without ends.
    """
    rows = [[*before, *after] for before, after in zip(inputs, targets, strict=True)]
    ids, _ = pad_rows(rows, bucket_length(max(map(len, rows))))
    prefix = np.array([len(row) for row in inputs], np.int32)
    ids, prefix = generation.shard_rows((ids, prefix))
    cfg = with_dtype_of(cfg, params)
    return jax.device_get(compiled_block_scores(cfg, params, ids, prefix, stop_ids(stops)))


@functools.partial(jax.jit, static_argnums=0)
def compiled_block_scores(
    cfg: config.Model,
    params: Any,
    ids: Int[Array, "b t"],
    prefix: Int[Array, " b"],
    stops: Int[Array, " e"] | None = None,
) -> PlaceScores:
    """Computes what `score_as_blocks` returns: each row is one block on an empty cache.

    Args:
      cfg: config of the model.
      params: weights from `prepare_params`.
      ids: inputs and targets.
      prefix: lengths of the inputs.
      stops: ids that end a text; None without ends.
    """
    transformer = model.Transformer(cfg, scan=False)
    block = model.TokenBlock(ids, jnp.zeros_like(prefix), prefix=prefix)
    cache = model.empty_cache(cfg, *ids.shape, scan=False)
    hidden, _ = transformer.apply({"params": params}, block, cache, method=model.Transformer.decode)
    logits = gather_vocabulary(
        transformer.apply({"params": params}, hidden, method=model.Transformer.logits)
    )
    scored = score_places(logits[:, :-1], ids[:, 1:], stops)
    return jax.tree.map(lambda x: jax.reshard(jnp.pad(x, ((0, 0), (1, 0))), P()), scored)
