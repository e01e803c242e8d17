# SPDX-License-Identifier: Apache-2.0
"""Laws of runs that have a teacher: a run folder teaches a pair, live or by its answers."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from conftest import toy_model
from test_training_run import make_run, with_train

from t5x_lite import config
from t5x_lite.training import checkpoint, dry_run, loop, records


def as_teacher(run: config.Run, path: Path, **changes) -> config.Run:
    """The same data read by a decoder alone."""
    model = dataclasses.replace(toy_model("joined", layers=1, heads=2, **changes), vocab=512)
    return dataclasses.replace(run, model_dir=str(path), model=model)


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    """A finished teacher and a run of six steps that learns from it."""
    path = tmp_path_factory.mktemp("school")
    quiet = config.Evaluate(examples=0, batches=0)
    run = make_run(path, path / "run", steps=6, evaluate=quiet)
    teacher = as_teacher(with_train(run, steps=2), path / "teacher")
    loop.train(teacher)
    taught = config.Distillation(str(path / "teacher"), temperature=1.5, top_k=4)
    return dataclasses.replace(run, distillation=taught)


@pytest.fixture(scope="module")
def finished(school):
    loop.train(school)
    return school


def values(run: config.Run, name: str) -> list[float]:
    return list(records.read(Path(run.model_dir))[f"train/{name}"].values())


def elsewhere(run: config.Run, path: Path, **changes) -> config.Run:
    return dataclasses.replace(run, model_dir=str(path), **changes)


def assert_equal_ends(run, other):
    ends = [checkpoint.load_params(each.model_dir)[0] for each in (run, other)]
    import jax

    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_the_divergence_is_told_and_the_teacher_is_not_saved(finished):
    told = values(finished, "divergence")
    assert len(told) == 6 and all(0 < each < 10 for each in told)
    notes = checkpoint.readable_notes(Path(finished.model_dir) / checkpoint.FOLDER)
    names = notes[6].arrays["rest"]
    assert not any("teacher" in name for name in names)
    plain = dataclasses.replace(finished, distillation=None)
    assert "teacher" in dry_run.text(finished)
    assert "teacher" not in dry_run.text(plain)


def test_a_run_with_a_teacher_that_goes_on_has_the_same_bits(finished, tmp_path):
    run = elsewhere(finished, tmp_path / "run")
    loop.train(with_train(run, steps=3))
    loop.train(run)
    assert values(run, "divergence") == values(finished, "divergence")
    assert_equal_ends(run, finished)


def test_parts_that_go_on_in_their_warm_up_have_the_same_bits(school, tmp_path):
    parts = (
        config.Part(("*cross_attention*",)),
        config.Part(("*norm*",), rate=0),
        config.Part(("*",), begin=2, warmup=3),
    )
    plain = dataclasses.replace(school, distillation=None)
    run = with_train(elsewhere(plain, tmp_path / "whole"), parts=parts)
    loop.train(run)
    stopped = elsewhere(run, tmp_path / "stopped")
    loop.train(with_train(stopped, steps=3))
    loop.train(stopped)
    assert values(run, "loss") == values(stopped, "loss")
    assert_equal_ends(run, stopped)
