# SPDX-License-Identifier: Apache-2.0
"""Datasets as the hub lays them out: the rows are those of the files, and a stream resumes."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from t5x_lite import config, data
from t5x_lite.config import gin_file
from t5x_lite.data import hub_datasets

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
    """Writes a dataset of two splits, of two files each."""
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


def test_a_commit_of_the_hub_decides(monkeypatch, tmp_path):
    commits = iter(["1" * 40, "2" * 40])
    monkeypatch.setattr(hub_datasets, "find_commit", lambda cfg: next(commits))
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
