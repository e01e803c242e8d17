# SPDX-License-Identifier: Apache-2.0
"""Laws of runs that have a teacher: a run folder teaches a pair, live or by its answers."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_model
from test_training_run import make_run, with_train

from t5x_lite import config, data, distill
from t5x_lite.adaptation import teacher as teachers
from t5x_lite.adaptation import teacher_logits
from t5x_lite.checkpoints import manager, selection
from t5x_lite.config import gin_file
from t5x_lite.training import loop, preflight, setup
from t5x_lite.training.reporting import dry_run, metric_writers, overview


def as_teacher(run: config.Run, path: Path, **changes) -> config.Run:
    """The run at a path whose data are read by a decoder alone; changes are fields of its model."""
    model = dataclasses.replace(toy_model("decoder_only", layers=1, heads=2, **changes), vocab=512)
    return dataclasses.replace(run, model_dir=str(path), model=model)


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    """A finished teacher and a run of six steps that learns from it."""
    path = tmp_path_factory.mktemp("school")
    quiet = config.Evaluate(examples=0, batches=0)
    run = make_run(path, path / "run", steps=6, evaluate=quiet)
    teacher = as_teacher(with_train(run, steps=2), path / "teacher")
    loop.train(teacher)
    distillation = config.Distillation(str(path / "teacher"), temperature=1.5, top_k=4)
    return dataclasses.replace(run, distillation=distillation)


@pytest.fixture(scope="module")
def finished(school):
    loop.train(school)
    return school


def values(run: config.Run, name: str) -> list[float]:
    return list(metric_writers.read_metrics(Path(run.model_dir))[f"train/{name}"].values())


def elsewhere(run: config.Run, path: Path, **changes) -> config.Run:
    return dataclasses.replace(run, model_dir=str(path), **changes)


def assert_equal_ends(run, other):
    ends = [manager.load_params(each.model_dir)[0] for each in (run, other)]
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.slow
def test_the_divergence_is_reported_and_the_teacher_is_not_saved(finished):
    divergences = values(finished, "divergence")
    assert len(divergences) == 6 and all(0 < each < 10 for each in divergences)
    notes = selection.readable_metadata(Path(finished.model_dir) / manager.FOLDER)
    names = notes[6].arrays["rest"]
    assert not any("teacher" in name for name in names)
    plain = dataclasses.replace(finished, distillation=None)
    assert "teacher" in dry_run.describe_run(finished)
    assert "teacher" not in dry_run.describe_run(plain)


@pytest.mark.slow
def test_the_memory_of_a_run_has_its_teacher_in_it(school, tmp_path, monkeypatch):
    run = elsewhere(school, tmp_path / "run")
    teacher = teachers.open_teacher(run, data.open_vocabularies(run.data))
    size = sum(
        jnp.dtype(leaf.dtype).itemsize * leaf.size for leaf in jax.tree.leaves(teacher.params())
    )
    shapes = setup.assemble_run(run).shapes
    own_bytes = sum(overview.state_bytes(run, shapes).values())
    # Enough for the run alone, and one byte too little with its teacher.
    monkeypatch.setattr(preflight, "device_memory", lambda: own_bytes + size - 1)
    preflight.check_memory(run, shapes)
    for refuse in (lambda: loop.train(run), lambda: preflight.check_run(run, print)):
        with pytest.raises(
            ValueError, match=r"GB of each device besides activations \(.*, teacher 0.0 GB\)"
        ):
            refuse()
    monkeypatch.setattr(preflight, "device_memory", lambda: own_bytes + size)
    preflight.check_run(run, print)


@pytest.mark.slow
def test_a_run_with_a_teacher_that_goes_on_has_the_same_bits(finished, tmp_path):
    run = elsewhere(finished, tmp_path / "run")
    loop.train(with_train(run, steps=3))
    loop.train(run)
    assert values(run, "divergence") == values(finished, "divergence")
    assert_equal_ends(run, finished)


@pytest.mark.slow
def test_parts_that_go_on_in_their_warm_up_have_the_same_bits(school, tmp_path):
    parts = (
        config.ParamGroup(("*cross_attention*",)),
        config.ParamGroup(("*norm*",), rate=0),
        config.ParamGroup(("*",), begin=2, warmup=3),
    )
    plain = dataclasses.replace(school, distillation=None)
    run = with_train(elsewhere(plain, tmp_path / "whole"), param_groups=parts)
    loop.train(run)
    stopped = elsewhere(run, tmp_path / "stopped")
    loop.train(with_train(stopped, steps=3))
    loop.train(stopped)
    assert values(run, "loss") == values(stopped, "loss")
    assert_equal_ends(run, stopped)


def write_gin(run: config.Run, path: Path) -> str:
    path.write_text(gin_file.to_text(run))
    return str(path)


@pytest.fixture(scope="module")
def answered(school, tmp_path_factory):
    """The folder of the teacher's answers, written in two goes, one of them ended in a chunk."""
    path = tmp_path_factory.mktemp("answers")
    file, output = write_gin(school, path / "run.gin"), str(path / "answers")
    command = ["answers", f"--gin_file={file}", f"--output={output}", "--chunk=4"]
    distill.main([*command, "--steps=3"])
    (path / "answers" / "00000004.unfinished").mkdir()
    distill.main(command)
    return output


def with_answers(run: config.Run, folder: str, **changes) -> config.Run:
    distillation = dataclasses.replace(run.distillation, answers=folder, **changes)
    return dataclasses.replace(run, distillation=distillation)


@pytest.mark.slow
def test_answers_give_the_losses_of_the_teacher_itself(finished, answered, tmp_path):
    run = with_answers(elsewhere(finished, tmp_path / "run"), answered)
    loop.train(run)
    for name in ("loss", "objective", "divergence", "gradient_norm"):
        np.testing.assert_allclose(values(run, name), values(finished, name), rtol=1e-5)
    stored = sorted(path.name for path in Path(answered).iterdir())
    assert stored == [".lock", "00000000", "00000004", "settings.json"]
    ids = np.load(Path(answered) / "00000004" / "ids.npy")
    assert ids.shape == (2, 8, 16, 4) and ids.dtype == np.uint16


def test_answers_written_at_once_are_those_written_in_pieces(school, answered, tmp_path):
    file = write_gin(school, tmp_path / "run.gin")
    distill.main(["answers", f"--gin_file={file}", f"--output={tmp_path / 'a'}", "--chunk=4"])
    for path in Path(answered).glob("*/*.npy"):
        whole = np.load(tmp_path / "a" / path.relative_to(answered))
        np.testing.assert_array_equal(np.load(path), whole)


def raise_ids(folder: Path) -> None:
    ids = np.load(folder / "ids.npy")
    np.save(folder / "ids.npy", np.full_like(ids, 60_000))


def zero_rows(folder: Path) -> None:
    path = folder / "rows.npy"
    path.write_bytes(bytes(path.stat().st_size))


def lose_probabilities(folder: Path) -> None:
    (folder / "log_probabilities.npy").unlink()


@pytest.mark.parametrize("damage", [raise_ids, zero_rows, lose_probabilities])
def test_damaged_answers_are_refused_and_written_again(damage, school, answered, tmp_path, caplog):
    folder = tmp_path / "answers"
    shutil.copytree(answered, folder)
    run = with_answers(school, str(folder))
    batch = data.open_batches(run.data, run.model.layout, run.train.batch_size, run.seed).at(5)
    wanted = teacher_logits.SavedTeacherLogits(run).teacher_data(batch, 5)
    damage(folder / "00000004")
    with pytest.raises(ValueError, match="00000004 is damaged .*distill answers|has answers for 4"):
        teacher_logits.SavedTeacherLogits(run).teacher_data(batch, 5)
    file = write_gin(school, tmp_path / "run.gin")
    distill.main(["answers", f"--gin_file={file}", f"--output={folder}", "--chunk=4"])
    assert "00000004 is damaged" in caplog.text and "written again" in caplog.text
    again = teacher_logits.SavedTeacherLogits(run).teacher_data(batch, 5)
    np.testing.assert_array_equal(again.ids, wanted.ids)
    np.testing.assert_array_equal(again.log_probabilities, wanted.log_probabilities)


def test_answers_have_ids_of_the_model(school, answered, tmp_path):
    run = with_answers(school, answered)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab=2))
    with pytest.raises(
        ValueError, match="but Model.vocab is 2: they are of a teacher with another"
    ):
        teacher_logits.SavedTeacherLogits(run).open(0)


@pytest.mark.slow
def test_answers_of_another_run_are_refused(school, answered, tmp_path):
    run = with_answers(elsewhere(school, tmp_path / "run"), answered)
    cases = {
        "temperature 1.5, but here it is 2": with_answers(run, answered, temperature=2.0),
        "top_k 4": with_answers(run, answered, top_k=3),
        "answers for 6 steps, but Train.steps is 7": with_train(run, steps=7),
        "step 0 are of other data": dataclasses.replace(run, seed=1),
        "holds no answers": with_answers(run, str(tmp_path)),
        "batch_size 8": with_train(run, batch_size=16),
    }
    for message, other in cases.items():
        with pytest.raises(ValueError, match=message):
            loop.train(other)
    file = write_gin(dataclasses.replace(school, seed=1), tmp_path / "run.gin")
    with pytest.raises(SystemExit):
        distill.main(["answers", f"--gin_file={file}", f"--output={answered}", "--chunk=4"])


@pytest.mark.slow
def test_a_teacher_that_does_not_suit_is_refused(school, finished, tmp_path):
    def other(**changes):
        return dataclasses.replace(
            elsewhere(school, tmp_path / "run"),
            distillation=dataclasses.replace(school.distillation, **changes),
        )

    words = config.Vocabulary("trained", size=280)
    read = dataclasses.replace(
        school.data, task=dataclasses.replace(school.data.task, vocabulary=words)
    )
    cases = {
        "There is no /nowhere": other(teacher="/nowhere"),
        "has an encoder": other(teacher=finished.model_dir),
        "knows 512 ids, fewer than top_k = 513": other(top_k=513),
        "another vocabulary": dataclasses.replace(other(), data=read),
    }
    for message, run in cases.items():
        with pytest.raises(ValueError, match=f"Distillation.teacher.*{message}"):
            loop.train(run)


@pytest.mark.slow
def test_targets_that_a_teacher_writes_are_data_and_go_on(school, tmp_path, capsys):
    words, output = tmp_path / "words.txt", tmp_path / "pairs.jsonl"
    words.write_text("abcde\n\nhgfed\naabbc\n")
    command = [
        "generate",
        f"--teacher={school.distillation.teacher}",
        f"--input={words}",
        f"--output={output}",
        "--max_new_tokens=6",
        "--temperature=1.0",
        "--template={} ",
    ]
    distill.main(command)
    whole = output.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert lines and {line["line"] for line in lines} <= {1, 3, 4}
    assert all(line["inputs"] == words.read_text().splitlines()[line["line"] - 1] for line in lines)
    assert "line 2: empty" in capsys.readouterr().err
    # Killed within a line: the same command ends with the same file.
    output.write_bytes(whole.encode()[: len(whole.encode()) - 9])
    distill.main(command)
    assert output.read_text() == whole
    with pytest.raises(SystemExit):
        distill.main([*command, "--seed=3"])
    files = config.Files(
        name="pairs", train=str(output), inputs="inputs", vocabulary=config.Vocabulary("bytes")
    )
    dataset = data.open_dataset(dataclasses.replace(school.data, task=files), "train")
    assert [dataset[i].targets for i in range(len(dataset))] == [line["targets"] for line in lines]


@pytest.mark.slow
def test_a_teacher_writes_targets_for_the_inputs_of_a_task(school, tmp_path):
    file, output = write_gin(school, tmp_path / "run.gin"), tmp_path / "pairs.jsonl"
    teacher = f"--teacher={school.distillation.teacher}"
    where = [f"--gin_file={file}", "--split=validation", f"--output={output}", "--max_new_tokens=4"]
    distill.main(["generate", teacher, *where, "--temperature=1.0"])
    dataset = data.open_dataset(school.data, "validation")
    for line in map(json.loads, output.read_text().splitlines()):
        assert line["inputs"] == dataset.inputs_text(line["line"] - 1)
