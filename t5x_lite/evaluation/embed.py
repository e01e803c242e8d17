# SPDX-License-Identifier: Apache-2.0
"""Texts to vectors: batches of like length, as in predicting, and a vector for each text."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from t5x_lite import config, decoding, model
from t5x_lite.decoding import generation
from t5x_lite.decoding.request import check_ids, prompt
from t5x_lite.evaluation.predict import Predictor

KINDS = ("mean", "first", "last")


def pooling_of(cfg: config.Model, kind: str | None) -> config.Model:
    """cfg that pools by kind; without one by its own, or else the mean.

    Raises ValueError for a kind that there is not.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"Embeddings are pooled by {', '.join(KINDS)}; got {kind!r}")
    own = cfg.pooling or config.Pooling()
    wanted = dataclasses.replace(own, kind=kind or own.kind)
    return dataclasses.replace(cfg, pooling=wanted)


def embed(
    predictor: Predictor,
    texts: Sequence[str],
    kind: str | None = None,
    told: Callable[[int], None] | None = None,
) -> np.ndarray:
    """The float32 vectors [n d] of texts, as an encoder, or a lone decoder, reads them.

    A text's tokens are those that the predictor gives the model to read, end and all. What else is
    in its batch, and how far it is padded, changes nothing beyond rounding. told(count) hears how
    many are done.

    Raises:
      ValueError: an unknown kind, or a text that the model cannot read.
    """
    cfg = decoding.precise(pooling_of(predictor.cfg, kind))
    ids = predictor.read(texts)
    if cfg.encoder is None:
        ids = [prompt(cfg, row) for row in ids]
    check(cfg, ids)
    width = cfg.pooling.project or (cfg.encoder or cfg.decoder).embed
    found = np.zeros((len(ids), width), np.float32)
    done = 0
    for places in predictor.batches(ids):
        rows = [ids[place] for place in places]
        rows += [rows[0]] * (predictor.rows(len(places)) - len(places))
        padded = decoding.pad(rows, decoding.bucket(max(map(len, rows))))
        vectors = compiled(cfg, predictor.params, *generation.place(padded))
        found[places] = jax.device_get(vectors)[: len(places)]
        done += len(places)
        if told:
            told(done)
    return found


def check(cfg: config.Model, ids: Sequence[Sequence[int]]) -> None:
    """Raises ValueError for texts that the model cannot read."""
    check_ids(cfg, "Text", ids)
    most = (cfg.encoder or cfg.decoder).max_length
    for number, row in enumerate(ids):
        if most is not None and len(row) > most:
            raise ValueError(
                f"Text {number} has {len(row)} tokens, but the model has {most} positions "
                "(Stack.max_length): cut it up"
            )


@functools.partial(jax.jit, static_argnums=0)
def compiled(cfg: config.Model, params: Any, ids, length):
    """The vectors of rows of ids, of which the first length[b] of row b exist."""
    place = jnp.arange(ids.shape[1])
    exists = place < length[:, None]
    where = jnp.where(exists, place, 0)
    transformer = model.Transformer(cfg, scan=False)
    seen = exists.astype(jnp.int32)
    vectors = transformer.apply({"params": params}, ids, seen, where, method="pooled")
    return jax.reshard(vectors, P())
