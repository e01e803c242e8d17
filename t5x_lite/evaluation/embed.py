# SPDX-License-Identifier: Apache-2.0
"""Embeddings: a vector for each text, computed in batches of like length as in prediction; and
scores of pairs of texts."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from t5x_lite import config, model
from t5x_lite.decoding.request import (
    check_ids,
    check_positions,
    count_positions,
    decoder_prompt,
    lacks_positions,
)
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.model.computation import with_dtype_of
from t5x_lite.model.matching import make_rows, match_rows
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
    ids = encode_whole_texts(predictor, cfg, [before + text for text in texts])
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


def encode_whole_texts(
    predictor: Predictor, cfg: config.Model, texts: Sequence[str]
) -> list[list[int]]:
    """The ids of texts, as they are in rows of their own.

    Args:
      predictor: tokenizes them.
      cfg: config of the model that reads them.
      texts: the texts.

    Raises:
      ValueError: the model cannot read a text.
    """
    ids = predictor.encode_inputs(texts)
    longest = not_none(cfg.readout).max_length
    if longest is not None:
        ids = [cut_text(predictor, row, longest) for row in ids]
    check_positions(cfg, "Text", ids)
    if cfg.encoder is None:
        ids = [decoder_prompt(cfg, row) for row in ids]
    check_ids(cfg, "Text", ids)
    return ids


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
    transformer = model.Transformer(cfg, scan=False)
    vectors = transformer.apply(
        {"params": params}, *make_rows(ids, length), method=model.Transformer.pooled
    )
    return jax.reshard(vectors, P())


def score_pairs(predictor: Predictor, inputs: Sequence[str], targets: Sequence[str]) -> list[float]:
    """Log-probability in nats of each target given its input; of a model with Readout.matching,
    that both belong together.

    Args:
      predictor: the model.
      inputs: texts, such as queries.
      targets: as many, such as documents.

    Raises:
      ValueError: the model cannot read a pair, or writes no text and matches none.
    """
    if not matches_texts(predictor.cfg):
        return [total for total, _ in predictor.score(inputs, targets)]
    cfg = with_dtype_of(predictor.cfg, predictor.params)
    ids = join_pairs(predictor, cfg, inputs, targets)
    scores = np.zeros(len(ids))
    for places, rows in predictor.padded_batches(ids):
        scores[places] = jax.device_get(score_rows(cfg, predictor.params, *rows))[: len(places)]
    return scores.tolist()


def matches_texts(cfg: config.Model) -> bool:
    """True for a model with a classifier of pairs of texts."""
    return cfg.readout is not None and cfg.readout.matching


def join_pairs(
    predictor: Predictor, cfg: config.Model, inputs: Sequence[str], targets: Sequence[str]
) -> list[list[int]]:
    """The ids of pairs of texts, one pair in a row, as `matching.join_texts` has them.

    Args:
      predictor: tokenizes the texts.
      cfg: config of the model that reads them.
      inputs: first text of each pair.
      targets: second text of each.

    Raises:
      ValueError: the model cannot read a text, or has too few positions for a pair.
    """
    sides = [encode_whole_texts(predictor, cfg, texts) for texts in (inputs, targets)]
    ids = [[*first, *second] for first, second in zip(*sides, strict=True)]
    for number, row in enumerate(ids):
        reason = describe_pair_excess(cfg, row)
        config.require(not reason, f"Pair {number} {reason}: shorten a text")
    return ids


def describe_pair_excess(cfg: config.Model, row: Sequence[int]) -> str:
    """The reason why the model has too few learned positions for a pair; "" where it has enough."""
    for stack in filter(None, (cfg.encoder, cfg.decoder)):
        if lacks_positions(stack, len(row)):
            return f"takes {len(row)} positions, but the model has {count_positions(stack)}"
    return ""


def describe_pair_trouble(predictor: Predictor, text: str, target: str) -> str:
    """The reason why a model with Readout.matching cannot read a pair; "" where it can.

    Args:
      predictor: the model.
      text: first text of the pair.
      target: second text of it.
    """
    for each in (text, target):
        if reason := predictor.describe_trouble(each):
            return reason
    sides = [encode_whole_texts(predictor, predictor.cfg, [each])[0] for each in (text, target)]
    return describe_pair_excess(predictor.cfg, sides[0] + sides[1])


@functools.partial(jax.jit, static_argnums=0)
def score_rows(cfg: config.Model, params: Any, ids, length):
    """Log-probabilities [b] that both texts of each row belong together.

    Args:
      cfg: config of the model.
      params: its weights.
      ids: [b t] int32.
      length: [b] int32, ids of each row that exist.
    """
    transformer = model.Transformer(cfg, scan=False)
    logits = transformer.apply({"params": params}, make_rows(ids, length), method=match_rows)
    return jax.reshard(jax.nn.log_softmax(logits, axis=-1)[:, 1], P())
