# SPDX-License-Identifier: Apache-2.0
"""Laws of checkpoints in stores: training waits for no answer, and no error is lost."""

import threading

import pytest
from test_training_checkpoint import assert_is, make_state, mesh, restore  # noqa: F401 (a fixture)

from t5x_lite import config
from t5x_lite.checkpoints import checkpoint_io, step_folders
from t5x_lite.checkpoints.checkpoint_io import CheckpointMetadata, CheckpointWriteError
from t5x_lite.checkpoints.manager import CheckpointManager
from t5x_lite.utils.paths import parse_path


@pytest.mark.slow
def test_saving_waits_for_no_answer_of_a_store(store):
    place = store.address("held")
    saved = CheckpointManager(place, config.Checkpoint(keep=1, metric="per"))
    saved.read_vocabulary()
    answers, waited = threading.Event(), []

    def hold(method: str, path: str) -> str:
        if not answers.wait(20):
            waited.append(path)
        return ""

    for step, value in ((1, 3.0), (2, 5.0), (3, 4.0)):
        answers.clear()
        with store.failing(hold):
            saved.save(make_state(step), CheckpointMetadata(step, "config"))
            saved.add_metrics(step, {"per": value})
            saved.check_writer()
            answers.set()
            saved.wait()
    assert waited == []
    saved.close()
    root = parse_path(place) / "checkpoints"
    assert [checkpoint_io.read_metadata(root / f"{n}").metrics["per"] for n in (1, 3)] == [3.0, 4.0]
    (state, _), _ = restore(place)
    assert_is(state, 3)


def test_metrics_that_cannot_be_added_end_the_run(store, monkeypatch):
    def refuse(folder, metadata):
        raise OSError("no answer")

    saved = CheckpointManager(store.address("refused"), config.Checkpoint())
    saved.save(make_state(1), CheckpointMetadata(1, "config"))
    monkeypatch.setattr(checkpoint_io, "write_metadata", refuse)
    saved.add_metrics(1, {"per": 3.0})
    with pytest.raises(CheckpointWriteError, match="step 1 could not be written.*no answer"):
        saved.wait()
    saved.close()
    assert step_folders.list_steps(store.address("refused")) == [1]
