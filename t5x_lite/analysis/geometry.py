# SPDX-License-Identifier: Apache-2.0
"""Geometry of hidden states by layer, and attention to the source by step, over several texts.

l layers + 1    n states    d width    t steps
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from t5x_lite import config
from t5x_lite.analysis import reading
from t5x_lite.analysis.reading import ExplainedText
from t5x_lite.model import Activations
from t5x_lite.model.computation import with_dtype_of
from t5x_lite.utils.not_none import not_none

# States that distances are computed between; more would take memory of their square.
MOST_STATES = 2000


class StateGeometry(NamedTuple):
    """Measures of the decoder's states, one number before the first layer and one after each.

    Attributes:
      anisotropy: [l] mean cosine of two states (Ethayarajh, 2019); 0 if they point everywhere.
      dimension: [l] intrinsic dimension, estimated from the two nearest neighbors of each state
        (TwoNN, Facco et al., 2017).
      neighbors: [l] mean cosine of the states of a token and of the next one.
    """

    anisotropy: np.ndarray
    dimension: np.ndarray
    neighbors: np.ndarray


class TextActivations(NamedTuple):
    """Activations of a model over one text, without padding.

    Attributes:
      states: [l t d] states of the decoder while it writes.
      source: [t] share of attention that goes to the inputs at each step, mean of layers and heads.
    """

    states: np.ndarray
    source: np.ndarray


def read_texts(
    cfg: config.Model, params: Any, texts: Sequence[ExplainedText]
) -> Iterator[TextActivations]:
    """Runs a model over texts.

    Args:
      cfg: config of the model.
      params: weights from `decoding.prepare_params`.
      texts: from `reading.explained_text`.
    """
    cfg = with_dtype_of(cfg, params)
    for text in texts:
        inside = jax.device_get(reading.jit_inspect(cfg, params, reading.place_text(cfg, text)))
        steps = slice(text.prompt - 1, len(text.decoder_inputs))
        states = np.asarray(inside.states[:, steps], np.float32)
        yield TextActivations(states, source_share(cfg, inside, text)[steps])


def source_share(cfg: config.Model, inside: Activations, text: ExplainedText) -> np.ndarray:
    """Share [t] of a decoder's attention that goes to the inputs, for each token that it reads.

    That is the mass on the prompt in a lone decoder and on the inputs where attention is merged:
    what is left is for the tokens written. Cross-attention of its own has no such choice: it is all
    on the source, 1.

    Args:
      cfg: config of the model.
      inside: activations of the text, padded.
      text: the text.
    """
    if cfg.encoder is None:
        mass = inside.decoder[..., : text.prompt]
    elif not_none(cfg.decoder).merged:
        mass = inside.cross[..., : len(text.inputs)]
    else:
        return np.ones(len(text.decoder_inputs))
    return np.asarray(mass, np.float64).sum(-1).mean((0, 1))


def mean_by_step(texts: Sequence[TextActivations], steps: int) -> list[float]:
    """Mean attention to the source of the first steps, over the texts that have them."""
    longest = min(steps, max(len(each.source) for each in texts))
    return [
        float(np.mean([each.source[step] for each in texts if len(each.source) > step]))
        for step in range(longest)
    ]


def measure_geometry(texts: Sequence[TextActivations]) -> StateGeometry:
    """Measures the states of texts, by layer."""
    layers = range(len(texts[0].states))
    neighbors = [
        np.concatenate([neighbor_cosines(each.states[layer]) for each in texts]).mean()
        for layer in layers
    ]
    joined = [np.concatenate([each.states[layer] for each in texts]) for layer in layers]
    return StateGeometry(
        np.array([anisotropy(states) for states in joined]),
        np.array([intrinsic_dimension(states[:MOST_STATES]) for states in joined]),
        np.array(neighbors),
    )


def unit_vectors(states: np.ndarray) -> np.ndarray:
    """States of length 1; those of length 0 stay."""
    states = states.astype(np.float64)
    return states / np.maximum(np.linalg.norm(states, axis=-1, keepdims=True), 1e-30)


def neighbor_cosines(states: np.ndarray) -> np.ndarray:
    """Cosines [t - 1] of each state [t d] and the next one."""
    units = unit_vectors(states)
    return (units[:-1] * units[1:]).sum(-1)


def anisotropy(states: np.ndarray) -> float:
    """Mean cosine of two different states of [n d]; NaN of a single one."""
    count = len(states)
    if count < 2:
        return float("nan")
    # The squared norm of the sum has all pairs, and each state with itself.
    total = unit_vectors(states).sum(0)
    return float((total @ total - count) / (count * (count - 1)))


def intrinsic_dimension(states: np.ndarray) -> float:
    """TwoNN: the maximum-likelihood dimension of [n d] from the ratios of distances to the second
    and to the first neighbor; equal states count once. NaN of fewer than three."""
    states = np.unique(states.astype(np.float64), axis=0)
    if len(states) < 3:
        return float("nan")
    squares = (states**2).sum(-1)
    distances = squares[:, None] + squares - 2 * states @ states.T
    np.fill_diagonal(distances, np.inf)
    first, second = np.sqrt(np.maximum(np.partition(distances, 1, axis=1)[:, :2], 1e-30)).T
    ratios = np.log(second / first)
    # The unbiased form of n / sum.
    return float((len(states) - 1) / max(ratios.sum(), 1e-30))
