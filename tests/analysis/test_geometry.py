# SPDX-License-Identifier: Apache-2.0
"""Laws of states and attention over several texts: planted geometry, shares that sum to one."""

import jax
import numpy as np
import pytest
from conftest import toy_model

from t5x_lite import config, decoding, model, sharding
from t5x_lite.analysis import geometry, reading


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_the_dimension_of_a_subspace_is_found_in_a_wider_space(dimension):
    draw = np.random.default_rng(0)
    basis = np.linalg.qr(draw.normal(size=(32, dimension)))[0]
    states = draw.uniform(size=(1500, dimension)) @ basis.T
    assert geometry.intrinsic_dimension(states) == pytest.approx(dimension, rel=0.1)
    # Neither scale nor repeated states matter.
    again = np.concatenate([states, states[:300]]) * 7
    assert geometry.intrinsic_dimension(again) == pytest.approx(dimension, rel=0.1)


def test_anisotropy_is_the_mean_cosine_of_all_pairs():
    states = np.random.default_rng(1).normal(0.3, 1, size=(40, 8))
    units = geometry.unit_vectors(states)
    pairs = [units[i] @ units[j] for i in range(40) for j in range(40) if i != j]
    assert geometry.anisotropy(states) == pytest.approx(np.mean(pairs))
    assert geometry.anisotropy(np.ones((5, 3))) == pytest.approx(1)
    assert np.isnan(geometry.anisotropy(states[:1]))
    assert np.isnan(geometry.intrinsic_dimension(states[:2]))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["decoder_only", "encoder_decoder", "merged"])
def test_the_share_of_the_source_is_what_attention_leaves_to_the_text(layout):
    sharding.use_mesh(config.Mesh())
    alone = layout == "decoder_only"
    cfg = toy_model(
        "decoder_only" if alone else "encoder_decoder",
        positions="rotary",
        merged=layout == "merged",
    )
    params = decoding.prepare_params(cfg, model.initialize(cfg, jax.random.key(0)))
    pairs = [([5, 6, 7, 8, 1], [9, 10, 1]), ([11, 3, 1], [4, 5, 6, 7, 1])]
    texts = [reading.explained_text(cfg, *pair) for pair in pairs]
    read = list(geometry.read_texts(cfg, params, texts))
    for text, each in zip(texts, read, strict=True):
        inspection = reading.inspect_text(cfg, params, text, 1)
        assert len(each.source) == len(text.written) == each.states.shape[1]
        if layout == "encoder_decoder":
            assert np.all(each.source == 1)
            continue
        attention = inspection.decoder[:, :, text.prompt - 1 :]
        rest = attention[..., text.prompt :] if alone else attention
        np.testing.assert_allclose(each.source, 1 - rest.sum(-1).mean((0, 1)), atol=1e-5)
    by_step = geometry.mean_by_step(read, 4)
    assert len(by_step) == 4 and by_step[3] == pytest.approx(read[1].source[3])
    measures = geometry.measure_geometry(read)
    assert all(values.shape == (cfg.decoder.layers + 1,) for values in measures)
