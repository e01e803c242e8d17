# SPDX-License-Identifier: Apache-2.0
"""Laws of a run's vocabulary: once weights depend on it, the one in MODEL_DIR decides."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from test_training_run import make_run, with_train

from t5x_lite import config, data
from t5x_lite import eval as eval_command
from t5x_lite.checkpoints import step_folders
from t5x_lite.tokenizers import vocabularies
from t5x_lite.training import loop

UNMEASURED = config.Evaluate(examples=0, batches=0)


def with_vocabulary(run: config.Run, vocabulary: config.Vocabulary) -> config.Run:
    task = dataclasses.replace(run.data.task, vocabulary=vocabulary)
    return dataclasses.replace(run, data=dataclasses.replace(run.data, task=task))


@pytest.fixture
def source(tmp_path) -> config.Run:
    """A finished run whose weights and vocabulary others begin with."""
    run = make_run(tmp_path, tmp_path / "source", 1, evaluate=UNMEASURED)
    loop.train(run)
    return run


@pytest.mark.slow
def test_a_fine_tuned_run_is_whole_in_its_folder(tmp_path, source, capsys):
    run = make_run(
        tmp_path,
        tmp_path / "run",
        2,
        evaluate=UNMEASURED,
        checkpoint=config.Checkpoint(initial=source.model_dir),
    )
    run = with_vocabulary(run, config.Vocabulary("checkpoint", path=source.model_dir))
    loop.train(run)
    shutil.rmtree(source.model_dir)
    assert loop.train(with_train(run, steps=3))["steps"] == 3
    (tmp_path / "train.tsv").unlink()
    words = [f"--checkpoint={run.model_dir}", "--examples=0", "--batches=1"]
    assert eval_command.main([*words, f"--json={tmp_path / 'numbers.json'}"]) == 0
    assert json.loads((tmp_path / "numbers.json").read_text())["metrics"]["loss"] > 0


@pytest.mark.slow
def test_a_trained_vocabulary_is_not_trained_again_from_changed_files(tmp_path, capsys):
    run = make_run(tmp_path, tmp_path / "run", 2, evaluate=UNMEASURED)
    run = with_vocabulary(run, config.Vocabulary("trained", size=270, extra_ids=2))
    loop.train(run)
    folder = Path(run.model_dir) / "vocabulary"
    before = vocabularies.fingerprint(data.load_pair(folder)[1])
    train = Path(run.data.task.train)
    train.write_text(train.read_text() + "\n".join(["abab\tbaba"] * 200) + "\n")
    shutil.rmtree(tmp_path / "c")
    opened = data.open_dataset(data.with_run_vocabulary(run).data, "validation")
    assert vocabularies.fingerprint(opened.vocabularies[1]) == before
    anew = data.open_dataset(run.data, "validation")
    assert vocabularies.fingerprint(anew.vocabularies[1]) != before
    assert eval_command.main([f"--checkpoint={run.model_dir}", "--examples=0", "--batches=1"]) == 0
    with pytest.raises(ValueError, match="training data of backwards have changed"):
        loop.train(with_train(run, steps=3))
    assert vocabularies.fingerprint(data.load_pair(folder)[1]) == before


@pytest.mark.slow
def test_before_the_first_checkpoint_the_config_decides(tmp_path):
    run = make_run(tmp_path, tmp_path / "run", 2, evaluate=UNMEASURED)
    other = vocabularies.ByteVocabulary(extra_ids=7)
    data.save_pair(Path(run.model_dir) / "vocabulary", other, other)
    assert data.with_run_vocabulary(run) == run
    loop.train(run)
    saved = data.load_pair(Path(run.model_dir) / "vocabulary")[1]
    assert saved.size == vocabularies.ByteVocabulary().size


@pytest.mark.slow
def test_the_tokens_are_those_of_before(tmp_path):
    """The vocabulary of MODEL_DIR gives the same identity: nothing is tokenized again."""
    for kind in ("bytes", "trained"):
        run = make_run(tmp_path, tmp_path / kind, 1, evaluate=UNMEASURED)
        fields = dict(size=270) if kind == "trained" else {}
        run = with_vocabulary(run, config.Vocabulary(kind, extra_ids=3, **fields))
        loop.train(run)
        cached = sorted(path.name for path in (tmp_path / "c").iterdir())
        loop.train(with_train(run, steps=2))
        assert sorted(path.name for path in (tmp_path / "c").iterdir()) == cached


@pytest.mark.slow
def test_a_task_whose_own_vocabulary_changed_is_refused(tmp_path, source):
    pair = data.load_pair(Path(source.model_dir) / "vocabulary")
    data.check_run_vocabulary(source.model_dir, pair)
    other = vocabularies.ByteVocabulary(extra_ids=7)
    with pytest.raises(ValueError, match="not the one in .*vocabulary"):
        data.check_run_vocabulary(source.model_dir, (pair[0], other))
    assert step_folders.list_steps(source.model_dir) == [1]
    data.check_run_vocabulary(tmp_path / "nowhere", (other, other))
