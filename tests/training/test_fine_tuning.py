# SPDX-License-Identifier: Apache-2.0
"""Laws of fine-tuning: a run names its checkpoint and its data; model and commit are recorded."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conversion_toys import T5
from hub_server import HubServer
from hub_toys import list_cached, read_contents, write_folders

from t5x_lite import config, data, interactive, train
from t5x_lite.checkpoints import step_folders
from t5x_lite.checkpoints.opening import open_checkpoint
from t5x_lite.config import gin_file, run_sources
from t5x_lite.data import derived

FILE = "configs/runs/finetune.gin"
NAME = "owner/toy"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture
def place(tmp_path, monkeypatch, folders):
    """A folder with data, and the flags of a run of two steps there."""
    monkeypatch.chdir(Path(__file__).parents[2])
    rows = [{"inputs": word, "targets": word[::-1]} for word in ("abc", "bca", "cab", "aab") * 4]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def flags(place: Path, source: str | Path, *more: str, steps: int = 2) -> list[str]:
    rows = place / "rows.jsonl"
    named = {
        "INITIAL_CHECKPOINT_PATH": source,
        "MODEL_DIR": place / "run",
        "TRAIN_FILES": rows,
        "VALIDATION_FILES": rows,
    }
    cheap = {
        "TRAIN_STEPS": steps,
        "BATCH_SIZE": 8,
        "TASK_FEATURE_LENGTHS": '{"inputs": 8, "targets": 8}',
    }
    cheap |= {"config.Data.cache_dir": place / "tokens", "config.Evaluate.examples": 0}
    cheap |= {"config.Evaluate.batches": 1, "config.Train.tensorboard": False}
    every = [f"--gin.{name}={value}" for name, value in (named | cheap).items()]
    return [f"--gin_file={FILE}", *every, *more]


def saved_config(place: Path) -> config.Run:
    return gin_file.from_text((place / "run/config.gin").read_text())


@pytest.fixture
def served(tmp_path, monkeypatch, folders):
    with HubServer() as server:
        server.use_here(monkeypatch, tmp_path / "cache")
        yield server


@pytest.mark.slow
def test_a_run_takes_the_model_and_the_vocabulary_of_its_checkpoint(place, folders):
    assert train.main(flags(place, folders / "hf")) == 0
    saved = saved_config(place)
    # On a CPU a command computes in float32; T5's config.json has dropout.
    expected = dataclasses.replace(open_checkpoint(folders / "hf").model, dtype="float32")
    assert saved.model == expected and saved.model.encoder == T5.encoder
    assert saved.checkpoint.initial == str(folders / "hf")
    assert interactive.load(place / "run").generate("abc") is not None
    assert train.main(flags(place, folders / "hf", steps=3)) == 0
    assert step_folders.list_steps(place / "run")[-1] == 3


@pytest.mark.slow
def test_the_first_weights_are_those_of_the_checkpoint(place, folders):
    still = "--gin.config.Schedule.peak=1e-30"
    assert train.main(flags(place, folders / "hf", still, steps=1)) == 0
    before = open_checkpoint(folders / "hf").load().params
    after = open_checkpoint(place / "run").load().params
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_the_saved_config_names_the_commit_and_a_resumed_run_keeps_it(place, served, folders):
    commit = served.add(NAME, read_contents(folders / "shards"))
    assert train.main(flags(place, NAME)) == 0
    pinned = f"{NAME}@{commit}"
    sources = run_sources.list_sources(saved_config(place))
    assert sources == {"checkpoint.initial": pinned, "data.task.vocabulary.path": pinned}
    served.add(NAME, {"config.json": b"{}"})
    served.down = True
    shutil.rmtree(place / "cache")
    for name in (NAME, f"{NAME}@main"):
        assert train.main(flags(place, name, steps=3)) == 0
        assert run_sources.list_sources(saved_config(place)) == sources
    assert served.token not in (place / "run/config.gin").read_text()


def test_a_dry_run_checks_the_name_and_downloads_no_weight(place, served, folders, capsys):
    served.add(NAME, read_contents(folders / "shards"))
    assert train.main(flags(place, NAME, "--dry_run")) == 0
    assert "encoder.layers" in capsys.readouterr().out
    assert not any(name.endswith(".safetensors") for name in list_cached(place / "cache"))
    with pytest.raises(SystemExit) as ended:
        train.main(flags(place, "owner/absent", "--dry_run"))
    assert ended.value.code == 2
    assert "no model of that name on the hub" in capsys.readouterr().err


def test_what_trains_may_be_bound_and_what_contradicts_the_weights_is_refused(place, folders):
    words = flags(place, folders / "hf")[1:]
    file = place / "mine.gin"
    file.write_text('include "runs/finetune.gin"\nconfig.Model.dropout = 0.25\n')
    bindings = [word.removeprefix("--gin.") for word in words]
    run = data.load_run(str(file), bindings)
    assert run.model.dropout == 0.25 and run.model.decoder == T5.decoder
    file.write_text('include "runs/finetune.gin"\ndecoder/config.Stack.layers = 5\n')
    with pytest.raises(ValueError, match=r"mine.gin:2: config.Stack.layers is 5, but the decoder"):
        data.load_run(str(file), bindings)
    with pytest.raises(ValueError, match=r"--gin.config.Model.vocab=99: .* is 99, but .* has 40"):
        data.load_run(FILE, [*bindings, "config.Model.vocab=99"])
    with pytest.raises(ValueError, match="Checkpoint.initial: There is no runs/absent"):
        data.load_run(FILE, [*bindings, "INITIAL_CHECKPOINT_PATH=runs/absent"])


def test_every_source_of_a_config_is_found_by_its_place(served, folders):
    commit = served.add(NAME, read_contents(folders / "hf"))
    vocabulary = config.Vocabulary("checkpoint", path=NAME)
    task = config.Mixture((config.Files("a", "x", vocabulary), "cmudict_g2p"), (1.0, 1.0))
    run = config.Run(
        "runs/none",
        T5,
        data=config.Data(task, {"inputs": 8, "targets": 8}, vocabulary=vocabulary),
        adaptation=config.Adaptation(NAME, f"{NAME}:config.json"),
        decode=config.Decode(
            drafter=f"lookup+draft:{NAME}",
            companion=f"model:{NAME}",
            temperature=1.0,
            n_best=2,
            choose=f"rerank:{NAME}",
        ),
        compare=config.Compare(seeds=1, trained={"causal_decoder": (NAME,)}),
    )
    pinned = derived.pin_sources(run)
    assert set(run_sources.list_sources(pinned).values()) == {
        f"{NAME}@{commit}",
        f"{NAME}@{commit}:config.json",
    }
    assert run_sources.list_sources(run).keys() == run_sources.list_sources(pinned).keys()
    assert len(run_sources.list_sources(run)) == 8
    assert pinned.decode.companion == f"model:{NAME}@{commit}"
    assert pinned.decode.choose == f"rerank:{NAME}@{commit}"
    assert pinned.decode.drafter == f"lookup+draft:{NAME}@{commit}"
    assert derived.pin_sources(pinned) is pinned


def test_the_file_of_the_page_is_a_run(place, served, folders, monkeypatch):
    page = Path("docs/fine_tuning.md").read_text()
    text, *_ = re.findall(r"^```\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    commit = served.add("google/flan-t5-small", read_contents(folders / "hf"))
    monkeypatch.chdir(place)
    Path("reviews.gin").write_text(text)
    run = data.load_run("reviews.gin")
    assert run.checkpoint.initial == f"google/flan-t5-small@{commit}"
    assert run.model.decoder == T5.decoder and run.data.task.validation == "data/validation.jsonl"
