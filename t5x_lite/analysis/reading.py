# SPDX-License-Identifier: Apache-2.0
"""Forward pass over one text that keeps attention and states of every layer: ids in, numpy out."""

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
from t5x_lite.decoding.request import check_ids, check_positions, decoder_prompt
from t5x_lite.model.computation import with_dtype_of
from t5x_lite.utils.not_none import not_none

# The most bytes of attention probabilities, which grow with the square of the text.
MOST_BYTES = 1 << 31


class ExplainedText(NamedTuple):
    """Ids of a text to explain.

    Attributes:
      inputs: ids for the encoder; empty for a decoder-only model.
      tokens: ids for the decoder, prompt and output.
      prompt: number of ids of the prompt.
    """

    inputs: list[int]
    tokens: list[int]
    prompt: int

    @property
    def written(self) -> list[int]:
        """The ids of the output."""
        return self.tokens[self.prompt :]

    @property
    def decoder_inputs(self) -> list[int]:
        """The tokens that the decoder reads: all but the last."""
        return self.tokens[:-1]


class TokenPredictions(NamedTuple):
    """Predictions of the tokens written.

    Attributes:
      ids: [... t k] the k most probable tokens, the best first.
      log_probability: [... t k] their log-probabilities.
      rank: [... t] rank of the token written; 0 for the most probable.
      log_probability_of_written: [... t] log-probability of the token written.
    """

    ids: np.ndarray | jax.Array
    log_probability: np.ndarray | jax.Array
    rank: np.ndarray | jax.Array
    log_probability_of_written: np.ndarray | jax.Array


class Inspection(NamedTuple):
    """Predictions and attention of every layer over one text.

    Attributes:
      predictions: [layers + 1 t ...], the last of the model.
      decoder: [layers n t t] self-attention of the decoder.
      cross: [layers n t s] attention to the inputs; None without an encoder.
      encoder: [layers n s s] self-attention of the encoder; None without one.
    """

    predictions: TokenPredictions
    decoder: np.ndarray
    cross: np.ndarray | None
    encoder: np.ndarray | None


def explained_text(
    cfg: config.Model, example: Sequence[int], written: Sequence[int]
) -> ExplainedText:
    """Checks ids and arranges them for the model.

    Args:
      cfg: config of the model.
      example: ids for the encoder, or the prompt of a decoder-only model.
      written: ids of the output.

    Raises:
      ValueError: the model lacks a decoder, the output is empty, or ids are outside the vocabulary.
    """
    if cfg.decoder is None:
        raise ValueError("An encoder alone writes nothing to explain: the model needs a decoder")
    check_ids(cfg, "Input", [example], empty=cfg.encoder is None)
    check_ids(cfg, "Target", [written])
    before = [cfg.decoder_start_token_id] if cfg.encoder else decoder_prompt(cfg, example)
    inputs = [*example] if cfg.encoder else []
    text = ExplainedText(inputs, [*before, *written], len(before))
    # The last token of the output is read too.
    check_positions(cfg, "Input", [example], [len(written) + 1])
    check_size(cfg, text)
    return text


def check_size(cfg: config.Model, text: ExplainedText) -> None:
    """Raises ValueError if the attention over a text takes more than MOST_BYTES."""
    t, s = (
        decoding.bucket_length(len(text.decoder_inputs)),
        decoding.bucket_length(len(text.inputs)),
    )
    decoder = not_none(cfg.decoder)
    pairs = decoder.layers * decoder.heads * t * (t + s)
    if cfg.encoder:
        pairs += cfg.encoder.layers * cfg.encoder.heads * s * s
    # One copy on the device, one on the host.
    if 8 * pairs > MOST_BYTES:
        raise ValueError(
            f"This model's attention over {len(text.inputs) + len(text.decoder_inputs)} tokens "
            f"takes {8 * pairs / 1e9:.1f} GB: explain at most "
            f"{int((t + s) * (MOST_BYTES / 8 / pairs) ** 0.5)} tokens at once"
        )


def repeat_text(text: ExplainedText, rows: int) -> model.InspectionInputs:
    """Repeats a text in as many rows as the mesh needs; only the first is used."""

    def repeat(ids: list[int]) -> tuple:
        return decoding.pad_rows([ids] * rows, decoding.bucket_length(len(ids)))

    tokens, length = repeat(text.decoder_inputs)
    repeated = model.InspectionInputs(tokens, length, np.full(rows, text.prompt, np.int32))
    return repeated._replace(
        **dict(zip(("inputs", "inputs_length"), repeat(text.inputs), strict=True))
    )


def inspect_text(cfg: config.Model, params: Any, text: ExplainedText, top: int) -> Inspection:
    """Runs the model over a text, and keeps attention and predictions of every layer.

    Args:
      cfg: config of the model.
      params: weights from `decoding.prepare_params`.
      text: the text.
      top: number of predictions per token.
    """
    if not 1 <= top <= cfg.vocab:
        raise ValueError(f"top must be in 1..{cfg.vocab}, the vocabulary; got {top}")
    cfg = with_dtype_of(cfg, params)
    placed = place_text(cfg, text)
    inside = jit_inspect(cfg, params, placed)
    wanted = jnp.asarray(decoding.pad_rows([text.tokens[1:]], placed.tokens.shape[1])[0][0])
    predictions = jax.device_get(jit_logit_lens(cfg, top, params, inside.states, wanted))
    cut = slice(text.prompt - 1, len(text.decoder_inputs))
    predictions = TokenPredictions(*(each[:, cut] for each in predictions))
    t, s = len(text.decoder_inputs), len(text.inputs)
    shares = jax.device_get(inside._replace(states=None))
    return Inspection(
        predictions,
        not_none(crop(shares.decoder, t, t)),
        crop(shares.cross, t, s),
        crop(shares.encoder, s, s),
    )


def crop(shares: np.ndarray | None, rows: int, columns: int) -> np.ndarray | None:
    """Attention without padding, in float32.

    Args:
      shares: [layers n t s] padded; None without such an attention.
      rows: number of queries.
      columns: number of keys.
    """
    return None if shares is None else np.asarray(shares[:, :, :rows, :columns], np.float32)


def place_text(cfg: config.Model, text: ExplainedText) -> model.InspectionInputs:
    """Places a text on the mesh in force."""
    rows = repeat_text(text, sharding.batch_shards())
    if cfg.encoder is None:
        rows = rows._replace(inputs=None, inputs_length=None)
    return generation.shard_rows(rows)


@functools.partial(jax.jit, static_argnums=0)
def jit_inspect(
    cfg: config.Model, params: Any, placed: model.InspectionInputs
) -> model.Activations:
    """Activations of the first row, replicated on every device.

    Args:
      cfg: config of the model.
      params: weights.
      placed: the text on the mesh.
    """
    transformer = model.Inspected(cfg, scan=False)
    inside = transformer.apply({"params": params}, placed, method=model.Inspected.inside)
    return jax.tree.map(lambda x: jax.reshard(x, P())[:, 0], inside)


@functools.partial(jax.jit, static_argnums=(0, 1))
def jit_logit_lens(
    cfg: config.Model,
    top: int,
    params: Any,
    states: Float[Array, "layers t d"],
    wanted: Int[Array, " t"],
) -> TokenPredictions:
    """Logit lens (nostalgebraist, 2020): the output head applied to the states of every layer.

    One layer at a time: all logits at once would take layers x t x v floats.

    Args:
      cfg: config of the model.
      top: number of predictions per token.
      params: weights.
      states: of every layer.
      wanted: the tokens written.
    """
    transformer = model.Transformer(cfg, scan=False)
    rows = sharding.batch_shards()

    def layer(x):
        x = jnp.broadcast_to(x, (rows, *x.shape))
        x = jax.reshard(x, sharding.spec("batch length width"))
        logits = transformer.apply({"params": params}, x, method=model.Transformer.logits)
        logits = jax.reshard(sampling.gather_vocabulary(logits), P())[0]
        log_probability = jax.nn.log_softmax(logits)
        best, ids = jax.lax.top_k(log_probability, top)
        # A masked sum: take_along_axis has no sharding rule here.
        here = jnp.arange(logits.shape[-1]) == wanted[:, None]
        written_log_probability = jnp.sum(jnp.where(here, log_probability, 0), axis=-1)
        rank = jnp.sum(log_probability > written_log_probability[:, None], axis=-1)
        return TokenPredictions(ids, best, rank, written_log_probability)

    return jax.lax.map(layer, states)
