# SPDX-License-Identifier: Apache-2.0
"""Laws of checkpoints on a disk that fails, and beside a run that removes them: nothing is renamed,
begun anew or called damaged without need."""

import copy
import dataclasses
import errno
import functools
import json
import operator
import shutil
import threading
from pathlib import Path

import pytest
from test_training_checkpoint import (
    KEEP,
    assert_is,
    expected,
    make_state,
    mesh,  # noqa: F401 (a fixture of every test here)
    restore,
    save,
)

from t5x_lite import config, sharding
from t5x_lite.checkpoints import checkpoint_io, digests, manager, step_folders
from t5x_lite.checkpoints.checkpoint_io import (
    CheckpointError,
    CheckpointMetadata,
    CheckpointMismatchError,
    DamagedCheckpointError,
    RemovedCheckpointError,
    UnreadableCheckpointError,
)
from t5x_lite.checkpoints.manager import CheckpointManager

# What orbax's threads were doing when they met a damaged file.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_all_checkpoints_damaged_is_an_error_and_not_a_new_run(tmp_path):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / "checkpoints" / str(step) / "note" / "metadata").write_text("")
    for _ in range(3):
        with pytest.raises(DamagedCheckpointError, match="another MODEL_DIR.*--ignore_damaged"):
            restore(tmp_path)
        assert names(tmp_path) == ["1", "2"]
    # Set aside by hand, or by an earlier version: they are as little a reason to begin anew.
    for step in (1, 2):
        path = tmp_path / "checkpoints" / str(step)
        path.rename(path.with_name(f"{step}.damaged"))
    with pytest.raises(DamagedCheckpointError, match=r"1\.damaged, 2\.damaged"):
        restore(tmp_path)
    restored = CheckpointManager(tmp_path, KEEP).restore(expected(), print, ignore_damaged=True)
    assert restored is None


# A zero in front, digits of another script, signs, spaces, and numbers that no run reaches.
ODD_NAMES = ["02", "\u0662", "\u00b2", "+2", "2\n", " 2", "2.0", "1_0", 30 * "9", "4294967296"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_folder_by_another_name_is_no_step(tmp_path, name):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoints/1", tmp_path / "checkpoints" / name)
    assert step_folders.list_steps(tmp_path) == [1]
    assert_is(restore(tmp_path)[0][0], 1)
    assert manager.load_params(tmp_path)[1] == 1 and name in names(tmp_path)


def test_a_step_that_is_a_link_to_a_disk_that_is_gone_is_named_so(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints/2").symlink_to(tmp_path / "elsewhere/2")
    for read in (restore, manager.load_params):
        with pytest.raises(
            UnreadableCheckpointError, match=r"2 is a link to .*, which is not there"
        ):
            read(tmp_path)
    assert names(tmp_path) == ["1", "2"]
    (tmp_path / "elsewhere").mkdir()
    save(tmp_path / "other", 2)
    (tmp_path / "other/checkpoints/2").rename(tmp_path / "elsewhere/2")
    assert_is(restore(tmp_path)[0][0], 2)


def test_ignored_damaged_checkpoints_are_kept(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "1" / "note" / "metadata").write_text("")
    reports = []
    restored = CheckpointManager(tmp_path, KEEP).restore(expected(), reports.append, True)
    assert restored is None and len(reports) == 1
    assert names(tmp_path) == ["1.damaged"]


def unreadable_note(folder):
    """A disk that answers with an input/output error: what /proc/self/mem does at its beginning."""
    path = folder / "note" / "metadata"
    path.unlink()
    path.symlink_to("/proc/self/mem")


def unreadable_array(folder):
    """A file of an array that the system refuses to open."""
    path = max((folder / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("trouble", [unreadable_note, unreadable_array])
def test_what_cannot_be_read_now_is_not_damaged(tmp_path, trouble):
    save(tmp_path, 1, 2)
    trouble(tmp_path / "checkpoints" / "2")
    for _ in range(2):
        with pytest.raises(UnreadableCheckpointError, match="cannot be read now"):
            restore(tmp_path)
        with pytest.raises(UnreadableCheckpointError, match="cannot be read now"):
            manager.load_params(tmp_path)
        assert names(tmp_path) == ["1", "2"]


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path):
    (tmp_path / "checkpoints").symlink_to("checkpoints")
    with pytest.raises(OSError, match="symbolic links"):
        step_folders.list_steps(tmp_path)


def test_a_reader_takes_the_newer_step_of_a_run_that_trains(tmp_path):
    """Every checkpoint is removed as soon as there is a newer one, at drawn moments of reading."""
    cfg, stop = config.Checkpoint(every=1, keep=1), threading.Event()
    save(tmp_path, 1, cfg=cfg)

    def train():
        # A mesh is of the thread that sets it.
        sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
        saved, step = CheckpointManager(tmp_path, cfg), 1
        while not stop.is_set():
            step += 1
            saved.save(make_state(step), CheckpointMetadata(step, "config"))
            saved.wait()
        saved.close()

    run = threading.Thread(target=train)
    run.start()
    try:
        steps = [manager.load_params(tmp_path)[1] for _ in range(30)]
    finally:
        stop.set()
        run.join()
    assert steps == sorted(steps) and steps[-1] > 1


def test_a_checkpoint_removed_while_it_is_read_is_named_so(tmp_path, monkeypatch):
    save(tmp_path, 1)
    read = checkpoint_io.read_metadata

    def read_and_remove(folder):
        metadata = read(folder)
        shutil.rmtree(folder)
        return metadata

    monkeypatch.setattr(checkpoint_io, "read_metadata", read_and_remove)
    with pytest.raises(RemovedCheckpointError, match="was removed while it was read"):
        manager.load_params(tmp_path, step=1)


def test_checkpoints_of_earlier_versions_are_read_and_their_damage_is_seen(tmp_path):
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "1"
    metadata = checkpoint_io.read_metadata(folder)
    arrays = {
        item: {
            name: {"shape": each["shape"], "dtype": each["dtype"], digests.LINEAR: value}
            for name, each in of_item.items()
            for value in [digests.numpy_digest(read_arrays(folder, item)[name], mixed=False)]
        }
        for item, of_item in metadata.arrays.items()
    }
    checkpoint_io.write_metadata(folder, dataclasses.replace(metadata, arrays=arrays))
    assert_is(restore(tmp_path)[0][0], 1)
    assert manager.load_params(tmp_path)[1] == 1
    arrays["params"]["tower.norm"][digests.LINEAR] ^= 1
    checkpoint_io.write_metadata(folder, dataclasses.replace(metadata, arrays=arrays))
    with pytest.raises(DamagedCheckpointError, match=r"tower\.norm"):
        checkpoint_io.restore_arrays(folder, "params", checkpoint_io.read_metadata(folder))


def read_arrays(folder, item):
    metadata = checkpoint_io.read_metadata(folder)
    return checkpoint_io.restore_arrays(folder, item, metadata)


def test_a_writer_that_fails_in_the_background_is_noticed_before_the_next_save(
    tmp_path, monkeypatch
):
    saved = CheckpointManager(tmp_path, KEEP)
    saved.check_writer()
    saved.save(make_state(1), CheckpointMetadata(1, "config"))

    def failed():
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(saved.writer, "check_for_errors", failed)
    with pytest.raises(CheckpointError, match=r"(?s)step 1 could not be written.*Input/output"):
        saved.check_writer()


# Values that no run writes, under a checksum that fits: by hand, or by somebody else's program.
ODD_FIELDS = [
    (("step",), -1),
    (("step",), True),
    (("step",), "2"),
    (("config",), None),
    (("config",), "\ud800"),
    (("data",), [1]),
    (("metrics",), {"loss": "low"}),
    (("metrics",), {"loss": 10**400}),
    (("totals",), []),
    (("best",), ["loss"]),
    (("best",), ["loss", 1]),
    (("arrays",), {}),
    (("arrays", "params"), 0),
    (("arrays", "params", "w", "shape"), [-1]),
    (("arrays", "params", "w", "shape"), 8),
    (("arrays", "params", "w", "dtype"), "float33"),
    (("arrays", "params", "w", "dtype"), "i4,i4"),
    (("arrays", "params", "w", digests.MIXED), "0"),
    (("base",), {"w": None}),
]


def test_metadata_of_any_form_are_refused_by_field(tmp_path):
    save(tmp_path, 2)
    folder = tmp_path / "checkpoints/2"
    whole = json.loads((folder / "note/metadata").read_text())["note"]
    whole["arrays"]["params"]["w"] = next(iter(whole["arrays"]["params"].values()))
    for (*above, last), value in ODD_FIELDS:
        values = copy.deepcopy(whole)
        inner = functools.reduce(operator.getitem, above, values)
        inner[last] = value
        write_note(folder, values)
        with pytest.raises(DamagedCheckpointError, match=f"metadata.* its {(*above, last)[0]} is"):
            checkpoint_io.read_metadata(folder)
    for name in ("step", "config", "arrays"):
        write_note(folder, {key: value for key, value in whole.items() if key != name})
        with pytest.raises(DamagedCheckpointError, match=f"metadata.* has no {name}"):
            checkpoint_io.read_metadata(folder)
    write_note(folder, whole | {"colour": 1})
    with pytest.raises(CheckpointMismatchError, match=r"does not know \(colour\)"):
        checkpoint_io.read_metadata(folder)
    write_note(folder, whole)
    assert checkpoint_io.read_metadata(folder).step == 2


def write_note(folder: Path, values: dict) -> None:
    """Writes metadata with the checksum that fits them."""
    check = checkpoint_io.metadata_checksum(values)
    (folder / "note/metadata").write_text(json.dumps({"note": values, "check": check}))
