# SPDX-License-Identifier: Apache-2.0
"""Laws of typed paths: ~ is the home folder and an address names a known store, at every door."""

import argparse
import dataclasses
import importlib
import inspect
import re
import typing
from pathlib import Path
from typing import Annotated, Any

import pytest

from t5x_lite import __main__ as front
from t5x_lite import config, interactive
from t5x_lite.checkpoints import opening, text_settings
from t5x_lite.config import gin_check, gin_file
from t5x_lite.config.checked import field_types
from t5x_lite.data import built_in, files
from t5x_lite.kernels import tile_table
from t5x_lite.utils import hub_names, paths
from t5x_lite.utils.exit_status import MISTAKE

G2P = ["configs/runs/g2p.gin"]
FILES = config.Files("mine", "~/train.jsonl", config.Vocabulary("bytes"))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def texts(hint: Any) -> typing.Iterator[tuple[Any, ...]]:
    """The functions that check each text of an annotation."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is str:
        yield ()
    elif origin is Annotated and inner[0] is str:
        yield inner[1:]
    elif origin is not typing.Literal:
        for each in inner:
            yield from texts(each)


def path_fields() -> list[tuple[type, str]]:
    checks = paths.check_local, paths.check_path, paths.expand_output_path, hub_names.check_source
    return [
        (owner, name)
        for owner in map(vars(config).get, gin_check.dataclass_names())
        for name, hint in field_types(owner).items()
        if any(each in checks for (each, *_) in filter(None, texts(hint)))
    ]


def test_a_field_that_describes_a_file_is_a_path():
    described = set()
    for owner in map(vars(config).get, gin_check.dataclass_names()):
        document = inspect.getdoc(owner)
        for name, hint in field_types(owner).items():
            text = re.search(rf"^  {name}: ((?:.|\n    )*)", document, re.MULTILINE)
            words = re.match(r"(a |the )?(folder|files?|checkpoints?|path)\b", text[1])
            if words and list(texts(hint)):
                described.add((owner, name))
    marked = {(owner, name) for owner, name in path_fields()}
    assert described <= marked and len(marked) == 15


@pytest.mark.parametrize(
    "binding, message",
    [
        ("MODEL_DIR=ftps://host/run", "Run.model_dir: ftps://host/run is of no known store"),
        ("INITIAL_CHECKPOINT_PATH=gsx://b/run", "Checkpoint.initial: gsx://b/run is of no known"),
        ("config.Data.cache_dir=gs://bucket/cache", "Data.cache_dir: gs://bucket/cache is an add"),
        ("config.Decode.drafter=lookup+draft:file:///run", "leave out file://"),
        (
            "MODEL_DIR=memory://run",
            "memory://run is only read; folders of this machine, gs://BUCKET",
        ),
        ("MODEL_DIR=file:///tmp/run", "leave out file://"),
        ("MODEL_DIR=hf://google/t5", "can be read"),
        ("MODEL_DIR=memory://", "names no bucket: memory://BUCKET/NAME"),
        ("MODEL_DIR=", "Run.model_dir: the path is empty"),
        ("MODEL_DIR=gs:/bucket/run", "has one slash; an address has two: gs://bucket/run"),
        ("INITIAL_CHECKPOINT_PATH=S3:/b/run", "an address has two: S3://b/run"),
    ],
)
def test_an_address_of_no_use_is_refused_when_a_config_loads_with_its_remedy(binding, message):
    with pytest.raises(gin_file.ConfigError) as raised:
        gin_file.load_run(G2P, [binding])
    assert message in str(raised.value) and str(raised.value).count("\n") == 0


def test_a_store_without_its_library_names_the_extra(monkeypatch):
    def find(scheme: str) -> type:
        raise ImportError(f"Install a library for {scheme}")

    paths.check_store.cache_clear()
    monkeypatch.setattr("fsspec.get_filesystem_class", find)
    for scheme in ("gs", "s3"):
        with pytest.raises(ValueError, match=r"needs the extra buckets \(pip install .*buckets"):
            paths.parse_path(f"{scheme}://bucket/run")


@pytest.mark.parametrize("owner, name", path_fields())
def test_every_path_of_a_config_refuses_an_unknown_store(owner, name):
    sample = {
        config.Run: config.Run("x", config.Model(2, None, config.Stack(1, 2, 1, 2, 2))),
        config.Files: FILES,
        config.Data: config.Data("cmudict_g2p", {"targets": 8}),
        config.Vocabulary: config.Vocabulary("bytes"),
        config.HubDataset: config.HubDataset("a/b", config.Vocabulary("bytes")),
        config.Adaptation: config.Adaptation("x"),
        config.Distillation: config.Distillation("x", top_k=3),
        config.Grpo: config.Grpo("exact_match"),
    }.get(owner) or owner()
    value: Any = "nowhere://bucket/x"
    if owner is config.Compare:
        value = {"encoder_decoder": (value,) * sample.seeds}
    with pytest.raises(ValueError, match=rf"{owner.__name__}.{name}: nowhere://bucket/x is "):
        dataclasses.replace(sample, **{name: value})


def test_model_dir_is_in_the_home_folder_and_other_paths_keep_their_text(home):
    run = gin_file.load_run(G2P, ["MODEL_DIR=~/run", "INITIAL_CHECKPOINT_PATH=~/first"])
    assert run.model_dir == str(home / "run")
    # Another machine has another home folder, and reads the same config.
    assert run.checkpoint.initial == "~/first" and "~/first" in gin_file.to_text(run)
    assert gin_file.from_text(gin_file.to_text(run)) == run


def test_readers_of_a_config_look_in_the_home_folder(home, capsys):
    for name in ("a", "b"):
        (home / f"{name}.jsonl").write_text("{}\n")
    every = dataclasses.replace(FILES, train="~/*.jsonl")
    assert [path.name for path in files.list_paths(every, "train")] == ["a.jsonl", "b.jsonl"]
    (home / "run.gin").write_text('include "~/part.gin"\n')
    (home / "part.gin").write_text('include "runs/g2p.gin"\nconfig.Run.seed = 5\n')
    assert gin_file.load_run("~/run.gin").seed == 5
    for read in (interactive.load, opening.open_checkpoint, text_settings.read_text_settings):
        with pytest.raises(ValueError, match=f"There is no {home}/nowhere"):
            read("~/nowhere")
        with pytest.raises(ValueError, match="There is no memory://bucket/nowhere"):
            read("memory://bucket/nowhere")
    vocabulary = config.Vocabulary("sentencepiece", path="~/a.jsonl")
    with pytest.raises(ValueError, match="not a model of kind sentencepiece"):
        built_in.build_vocabulary(vocabulary, built_in.TrainingText(list, str), "~/cache")


def actions(parser: argparse.ArgumentParser) -> typing.Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from actions(each)


@pytest.mark.parametrize("command", front.COMMANDS)
def test_every_option_that_is_a_path_is_read_as_one(command, home):
    parser = importlib.import_module(front.COMMANDS[command][0]).parser()
    for action in actions(parser):
        if action.metavar in ("PATH", "FILE", "DIR"):
            readers = paths.path_argument, paths.local_argument, hub_names.source_argument
            assert action.type in readers, action.option_strings
    assert paths.path_argument("~/x") == str(home / "x") and paths.path_argument("-") == "-"
    assert hub_names.source_argument("~/x") == str(home / "x")
    for read in (paths.path_argument, hub_names.source_argument):
        with pytest.raises(argparse.ArgumentTypeError, match="is of no known store"):
            read("nowhere://bucket/x")


LOCAL_ALONE = {
    "plan": ["--topology=v5e:4x4", "--cache=gs://bucket/plans.json"],
    "distill": ["answers", "--output=gs://bucket/answers"],
    "compare": ["--gin.MODEL_DIR=gs://bucket/twins"],
    "train": ["--gin.config.Data.cache_dir=s3://bucket/tokens"],
}


@pytest.mark.parametrize("command", LOCAL_ALONE)
def test_what_has_to_be_on_a_disk_is_refused_before_any_work(command, capsys, home):
    pytest.importorskip("gcsfs")
    run = "compare_g2p" if command == "compare" else "g2p"
    words = [*LOCAL_ALONE[command], f"--gin_file=configs/runs/{run}.gin"]
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(front.COMMANDS[command][0]).main(words)
    assert ended.value.code == MISTAKE
    assert re.search(r"(gs|s3)://bucket/.* on a disk of this machine", capsys.readouterr().err)


def test_a_home_folder_that_cannot_be_written_has_a_temporary_cache(tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("HOME", str(file))
    monkeypatch.delenv(tile_table.TABLE_VARIABLE, raising=False)
    paths.temporary_cache.cache_clear()
    folder = paths.cache_folder()
    assert folder.is_dir() and paths.cache_folder() == folder
    assert tile_table.table_path() == folder / "tiles.json"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{paths.CACHE} cannot be written") and str(folder) in line
    assert paths.cache_folder(str(tmp_path / "named")) == tmp_path / "named"
    paths.temporary_cache.cache_clear()


def test_the_cache_is_in_the_home_folder(home):
    assert paths.cache_folder() == Path(home, ".cache/t5x_lite")
    assert paths.cache_folder("~/other") == home / "other"
