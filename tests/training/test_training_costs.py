# SPDX-License-Identifier: Apache-2.0
"""Laws of the reports on a run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_model

from t5x_lite import config, model, sharding
from t5x_lite.batch import Batch
from t5x_lite.training import flops, objective
from t5x_lite.training.reporting import curves, metric_writers, step_progress
from t5x_lite.training.step_values import StepContext


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only", "encoder_only"])
def test_the_formula_counts_what_the_compiler_counts(layout):
    # Wide enough that matrix products outweigh everything that is not in the formula.
    cfg = toy_model(layout, embed=128, heads=4, head_dim=32, mlp=256, kv_heads=2)
    cfg = dataclasses.replace(cfg, vocab=512)
    sharding.use_mesh(config.Mesh())
    lengths = {"inputs": 64, "targets": 64}
    inputs, targets = flops.row_lengths(layout, lengths)

    def part(length, dtype=jnp.int32):
        return jnp.zeros((8, length), dtype, out_sharding=sharding.spec("batch length"))

    batch = Batch(part(targets), part(targets), part(targets), part(targets, jnp.float32))
    if inputs:
        batch = batch._replace(
            inputs=part(inputs), input_segments=part(inputs), input_positions=part(inputs)
        )
    # Unrolled: the compiler counts the body of a loop once.
    unrolled = model.Transformer(cfg, scan=False, remat="none")
    run = config.Run("run", cfg, train=config.Train(steps=1, batch_size=8))

    def sums(params):
        return objective.token_sums(unrolled, run, params, batch, StepContext(), None)

    def loss(params):
        return sums(params).objective

    gradient = jax.jit(lambda params: jax.grad(loss)(model.unstack(params)))
    params = model.initialize(cfg, jax.random.key(0))
    counted = gradient.lower(params).compile().cost_analysis()["flops"] * jax.device_count()
    assert flops.step_flops(cfg, 8, lengths) == pytest.approx(counted, rel=0.15)


def test_the_peak_of_a_chip_is_found_by_its_kind():
    assert flops.peak_flops("TPU v5 lite") == 197e12
    assert flops.peak_flops("TPU v5") == 459e12
    assert flops.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert flops.peak_flops("cpu") is None


VALUES = {
    "loss": 1.5,
    "target_tokens_per_second": 12_345.0,
    "tokens_per_second": 2.5e6,
    "padding": 0.06,
    "waiting": 0.0,
    "skipped": 0,
    "step_seconds": 0.5,
}


def test_a_line_of_progress_has_everything_in_words():
    line = step_progress.format_metrics(VALUES | {"mfu": 0.412}, left=3700)
    for part in ("loss 1.5", "12.3k target tok/s", "2.5M tok/s", "padding 6%", "waiting 0%"):
        assert part in line
    assert "MFU 41.2%" in line and "ETA 1:01:40" in line
    assert "skipped 2" in step_progress.format_metrics(VALUES | {"skipped": 2}, left=None)


def test_steps_done_again_after_a_restart_count_once(tmp_path):
    kept = metric_writers.MetricWriter(tmp_path, tensorboard=False, start=None)
    for number, loss in ((1, 3.0), (2, 2.0), (1, 3.5)):
        kept.write(number, {"loss": loss})
    kept.close()
    with open(tmp_path / metric_writers.METRICS, "a") as file:
        # Lines of something else are no values, and the last one may be half written.
        file.write('[]\n{}\n3\n{"step": "x", "train/loss": 1}\n{"step": 2, "train/loss": []}\n')
        file.write("[" * 100_000 + '\n{"step": 3, "train/lo')
    assert metric_writers.read_metrics(tmp_path) == {"train/loss": {1: 3.5, 2: 2.0}}


def test_a_new_run_keeps_the_lines_of_one_that_never_saved(tmp_path):
    for start in (None, 1, None):
        kept = metric_writers.MetricWriter(tmp_path, tensorboard=False, start=start)
        kept.write(1, {"loss": 1.0})
        kept.close()

    def lines(name):
        return len((tmp_path / name).read_text().splitlines())

    assert (lines("metrics-1.jsonl"), lines("metrics.jsonl")) == (2, 1)


def test_values_that_are_not_finite_are_still_json(tmp_path):
    kept = metric_writers.MetricWriter(tmp_path, tensorboard=True, start=None)
    kept.write(1, {"loss": float("nan")})
    kept.close()

    def refuse(word):
        raise AssertionError(word)

    text = (tmp_path / metric_writers.METRICS).read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "train/loss": None}


def test_the_learning_curve_is_drawn(tmp_path):
    assert curves.draw_learning_curve(tmp_path) is None
    kept = metric_writers.MetricWriter(tmp_path, tensorboard=False, start=None)
    for number in range(1, 200):
        kept.write(number, {"loss": 5 / number if number != 50 else float("nan")})
        if number % 50 == 0:
            measured = {"loss": 6 / number, "per": 100 / number, "target_tokens": 5}
            kept.write(number, measured, prefix="validation")
    kept.close()
    assert curves.draw_learning_curve(tmp_path).stat().st_size > 10_000


def test_a_smoothed_curve_begins_where_the_curve_does():
    values = np.array([5.0, np.nan, 4.0] + [3.0] * 500)
    smooth = curves.running_mean(values)
    assert smooth[0] == 5.0
    assert smooth[-1] == pytest.approx(3.0, abs=1e-3)
    assert np.isfinite(smooth).all()
