# SPDX-License-Identifier: Apache-2.0
"""Law: what a config accepts computes, or is refused by name: every number at both of its ends."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_model, toy_stack
from test_ranges import CASES, Number

from t5x_lite import config, model, sharding
from t5x_lite.config.checked import LARGEST_FLOAT, LARGEST_INT, SMALLEST_FLOAT
from t5x_lite.config.decoding import FILTERS
from t5x_lite.config.windows import LengthLimits
from t5x_lite.data import mixing, objectives
from t5x_lite.decoding import sampling
from t5x_lite.decoding.request import Request
from t5x_lite.kernels import relative
from t5x_lite.tokenizers import vocabularies
from t5x_lite.training import optimizer, schedules

LOGITS = np.random.default_rng(0).normal(size=(1, 1, 11)).astype(np.float32)


def ends(number: Number) -> list[float]:
    """The least and the most that a number can be."""
    least, most, open_end, _ = number.limits
    if number.kind is int:
        return [int(least), int(most)]
    least = max(least, -LARGEST_FLOAT)
    if least == 0 and open_end in ("least", "both"):
        least = SMALLEST_FLOAT
    if math.isfinite(most) and open_end in ("most", "both"):
        most = float(np.nextafter(np.float32(most), np.float32(-math.inf)))
    return [least, min(most, LARGEST_FLOAT)]


def of_class(*kinds: type) -> list:
    """Fields of these classes with each of their ends."""
    cases = []
    for case in CASES:
        sample, name, number = case.values
        if isinstance(sample, kinds):
            cases += [
                pytest.param(sample, name, number.wrap(value), id=f"{case.id}={value:g}")
                for value in ends(number)
            ]
    return cases


def at_end(sample, name, value):
    """The sample with an end; skips what another field of it rules out, in a message with its name.

    Args:
      sample: one of a config dataclass.
      name: its field.
      value: an end of its range.
    """
    try:
        return dataclasses.replace(sample, **{name: value})
    except ValueError as error:
        assert f"{type(sample).__name__}." in str(error)
        pytest.skip(str(error))


@pytest.mark.parametrize("sample, name, value", of_class(config.Schedule))
@pytest.mark.parametrize("kind", ["constant", "rsqrt", "linear", "cosine", "wsd"])
def test_rates_are_finite_and_at_most_the_peak(sample, name, value, kind):
    cfg = at_end(dataclasses.replace(sample, kind=kind, warmup=3), name, value)
    for steps in (1, 4, LARGEST_INT):
        rate = schedules.learning_rate(cfg, steps)
        rates = np.array([rate(step) for step in {0, 1, steps // 2, steps - 1}], np.float64)
        assert (rates >= 0).all() and (rates <= cfg.peak * (1 + 1e-6)).all(), (steps, rates)


@pytest.mark.parametrize("sample, name, value", of_class(config.Optimizer))
@pytest.mark.parametrize("rule", ["adafactor", "adamw"])
def test_an_update_has_no_nan(sample, name, value, rule):
    if name == "options":
        pytest.skip("optax says what each may be")
    cfg = at_end(dataclasses.replace(sample, name=rule, options={}), name, value)
    params = {"w": jnp.ones((4, 4))}
    rate = schedules.learning_rate(config.Schedule("constant", 1e-3), 4)
    rule = optimizer.make_optimizer(cfg, rate, {"w": "embed mlp"})
    updates, _ = rule.update({"w": jnp.full((4, 4), 0.1)}, rule.init(params), params)
    assert not np.isnan(updates["w"]).any()


DRAWING = [
    case for case in of_class(config.Decode) if case.values[1] in (*FILTERS, "temperature", "seed")
]


@pytest.mark.slow
@pytest.mark.parametrize("sample, name, value", DRAWING)
def test_a_token_is_drawn_from_what_the_filters_leave(sample, name, value):
    warm = dataclasses.replace(sample, temperature=1.0)
    cfg = at_end(warm, name, value)
    rows = np.zeros(1, np.uint32)
    request = Request(None, None, None, None, None, rows + cfg.seed, rows)
    params = sampling.make_sampling_params(request, cfg)
    kept = np.asarray(sampling.warp_logits(LOGITS, params))
    assert not np.isnan(kept).any() and np.isfinite(kept).any()
    token = int(sampling.choose_tokens(LOGITS, np.zeros((1, 1), np.int32), params)[0, 0])
    assert 0 <= token < LOGITS.size and np.isfinite(kept[0, 0, token])


KINDS = config.SpanCorruption, config.PrefixLM, config.FillInTheMiddle


@pytest.mark.parametrize("sample, name, value", of_class(*KINDS))
@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only", "encoder_only"])
def test_an_objective_cuts_a_text_or_is_refused_by_name(sample, name, value, layout):
    objective = at_end(sample, name, value)
    limits = LengthLimits(16, 16, layout)
    try:
        cut = objectives.make_preprocessor(objective, limits, vocabularies.ByteVocabulary(32))
    except ValueError as error:
        assert "Data.lengths" in str(error) or type(objective).__name__ in str(error)
        return
    windows = np.arange(3, 3 + 2 * cut.window, dtype=np.int32).reshape(2, -1)
    inputs, targets, weights = cut(windows, np.arange(2, dtype=np.uint64))
    assert targets.lengths.min() > 0 and np.isfinite(weights).all()
    sizes = [0 if part is None else part.lengths for part in (inputs, targets)]
    together = layout == "decoder_only"
    assert np.max(sum(sizes)) <= 32 and (together or max(np.max(each) for each in sizes) <= 16)


@pytest.mark.parametrize("rate", [SMALLEST_FLOAT, 1.0, LARGEST_FLOAT])
def test_a_mixture_has_shares_that_sum_to_one(rate):
    shares = np.array(config.Mixture(("a", "b"), (rate, LARGEST_FLOAT)).rates)
    counts = mixing.block_counts(shares / shares.sum())
    assert counts.sum() > 0 and (counts >= 0).all()


@pytest.mark.parametrize("buckets", [2, 4, 32, 4096])
@pytest.mark.parametrize("far", [4, 2**24, LARGEST_INT])
def test_boundaries_of_relative_distances_rise(buckets, far):
    far = max(far, buckets // 2 + 1)
    boundaries = relative.bucket_boundaries(buckets, far)
    assert len(boundaries) == buckets - 1 and list(boundaries) == sorted(boundaries)
    assert boundaries[-1] <= far + 1


@pytest.mark.slow
@pytest.mark.parametrize("form", ["below", "within", "halved"])
def test_the_widest_window_is_none(form):
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    cfg = toy_model("encoder_decoder", layers=1, positions="rotary")
    wide = dict(pattern=("sliding",), window=LARGEST_INT, window_form=form)
    stack = toy_stack(layers=1, positions="rotary")
    stacks = dict(
        encoder=dataclasses.replace(stack, **wide), decoder=dataclasses.replace(stack, **wide)
    )
    windowed = dataclasses.replace(cfg, **stacks)
    params = model.initialize(cfg, jax.random.key(0))
    ids = np.arange(2, 14, dtype=np.int32)[None]
    read = model.InspectionInputs(ids, np.array([12]), np.array([1]), ids, np.array([12]))
    logits = [
        model.Inspected(each, scan=False).apply(
            {"params": model.unstack(params)}, read, method=model.Inspected.next_token_logits
        )
        for each in (cfg, windowed)
    ]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)
