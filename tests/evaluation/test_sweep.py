# SPDX-License-Identifier: Apache-2.0
"""Laws of sweeps: each combination is what eval measures alone, and contradictions are shown."""

import dataclasses

import pytest
from test_evaluation_evaluate import random_params, run_of

from t5x_lite import config, sharding
from t5x_lite.evaluation import sweep
from t5x_lite.evaluation.evaluate import Evaluator


def test_a_grid_is_read_and_what_is_none_says_why():
    grid = sweep.parse_grid(["temperature=0,0.5", "drafter=plain,lookup+trigram", "logprobs=none"])
    assert grid == {
        "temperature": [0, 0.5],
        "drafter": ["plain", "lookup+trigram"],
        "logprobs": [None],
    }
    for text, words in {
        "temperature": "no NAME=A,B",
        "temperature=": "no NAME=A,B",
        "temprature=1": "did you mean temperature",
    }.items():
        with pytest.raises(ValueError, match=words):
            sweep.parse_grid([text])
    with pytest.raises(ValueError, match="names beams twice"):
        sweep.parse_grid(["beams=1", "beams=2"])


@pytest.mark.slow
def test_a_combination_is_measured_as_eval_measures_it(tmp_path):
    sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    run = run_of(tmp_path, evaluate=config.Evaluate(batches=0, batch_size=6, examples=5))
    params = random_params(run)
    grid = {"temperature": [0, 1.0], "beams": [1, 2]}
    points = sweep.run_sweep(run, params, None, grid)
    assert [point.settings for point in points] == [
        {"temperature": t, "beams": b} for t in (0, 1.0) for b in (1, 2)
    ]
    assert "it cannot also sample" in points[3].reason and not points[3].values
    for point in points[:3]:
        decode = dataclasses.replace(run.decode, **point.settings)
        alone = Evaluator(dataclasses.replace(run, decode=decode))(params, 0)
        assert point.values and point.values.items() <= alone.items()
        assert point.tokens_per_second > 0
    text = sweep.format_table(points)
    assert text.count("not possible") == 1 and "sensitivity: range of per" in text
    sweep.draw_plot(points, tmp_path / "sweep.svg")
    assert "beams=2" in (tmp_path / "sweep.svg").read_text()
    with pytest.raises(ValueError, match="cannot also sample"):
        sweep.run_sweep(run, params, None, {"temperature": [1.0], "beams": [2]})


def test_sensitivity_is_the_mean_range_along_a_field():
    values = {(0, 1): 1.0, (0, 2): 4.0, (1, 1): 3.0, (1, 2): 5.0}
    points = [
        sweep.SweepPoint({"top_k": a, "beams": b}, {"per": value})
        for (a, b), value in values.items()
    ]
    points.append(sweep.SweepPoint({"top_k": 2, "beams": 1}, {}, reason="no"))
    assert sweep.sensitivity(points, "per") == {"top_k": 1.5, "beams": 2.5}
