# SPDX-License-Identifier: Apache-2.0
"""Laws of losses by length: the sums of each bucket are those of its texts, one by one."""

import jax
import numpy as np
import pytest
from conftest import toy_batch, toy_model

from t5x_lite import config, model, sharding
from t5x_lite.evaluation import lengths, losses


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
def test_a_bucket_has_the_texts_of_its_lengths(layout):
    """Packed rows with padding, and a prefix that does not count; targets that are predicted."""
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    cfg = toy_model(layout, layers=1)
    params, batch = model.initialize(cfg, jax.random.key(0)), toy_batch(layout)
    predicted = jax.jit(lambda batch: model.Transformer(cfg).apply({"params": params}, batch))
    best = np.asarray(predicted(sharding.place_batch(batch))).argmax(axis=-1)
    targets = np.where(np.arange(8)[:, None] % 2, best, batch.targets).astype(np.int32)
    # The first texts of odd rows are predicted from the first target on.
    targets[:, 1:] = batch.targets[:, 1:]
    batch = batch._replace(targets=targets)
    placed = sharding.place_batch(batch)
    outcome = losses.target_outcomes(cfg, params, placed)
    sums = np.asarray(lengths.bucket_sums(cfg, (2, 5), params, placed))
    expected = np.zeros((5, 3))
    for row in range(8):
        for segment in (1, 2):
            here = (batch.target_segments[row] == segment) & (batch.loss_weights[row] > 0)
            if not here.any():
                continue
            bucket = np.searchsorted((2, 5), here.sum())
            right, nats = (np.asarray(each)[row][here] for each in (outcome.right, outcome.nats))
            expected[:, bucket] += (1, here.sum(), nats.sum(), right.sum(), right.all())
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    assert (expected[0] > 0).all() and expected[3].sum() > 0


@pytest.mark.parametrize("text", ["", "8,8", "9,8", "0", "8,", "a", "-1", "1.5", "99999999999"])
def test_lengths_that_do_not_rise_are_refused(text):
    with pytest.raises(ValueError, match=f"--lengths {text}: write lengths that rise"):
        lengths.parse_lengths(text)
    assert lengths.parse_lengths("8, 16") == (8, 16)
