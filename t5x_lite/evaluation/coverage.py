# SPDX-License-Identifier: Apache-2.0
"""Choice by cross-attention: of texts that the model likes, the one that leaves out least.

b rows    n heads    t output tokens    s inputs
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from t5x_lite import config, decoding
from t5x_lite.decoding import generation
from t5x_lite.evaluation.choosing import Candidates
from t5x_lite.model.computation import with_dtype_of
from t5x_lite.model.inspection import Inspected, InspectionInputs


class CoverageScore:
    """Score of a text plus its coverage penalty (Wu et al., 2016, arXiv 1609.08144, eq. 14).

    The penalty is the sum over the inputs of log(min(attention that the input has got, 1)): 0 where
    every input was attended to as much as a token can be, the more negative the less. Attention is
    that of the last decoder layer, the mean of its heads.

    Args:
      predictor: `predict.Predictor`, an encoder-decoder.
      beta: factor of the penalty.

    Raises:
      ValueError: the model has no cross-attention.
    """

    def __init__(self, predictor: Any, beta: float):
        if predictor.cfg.layout != "encoder_decoder":
            raise ValueError(
                "coverage reads cross-attention, and this model has none: it needs an "
                "encoder-decoder"
            )
        self.predictor, self.beta = predictor, beta

    def __call__(self, candidates: Sequence[Candidates]) -> list[list[float]]:
        pairs = {(each.input, text): 0.0 for each in candidates for text in each.texts}
        inputs, texts = map(list, zip(*pairs, strict=True))
        penalties = dict(zip(pairs, coverage_penalties(self.predictor, inputs, texts), strict=True))
        return [
            [
                score + self.beta * penalties[each.input, text]
                for text, score in zip(each.texts, each.scores, strict=True)
            ]
            for each in candidates
        ]


def coverage_penalties(predictor: Any, inputs: Sequence[str], texts: Sequence[str]) -> list[float]:
    """Returns the coverage penalty of each text as an output of its input.

    Args:
      predictor: `predict.Predictor`, an encoder-decoder.
      inputs: texts that the encoder reads.
      texts: as many outputs.
    """
    cfg = with_dtype_of(predictor.cfg, predictor.params)
    ids, target_ids = predictor.encode_inputs(inputs), predictor.encode_targets(texts)
    # The token after the last one is not written, so the last one is not read.
    read = [[cfg.decoder_start_token_id, *row[:-1]] for row in target_ids]
    penalties = np.zeros(len(ids))
    for places in predictor.batches([[*a, *b] for a, b in zip(ids, read, strict=True)]):
        filled = [*places, *[places[0]] * (predictor.padded_rows(len(places)) - len(places))]
        tokens, length = pad_bucket([read[place] for place in filled])
        sources, sources_length = pad_bucket([ids[place] for place in filled])
        rows = InspectionInputs(tokens, length, 0 * length, sources, sources_length)
        rows = generation.shard_rows(rows)
        values = jax.device_get(penalties_of_rows(cfg, predictor.params, rows))
        penalties[places] = values[: len(places)]
    return penalties.tolist()


def pad_bucket(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows padded to one of few lengths, and their lengths."""
    return decoding.pad_rows(rows, decoding.bucket_length(max(map(len, rows))))


@functools.partial(jax.jit, static_argnums=0)
def penalties_of_rows(cfg: config.Model, params: Any, rows: InspectionInputs) -> Float[Array, " b"]:
    """Returns the coverage penalty of each row.

    Args:
      cfg: config of the model.
      params: weights from `prepare_params`.
      rows: what decoder and encoder read.
    """
    inspected = Inspected(cfg, scan=False)
    cross = inspected.apply({"params": params}, rows, method=Inspected.inside).cross[-1]
    written = jnp.arange(rows.tokens.shape[1]) < rows.length[:, None]
    got = jnp.einsum("bnts,bt->bs", cross, written.astype(cross.dtype)) / cross.shape[1]
    exists = jnp.arange(rows.inputs.shape[1]) < rows.inputs_length[:, None]
    penalty = jnp.log(jnp.clip(got, jnp.finfo(got.dtype).tiny, 1.0))
    return jax.reshard(jnp.sum(jnp.where(exists, penalty, 0.0), axis=1), P())
