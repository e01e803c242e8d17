# SPDX-License-Identifier: Apache-2.0
"""Laws of losses by length: the sums of each bucket are those of its texts, one by one."""

import jax
import numpy as np
import pytest
from conftest import toy_batch, toy_model

from t5x_lite import config, sharding
from t5x_lite.evaluation import lengths, losses


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
def test_a_bucket_has_the_texts_of_its_lengths(layout, monkeypatch):
    """Packed rows with padding, and a prefix that does not count."""
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    batch, draw = toy_batch(layout, length=18), np.random.default_rng(0)
    nats = draw.uniform(1, 3, batch.targets.shape).astype(np.float32)
    right = (draw.uniform(size=nats.shape) < 0.95).astype(np.float32)
    placed = losses.TargetOutcomes(*(sharding.place(x, "batch length") for x in (nats, right)))
    monkeypatch.setattr(losses, "target_outcomes", lambda *_: placed)
    sums = lengths.bucket_sums(toy_model(layout), (3, 6), {}, sharding.place_batch(batch))
    expected = np.zeros((5, 3))
    for row in range(8):
        for segment in (1, 2):
            here = (batch.target_segments[row] == segment) & (batch.loss_weights[row] > 0)
            if here.any():
                bucket = np.searchsorted((3, 6), here.sum())
                r, n = right[row][here], nats[row][here]
                expected[:, bucket] += (1, here.sum(), n.sum(), r.sum(), r.all())
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    assert (expected[:4] > 0).all() and expected[4].sum() > 1


@pytest.mark.parametrize("text", ["", "8,8", "9,8", "0", "8,", "a", "-1", "1.5", "99999999999"])
def test_lengths_that_do_not_rise_are_refused(text):
    with pytest.raises(ValueError, match=f"--lengths {text}: write lengths that rise"):
        lengths.parse_lengths(text)
    assert lengths.parse_lengths("8, 16") == (8, 16)
