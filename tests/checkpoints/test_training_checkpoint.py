# SPDX-License-Identifier: Apache-2.0
"""Laws of checkpoints: what is written comes back, and damage is reported."""

import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_model
from jax.sharding import NamedSharding

from t5x_lite import config, sharding
from t5x_lite.checkpoints import checkpoint_io, manager, run_folder, step_folders
from t5x_lite.checkpoints.checkpoint_io import (
    CheckpointError,
    CheckpointMetadata,
    CheckpointMismatchError,
)
from t5x_lite.checkpoints.manager import CheckpointManager
from t5x_lite.checkpoints.train_state import TrainState
from t5x_lite.config import gin_file
from t5x_lite.training import setup

# What orbax's threads were doing when they met a damaged file.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

KEEP = config.Checkpoint(keep=2)
AXES = {"tower": {"weight": "embed mlp", "norm": "norm"}}
# Large enough that orbax keeps the values in files of their own.
SHAPES = {"tower": {"weight": (64, 512), "norm": (8,)}}


@pytest.fixture(autouse=True)
def mesh():
    sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))


def make_state(step: int, shapes=SHAPES) -> TrainState:
    draw = np.random.default_rng(step)

    def place(shape, axes):
        return sharding.place(draw.normal(size=shape).astype(np.float32), axes)

    def number(value):
        return jax.device_put(jnp.int32(value), NamedSharding(current(), spec()))

    params = jax.tree.map(place, shapes, AXES, is_leaf=lambda x: isinstance(x, tuple))
    moments = (jax.tree.map(lambda weight: weight * 2, params), {"none": None, "count": number(3)})
    return TrainState(number(step), params, moments, number(0), number(0))


def current():
    return jax.sharding.get_mesh()


def spec():
    return jax.sharding.PartitionSpec()


def expected(shapes=SHAPES):
    def as_shape(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    return jax.tree.map(as_shape, make_state(0, shapes))


def save(folder, *steps, cfg=KEEP, metrics=None) -> None:
    saved = CheckpointManager(folder, cfg)
    for step in steps:
        values = {} if metrics is None else {"per": metrics[step]}
        saved.save(
            make_state(step),
            CheckpointMetadata(step, "config", {"at": step}, values, {"seconds": 1.5}),
        )
    saved.close()


def restore(folder, shapes=SHAPES):
    reports = []
    return CheckpointManager(folder, KEEP).restore(expected(shapes), reports.append), reports


def assert_is(state: TrainState, step: int) -> None:
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(make_state(step)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def files(folder, step):
    """The data files of a checkpoint, largest first."""
    paths = [path for path in (folder / "checkpoints" / str(step)).rglob("*") if path.is_file()]
    return sorted(paths, key=lambda path: -path.stat().st_size)


def test_what_is_saved_comes_back_bit_for_bit_with_its_note(tmp_path):
    save(tmp_path, 5)
    (state, note), reports = restore(tmp_path)
    assert_is(state, 5)
    assert (note.step, note.config, note.data, note.totals) == (
        *(5, "config"),
        *({"at": 5}, {"seconds": 1.5}),
    )
    assert reports == []


def test_a_checkpoint_restores_onto_another_mesh(tmp_path):
    save(tmp_path, 5)
    sharding.use_mesh(config.Mesh(data=1, fsdp=4, tensor=2))
    (state, _), _ = restore(tmp_path)
    assert_is(state, 5)
    assert state.params["tower"]["weight"].sharding == sharding.named_sharding("embed mlp")


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    cfg = config.Checkpoint(keep=2, metric="per")
    save(tmp_path, 1, 2, 3, 4, 5, cfg=cfg, metrics={1: 9.0, 2: 3.0, 3: 5.0, 4: np.nan, 5: 8.0})
    assert step_folders.list_steps(tmp_path) == [2, 4, 5]
    params, step = manager.load_params(tmp_path, best=True)
    assert step == 2
    np.testing.assert_array_equal(params["tower"]["norm"], make_state(2).params["tower"]["norm"])


def test_the_best_is_the_highest_where_higher_is_better(tmp_path):
    cfg = config.Checkpoint(keep=1, metric="per", higher_is_better=True)
    save(tmp_path, 1, 2, 3, cfg=cfg, metrics={1: 1.0, 2: 3.0, 3: 2.0})
    save(tmp_path, 4, cfg=cfg, metrics={4: 2.5})
    assert step_folders.list_steps(tmp_path) == [2, 4]


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, truncate, lambda path: path.unlink()])
def test_a_damaged_newest_is_reported_and_kept_and_the_one_before_used(tmp_path, damage):
    save(tmp_path, 1, 2)
    before = len(files(tmp_path, 2))
    for path in files(tmp_path, 2):
        damage(path)
    (state, note), reports = restore(tmp_path)
    assert_is(state, 1)
    assert note.step == 1
    assert "2" in reports[0] and "amaged" in reports[0]
    aside = tmp_path / "checkpoints" / "2.damaged"
    left = [path for path in aside.rglob("*") if path.is_file()]
    assert len(left) == (before if damage in (flip, truncate) else 0)
    save(tmp_path, 2)
    assert_is(restore(tmp_path)[0][0], 2)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip, truncate, lambda path: path.unlink()])
def test_damage_to_any_one_file_never_gives_wrong_numbers(tmp_path, damage):
    save(tmp_path / "whole", 1)
    for number, path in enumerate(files(tmp_path / "whole", 1)):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(tmp_path / "whole", copy)
        damage(copy / path.relative_to(tmp_path / "whole"))
        try:
            (state, _), _ = restore(copy)
        except CheckpointError:
            continue
        assert_is(state, 1)


def test_an_evaluation_is_added_to_a_checkpoint_that_is_complete(tmp_path):
    cfg = config.Checkpoint(keep=1, metric="per")
    saved = CheckpointManager(tmp_path, cfg)
    for step, value in ((1, 3.0), (2, 5.0), (3, 4.0)):
        saved.save(make_state(step), CheckpointMetadata(step, "config"))
        saved.add_metrics(step, {"per": value})
    saved.close()
    assert step_folders.list_steps(tmp_path) == [1, 3]
    assert checkpoint_io.read_metadata(tmp_path / "checkpoints" / "3").metrics == {"per": 4.0}
    assert_is(restore(tmp_path)[0][0], 3)
    assert manager.load_params(tmp_path, best=True)[1] == 1


def test_a_checkpoint_of_another_model_is_refused_with_the_shapes(tmp_path):
    save(tmp_path, 1)
    other = {"tower": {"weight": (64, 256), "norm": (8,)}}
    with pytest.raises(
        CheckpointMismatchError, match=r"tower\.weight: checkpoint \(64, 512\), run \(64, 256\)"
    ):
        restore(tmp_path, other)
    run = run_folder.model_only_run(tmp_path, toy_model("decoder_only"))
    (tmp_path / "config.gin").write_text(gin_file.to_text(run))
    with pytest.raises(CheckpointError, match=r"(?s)Checkpoint\.initial.*tower\.weight"):
        setup.initial_weights(str(tmp_path), toy_model("decoder_only"), expected(other).params)
    restored = setup.initial_weights(str(tmp_path), toy_model("decoder_only"), expected().params)
    jax.tree.map(np.testing.assert_array_equal, restored, make_state(1).params)


def no_room(saved, monkeypatch):
    """The disk is found full before anything is written."""
    usage = shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def fills_up(saved, monkeypatch):
    """The disk is found full by the writer."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "Error writing x: No space left on device")

    monkeypatch.setattr(saved.writer, "save", full)


@pytest.mark.parametrize("trouble", [no_room, fills_up])
def test_a_full_disk_is_reported_and_leaves_the_checkpoint_before(tmp_path, monkeypatch, trouble):
    saved = CheckpointManager(tmp_path, KEEP)
    saved.save(make_state(1), CheckpointMetadata(1, "config"))
    saved.wait()
    trouble(saved, monkeypatch)
    with pytest.raises(CheckpointError, match=r"(?s)step 2.*No space left.*step 1 is complete"):
        saved.save(make_state(2), CheckpointMetadata(2, "config"))
    assert_is(restore(tmp_path)[0][0], 1)


def test_half_written_and_half_deleted_ones_are_not_seen(tmp_path):
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "1", folder / f"7{step_folders.UNFINISHED}-123")
    shutil.copytree(folder / "1", folder / f"6{step_folders.DELETING}")
    assert step_folders.list_steps(tmp_path) == [1]
    assert_is(restore(tmp_path)[0][0], 1)
    assert sorted(path.name for path in folder.iterdir()) == ["1"]


def test_weights_are_found_by_step_and_a_wrong_one_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="MODEL_DIR"):
        manager.load_params(tmp_path)
    save(tmp_path, 1, 2)
    params, step = manager.load_params(tmp_path, step=1)
    assert step == 1
    assert isinstance(params["tower"]["weight"], np.ndarray)
    np.testing.assert_array_equal(params["tower"]["norm"], make_state(1).params["tower"]["norm"])
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7; it has \[1, 2\]"):
        manager.load_params(tmp_path, step=7)
    with pytest.raises(CheckpointError, match=r"Checkpoint\.metric"):
        manager.load_params(tmp_path, best=True)
    for path in files(tmp_path, 2):
        truncate(path)
    with pytest.warns(UserWarning, match="before"):
        assert manager.load_params(tmp_path)[1] == 1


def test_notes_are_plain_json(tmp_path):
    save(tmp_path, 3)
    path = tmp_path / "checkpoints" / "3" / "note" / "metadata"
    note = json.loads(path.read_text())["note"]
    assert note["arrays"]["params"]["tower.weight"]["shape"] == [64, 512]
