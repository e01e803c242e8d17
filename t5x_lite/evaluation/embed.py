# SPDX-License-Identifier: Apache-2.0
"""Embeddings: a vector for each text, computed in batches of like length as in prediction."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from t5x_lite import config, model
from t5x_lite.decoding.request import check_ids, check_positions, decoder_prompt
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.model.computation import with_dtype_of
from t5x_lite.tokenizers.vocabularies import end_ids
from t5x_lite.utils.not_none import not_none

KINDS = ("mean", "first", "last")
PROMPTS = ("query", "document")


def with_pooling(cfg: config.Model, kind: str | None) -> config.Model:
    """The model that makes vectors: with its own readout of them, or of its encoder if it has one.

    Args:
      cfg: config of any model.
      kind: pooling, one of KINDS; None for the readout's own, or else the mean.

    Raises:
      ValueError: an unknown kind.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"Embeddings are pooled by {', '.join(KINDS)}; got {kind!r}")
    readout = cfg.readout
    if readout is None or readout.kind != "vector":
        readout = config.Readout("vector", kind or "mean")
        if cfg.encoder is not None:
            cfg = dataclasses.replace(cfg, decoder=None, separate_embeddings=False)
    readout = dataclasses.replace(readout, pooling=kind or readout.pooling)
    return dataclasses.replace(cfg, readout=readout, draft_heads=None)


def embed(
    predictor: Predictor,
    texts: Sequence[str],
    kind: str | None = None,
    on_progress: Callable[[int], None] | None = None,
    prompt: str | None = None,
) -> np.ndarray:
    """Computes the vectors [n d] of texts, float32.

    What else is in a text's batch, and how far it is padded, changes nothing beyond rounding.

    Args:
      predictor: an encoder or a decoder-only model; it tokenizes the texts, end included.
      texts: n texts.
      kind: pooling, one of KINDS; by default the model's own.
      on_progress: called with the number of texts done.
      prompt: one of PROMPTS, whose text in the readout stands before each text; None for none.

    Raises:
      ValueError: an unknown kind or prompt, or a text that the model cannot read.
    """
    cfg = with_dtype_of(with_pooling(predictor.cfg, kind), predictor.params)
    readout, params = not_none(cfg.readout), predictor.params
    if predictor.cfg.separate_embeddings and cfg.decoder is None:
        params = params | {"embedding": params["encoder_embedding"]}
    before = prompt_text(readout, prompt)
    ids = predictor.encode_inputs([before + text for text in texts])
    longest = readout.max_length
    if longest is not None:
        ids = [cut_text(predictor, row, longest) for row in ids]
    check_positions(cfg, "Text", ids)
    if cfg.encoder is None:
        ids = [decoder_prompt(cfg, row) for row in ids]
    check_ids(cfg, "Text", ids)
    width = readout.project or cfg.last_stack.embed
    embeddings = np.zeros((len(ids), width), np.float32)
    done = 0
    for places, rows in predictor.padded_batches(ids):
        vectors = pooled_vectors(cfg, params, *rows)
        embeddings[places] = jax.device_get(vectors)[: len(places)]
        done += len(places)
        if on_progress:
            on_progress(done)
    return embeddings


def prompt_text(readout: config.Readout, prompt: str | None) -> str:
    """Text that stands before texts of a kind; raises ValueError for an unknown kind."""
    if prompt is None:
        return ""
    if prompt not in PROMPTS:
        raise ValueError(f"Texts are embedded as {' or '.join(PROMPTS)}; got {prompt!r}")
    config.require(
        bool(readout.query_prompt or readout.document_prompt),
        "The model has no prompts (Readout.query_prompt, Readout.document_prompt): leave it out",
    )
    return getattr(readout, f"{prompt}_prompt")


def cut_text(predictor: Predictor, row: list[int], longest: int) -> list[int]:
    """The first ids of a text and its end, as sentence-transformers cuts one.

    Args:
      predictor: the model, which may end texts.
      row: ids of the text.
      longest: number of ids to keep.
    """
    if len(row) <= longest:
        return row
    end = end_ids(predictor.inputs)[1] if predictor.ended else []
    return [*row[: max(longest - len(end), 0)], *end]


@functools.partial(jax.jit, static_argnums=0)
def pooled_vectors(cfg: config.Model, params: Any, ids, length):
    """Vectors of rows of ids.

    Args:
      cfg: config of the model.
      params: its weights.
      ids: [b t] int32.
      length: [b] int32, ids of each row that exist.
    """
    position = jnp.arange(ids.shape[1])
    exists = position < length[:, None]
    positions = jnp.where(exists, position, 0)
    transformer = model.Transformer(cfg, scan=False)
    segments = exists.astype(jnp.int32)
    vectors = transformer.apply(
        {"params": params}, ids, segments, positions, method=model.Transformer.pooled
    )
    return jax.reshard(vectors, P())
