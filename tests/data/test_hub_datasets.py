# SPDX-License-Identifier: Apache-2.0
"""Datasets as the hub lays them out: the rows are those of the files, and a stream resumes."""

import dataclasses
import json
import os
import subprocess
import sys

import hub_server
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import mark_exhaustive

from t5x_lite import config, data
from t5x_lite.config import gin_file
from t5x_lite.data import hub_datasets
from t5x_lite.utils.exit_status import FAILURE, MISTAKE, exit_status

datasets = pytest.importorskip("datasets")

BYTES = config.Vocabulary("bytes")
LENGTHS = {"inputs": 64, "targets": 16}
CARD = """---
dataset_info:
  features:
  - {name: text, dtype: string}
  - {name: n, dtype: int64}
  - {name: pair, struct: [{name: de, dtype: string}, {name: en, dtype: string}]}
  - name: label
    dtype: {class_label: {names: {'0': 'no', '1': 'yes'}}}
---
"""


def row(k, word):
    return {"text": f"{word} {k}", "n": k, "pair": {"de": f"d{k}", "en": f"e{k}"}, "label": k % 2}


def write_dataset(folder, word="text", count=30):
    """Writes a dataset of two splits to a folder, of two files each with count rows that have a
    word."""
    for split in ("train", "validation"):
        for part in range(2):
            rows = [row(k, word) for k in range(part * count, (part + 1) * count)]
            path = folder / "data" / f"{split}-{part:05d}-of-00002.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    (folder / "README.md").write_text(CARD)


def described(folder, **changes):
    fields = dict(inputs="classify: {text}", targets="label", validation="validation")
    return config.HubDataset(str(folder), **({"vocabulary": BYTES} | fields | changes))


def opened(cfg, folder, stream=False):
    return config.Data(cfg, LENGTHS, cache_dir=str(folder / "cache"), stream=stream)


def test_rows_are_those_of_the_files_with_names_of_labels(tmp_path):
    write_dataset(tmp_path)
    rows = list(hub_datasets.read_rows(described(tmp_path), "train"))
    assert [each[:2] for each in rows] == [
        (f"classify: text {k}", ("no", "yes")[k % 2]) for k in range(60)
    ]
    cfg = described(tmp_path, inputs="pair.de", targets="{pair.en} {n}", numbers=True)
    assert next(hub_datasets.read_rows(cfg, "validation"))[:2] == ("d0", "e0 0")
    task = data.open_dataset(opened(described(tmp_path), tmp_path), "validation")
    assert len(task) == 60 and task[1].targets == "yes" and task.has_inputs


FAULTS = {
    "no column 'title'; there are 'text', 'n', 'pair', 'label'": dict(inputs="title"),
    "row 1: field 'pair' has no field 'fr'": dict(inputs="pair.fr"),
    "row 1: field 'n' is int, not text .HubDataset.numbers": dict(inputs="n"),
    "cannot be read .*other": dict(config="other"),
    "cannot be read .*missing": dict(train="missing"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_a_dataset_lacks_is_named(message, tmp_path):
    write_dataset(tmp_path)
    with pytest.raises(ValueError, match=message):
        data.open_batches(
            opened(described(tmp_path, **FAULTS[message]), tmp_path), "encoder_decoder", 2, 0
        )


def test_a_damaged_file_and_a_missing_library_are_named(tmp_path, monkeypatch):
    write_dataset(tmp_path)
    path = tmp_path / "data" / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="HubDataset .* cannot be read"):
        list(hub_datasets.read_rows(described(tmp_path), "train"))
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the datasets library: pip install .*hub-data"):
        hub_datasets.import_datasets()


@pytest.mark.parametrize("stream", [False, True])
def test_a_source_resumes_with_the_same_next_batch(stream, tmp_path):
    write_dataset(tmp_path)
    cfg = opened(described(tmp_path), tmp_path, stream)
    first = data.open_batches(cfg, "encoder_decoder", 4, seed=3)
    for step in range(5):
        first.at(step)
    state = json.loads(json.dumps(first.state()))
    expected = [first.at(step) for step in range(5, 40)]
    again = data.open_batches(cfg, "encoder_decoder", 4, seed=3)
    again.restore(state)
    for step, batch in enumerate(expected, 5):
        for a, b in zip(batch, again.at(step), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("change", ["rows", "labels"])
def test_content_decides_whether_a_run_resumes(change, stream, tmp_path):
    write_dataset(tmp_path)
    cfg = opened(described(tmp_path), tmp_path, stream)
    state = data.open_batches(cfg, "encoder_decoder", 4, seed=3).state()
    if change == "rows":
        write_dataset(tmp_path, word="other")
    else:
        (tmp_path / "README.md").write_text(CARD.replace("yes", "Yes"))
    with pytest.raises(ValueError, match="has changed|have changed"):
        data.open_batches(cfg, "encoder_decoder", 4, seed=3).restore(state)


NAME = "owner/rows"


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A hub with a dataset, which this process uses with an empty cache."""
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "hf"
    for name, value in dict(
        HF_CACHE_HOME=cache,
        HF_DATASETS_CACHE=cache / "datasets",
        DOWNLOADED_DATASETS_PATH=cache / "datasets" / "downloads",
        HF_HUB_OFFLINE=False,
    ).items():
        monkeypatch.setattr(datasets.config, name, value)
    write_dataset(tmp_path / "rows")
    with hub_server.HubServer() as server:
        server.use_here(monkeypatch, cache)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        server.add(NAME, tmp_path / "rows", kind="dataset")
        yield server


def texts(cfg, split="train"):
    return [each[:2] for each in hub_datasets.read_rows(cfg, split)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_by_name_has_the_rows_of_its_folder(served, tmp_path, streaming):
    named = described(NAME, streaming=streaming)
    for split in ("train", "validation"):
        assert texts(named, split) == texts(described(tmp_path / "rows"), split)
    commit = served.repositories["dataset", NAME].refs["main"]
    assert hub_datasets.remote_identity(named, "train") == {f"hf://datasets/{NAME}": commit}
    write_dataset(tmp_path / "rows", word="other")
    served.add(NAME, tmp_path / "rows", kind="dataset")
    assert texts(named)[0] == ("classify: other 0", "no")
    assert texts(dataclasses.replace(named, revision=commit))[0] == ("classify: text 0", "no")


def refused(cfg) -> tuple[str, int]:
    """Message and exit status of a dataset that cannot be read."""
    with pytest.raises(ValueError) as caught:
        texts(cfg)
    return str(caught.value), exit_status(caught.value)


def test_a_dataset_that_the_hub_does_not_give_names_the_remedy(served, tmp_path):
    message, status = refused(described("owner/absent"))
    assert "no dataset of that name on the hub" in message and status == MISTAKE
    message, status = refused(described(NAME, revision="v9"))
    assert f"{NAME} has no revision v9" in message and status == MISTAKE
    served.add("owner/gated", tmp_path / "rows", kind="dataset", gated=True)
    message, status = refused(described("owner/gated"))
    assert f"accept its terms at {served.url}/datasets/owner/gated" in message
    assert status == MISTAKE
    served.down = True
    for changes in ({}, {"streaming": True}):
        message, status = refused(described(NAME, **changes))
        assert NAME in message and status == FAILURE, message


def test_without_the_hub_the_commit_of_the_cache_is_read_and_says_so(served, monkeypatch, capsys):
    cfg = described(NAME)
    expected, (commit, _) = texts(cfg), hub_datasets.find_commit(cfg)
    served.down = True
    capsys.readouterr()
    assert texts(cfg) == expected
    assert f"read from the cache, commit {commit[:10]}" in capsys.readouterr().err
    for place in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{place}.HF_HUB_OFFLINE", True)
    count = len(served.served)
    assert texts(cfg) == texts(dataclasses.replace(cfg, revision=commit)) == expected
    assert len(served.served) == count
    # What is in the cache is read as a stream too, and no other commit in its place.
    assert texts(dataclasses.replace(cfg, streaming=True)) == expected
    for streaming in (False, True):
        other = dataclasses.replace(cfg, revision="b" * 40, streaming=streaming)
        message, status = refused(other)
        assert f"Commit bbbbbbbbbb of {NAME} is not in the cache" in message and commit in message
        assert status == FAILURE
    message, status = refused(described("owner/never"))
    assert "There is no owner/never here or in the cache" in message and status == FAILURE


RESUME = """
import hashlib, json, sys
from t5x_lite import config, data
from t5x_lite.config import gin_file
cfg = gin_file.load_data([sys.argv[1]], [])
batches = data.open_batches(cfg, "encoder_decoder", 4, seed=3)
if sys.argv[2]:
    batches.restore(json.loads(sys.argv[2]))
begin, end = int(sys.argv[3]), int(sys.argv[4])
rows = [[x.tobytes() for x in batches.at(k) if x is not None] for k in range(begin, end)]
print(json.dumps([[hashlib.sha256(b"".join(row)).hexdigest() for row in rows], batches.state()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stream", mark_exhaustive([False, True], kept=[True]))
def test_another_process_goes_on_with_the_same_batches(served, tmp_path, stream):
    text = f"""
from __gin__ import dynamic_registration
from t5x_lite import config
config.Data.task = @config.HubDataset()
config.Data.lengths = {LENGTHS}
config.Data.stream = {stream}
config.Data.cache_dir = "{tmp_path}/tokens"
config.HubDataset.name = "{NAME}"
config.HubDataset.streaming = {stream}
config.HubDataset.inputs = "text"
config.HubDataset.targets = "label"
config.HubDataset.vocabulary = @config.Vocabulary()
config.Vocabulary.kind = "bytes"
"""
    (tmp_path / "data.gin").write_text(text)
    environment = os.environ | served.environment(tmp_path / "hf") | {"JAX_PLATFORMS": "cpu"}

    def run(state: str, begin: int, end: int) -> list:
        words = [sys.executable, "-c", RESUME, str(tmp_path / "data.gin"), state]
        words += [str(begin), str(end)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    (first, state), (whole, end) = run("", 0, 6), run("", 0, 20)
    assert first + run(json.dumps(state), 6, 20)[0] == whole
    assert run(json.dumps(state), 6, 20)[1] == end and len(set(whole)) == 20


def test_a_commit_of_the_hub_decides(monkeypatch, tmp_path):
    commits = iter(["1" * 40, "2" * 40])
    monkeypatch.setattr(
        hub_datasets, "find_commit", lambda cfg: hub_datasets.DatasetCommit(next(commits))
    )
    cfg = config.HubDataset("owner/rows", BYTES)
    before = hub_datasets.remote_identity(cfg, "train")
    assert before != hub_datasets.remote_identity(cfg, "train")
    assert hub_datasets.list_paths(cfg, "train") == []


def test_a_mixture_trains_one_vocabulary_on_all_its_sources(tmp_path):
    write_dataset(tmp_path / "rows")
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "quizzical zebra\tno\n" * 20)
    trained = config.Vocabulary("trained", size=320)
    parts = (
        described(tmp_path / "rows", vocabulary=trained),
        config.Files("mine", str(tmp_path / "a.tsv"), trained, inputs="text", targets="label"),
    )
    cfg = opened(config.Mixture(parts, (1.0, 1.0)), tmp_path)
    inputs, _ = data.open_vocabularies(cfg)
    for text in ("classify", "zebra"):
        assert inputs.decode(inputs.encode(text)) == text
    assert data.open_batches(cfg, "encoder_decoder", 4, seed=0).at(0).targets.any()


def test_a_dataset_is_written_in_gin(tmp_path):
    write_dataset(tmp_path)
    text = f"""
from __gin__ import dynamic_registration
from t5x_lite import config
config.Data.task = @config.HubDataset()
config.Data.lengths = {LENGTHS}
config.HubDataset.name = "{tmp_path}"
config.HubDataset.inputs = "text"
config.HubDataset.targets = "label"
config.HubDataset.vocabulary = @config.Vocabulary()
config.Vocabulary.kind = "bytes"
"""
    (tmp_path / "data.gin").write_text(text)
    cfg = gin_file.load_data([str(tmp_path / "data.gin")], [])
    assert cfg.task == config.HubDataset(str(tmp_path), BYTES, inputs="text", targets="label")
