# SPDX-License-Identifier: Apache-2.0
"""Rows of new ids, tables of positions, and the table that reports what became of everything."""

import dataclasses

import adaptation_toys as toys
import conversion_toys
import jax
import numpy as np
import pytest
from conftest import toy_model

from t5x_lite import config, model
from t5x_lite.adaptation import initial_weights
from t5x_lite.checkpoints import matching

LONE = toy_model("decoder_only", **toys.GEMMA2)
WIDE = dataclasses.replace(LONE, vocab=4000)


@pytest.fixture(autouse=True)
def mesh():
    toys.one_device()


def test_new_rows_have_the_mean_of_the_old_and_a_tenth_of_their_spread(tmp_path):
    drawn = toys.written(tmp_path / "lone", LONE)
    table = toys.flat(toys.adapted(WIDE, source=tmp_path / "lone")[0])["embedding"]
    old, new = drawn.arrays["embedding"].astype(np.float64), table[64:].astype(np.float64)
    np.testing.assert_array_equal(table[:64], drawn.arrays["embedding"])
    spread = 0.1 * old.std(axis=0)
    # 3,936 draws: six standard errors of a mean and of a standard deviation.
    far = np.abs(new.mean(axis=0) - old.mean(axis=0)) / spread
    assert far.max() < 6 / np.sqrt(len(new))
    assert np.abs(new.std(axis=0) / spread - 1).max() < 6 / np.sqrt(2 * len(new))


@pytest.mark.slow
def test_old_ids_keep_their_logits(tmp_path):
    drawn = toys.written(tmp_path / "lone", LONE)
    for rows in ("mean", "random"):
        params, _ = toys.adapted(WIDE, source=tmp_path / "lone", rows=rows)
        batch = toys.batch_for("decoder_only")
        expected = toys.logits(LONE, toys.nested(drawn.arrays, LONE), batch)
        logits = toys.logits(WIDE, params, batch)[:, :, :64]
        np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [(True, True), (True, False), (False, False)])
def test_every_table_grows_and_equal_ones_stay_equal(tied, tmp_path):
    source = dataclasses.replace(LONE, tied=tied[0])
    drawn = toys.written(tmp_path / "lone", source)
    wanted = toys.pair_of(source, vocab=70, tied=tied[1], separate_embeddings=True)
    params = toys.flat(toys.adapted(wanted, source=tmp_path / "lone", seed=4)[0])
    np.testing.assert_array_equal(params["embedding"], params["encoder_embedding"])
    if not tied[1]:
        name = "embedding" if tied[0] else "head"
        head = drawn.arrays[name].T if tied[0] else drawn.arrays[name]
        np.testing.assert_array_equal(params["head"][:, :64], head)
        assert params["head"].shape == (16, 70)
        assert np.array_equal(params["head"].T, params["embedding"]) == tied[0]
    again = toys.flat(toys.adapted(wanted, source=tmp_path / "lone", seed=5)[0])
    assert not np.array_equal(again["embedding"][64:], params["embedding"][64:])


@pytest.mark.slow
def test_random_rows_and_weights_are_those_of_a_new_model(tmp_path):
    toys.written(tmp_path / "lone", LONE)
    wanted = toys.pair_of(LONE, vocab=70)
    options = dict(source=tmp_path / "lone", rows="random", cross="random", seed=9)
    params = toys.flat(toys.adapted(wanted, **options)[0])
    drawn = toys.flat(model.initialize(wanted, jax.random.key(9)))
    np.testing.assert_array_equal(params["embedding"][64:], drawn["embedding"][64:])
    for path, array in params.items():
        if "cross_attention" in path:
            np.testing.assert_array_equal(array, drawn[path], err_msg=path)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("buckets, furthest", [(32, 128), (16, 40)])
def test_a_bucket_is_the_mean_of_what_the_source_has_at_its_distances(
    per_layer, buckets, furthest, tmp_path
):
    lone = toy_model("decoder_only", bias_per_layer=per_layer)
    drawn = toys.written(tmp_path / "lone", lone)
    encoder = dataclasses.replace(lone.decoder, buckets=buckets, max_distance=furthest)
    pair = toys.pair_of(lone, encoder=encoder)
    params = toys.flat(toys.adapted(pair, source=tmp_path / "lone")[0])
    name = "layers/attention/bias" if per_layer else "bias"
    causal, both = drawn.arrays[f"decoder/{name}"], params[f"encoder/{name}"]
    causal, both = (table[1] if per_layer else table for table in (causal, both))
    sums, counts = np.zeros((buckets, 4)), np.zeros(buckets)
    for distance in range(-furthest, furthest + 1):

        def bucket(stack, side, d):
            return int(toys.relative(stack, side).bucket(d))

        row = causal[bucket(lone.decoder, False, -abs(distance))]
        sums[bucket(encoder, True, distance)] += row
        counts[bucket(encoder, True, distance)] += 1
    covered = counts > 0
    np.testing.assert_allclose(both[covered], (sums / counts[:, None].clip(1))[covered], atol=1e-6)
    # Nearby, each distance has a bucket on both sides: the same bias to the left and right.
    half, near = buckets // 2, buckets // 4
    np.testing.assert_array_equal(both[1:near], both[half + 1 : half + near])
    np.testing.assert_allclose(both[:near], causal[:near], atol=1e-6)


def test_an_end_of_images_is_read_as_before(tmp_path):
    lone = toy_model("decoder_only", **toys.GEMMA3)
    drawn = toys.written(tmp_path / "lone", lone)
    merged = toys.pair_of(lone, decoder=dataclasses.replace(lone.decoder, merged=True), eoi=7)
    params = toys.flat(toys.adapted(merged, source=tmp_path / "lone")[0])
    expected = drawn.arrays["embedding"][7] * np.float32(4)
    np.testing.assert_allclose(params["eoi_embedding"], expected, rtol=1e-6)


def test_the_report_counts_every_parameter_once(tmp_path):
    drawn = toys.written(tmp_path / "lone", LONE)
    pair = toys.pair_of(LONE, vocab=70, separate_embeddings=True)
    params, report = toys.adapted(pair, source=tmp_path / "lone", cross="random")
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert report.copied + report.new == size == sum(model.count(pair).values())
    crossed = [leaf.size for path, leaf in toys.flat(params).items() if "cross_attention" in path]
    assert report.new == sum(crossed) + 2 * 6 * 16
    names = {name for row in report.rows for name in row.names}
    assert names == {path.replace("/", ".") for path in matching.model_leaves(pair)}
    assert not report.unread
    weights = conversion_toys.Drawn(pair)
    conversion_toys.write_ours(tmp_path / "encoder_decoder", pair, weights)
    _, back = toys.adapted(dataclasses.replace(LONE, vocab=70), source=tmp_path / "encoder_decoder")
    lost = sum(count for _, count in back.unread)
    assert lost + back.copied == size and back.new == 0
    assert sum(leaf.size for leaf in drawn.arrays.values()) < back.copied
    frozen = {name: "frozen" for name in names}
    assert report.text(frozen).count("frozen") == len(report.rows)


def test_a_report_needs_no_weights(tmp_path, monkeypatch):
    toys.written(tmp_path / "lone", LONE)
    options = config.Adaptation(str(tmp_path / "lone"))
    run = config.Run(model_dir="none", model=toys.pair_of(LONE), adaptation=options)
    expected = toys.adapted(run.model, source=tmp_path / "lone")[1]
    (tmp_path / "lone" / "checkpoints" / "0" / "params").rename(tmp_path / "gone")
    assert initial_weights.explain(run) == expected
