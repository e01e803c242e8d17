# SPDX-License-Identifier: Apache-2.0
"""Lone encoders of transformers beside ours: the same ids, hidden states."""

import jax
import numpy as np
import torch
from encoder_decoder_parity import Ids, batch_of, drawn_ids, their_inputs
from parity import Pair, apply

from t5x_lite import config, model

__all__ = ["assert_alike", "drawn_ids", "our_vectors", "their_outputs"]


def their_outputs(theirs: torch.nn.Module, ids: Ids) -> np.ndarray:
    """Hidden states [n d] of all tokens that exist."""
    with torch.no_grad():
        return theirs(**their_inputs(ids)).last_hidden_state.numpy()[ids.exists]


def our_vectors(cfg: config.Model, params, ids: Ids, method) -> np.ndarray:
    """Result of a method that takes inputs, segments and positions.

    Args:
      cfg: architecture.
      params: weights.
      ids: token ids.
      method: method of Transformer.
    """
    forward = jax.jit(lambda params, *args: apply(cfg, params, *args, method=method))
    batch = batch_of(ids)
    return np.asarray(forward(params, batch.inputs, batch.input_segments, batch.input_positions))


def assert_alike(pair: Pair, ids: Ids) -> None:
    """Hidden states agree to 1e-4 wherever there are tokens."""
    assert pair.cfg.layout == "encoder_only" and pair.cfg.readout is None
    actual = our_vectors(pair.cfg, pair.params, ids, model.Transformer.encode)[ids.exists]
    np.testing.assert_allclose(actual, their_outputs(pair.theirs, ids), atol=1e-4, rtol=0)
