# SPDX-License-Identifier: Apache-2.0
"""Laws of readers: no bytes crash them, hang them, fill the memory or make them write anything."""

import gzip
import json
import random

import fuzz_formats
import fuzz_record_targets
import fuzzing
import jax
import numpy as np
import pytest
from conversion_toys import T5, Drawn, write_ours
from flax import serialization
from fuzz_targets import TARGETS

from t5x_lite import config, sharding
from t5x_lite.checkpoints import manager, run_folder, zarr_arrays
from t5x_lite.checkpoints.formats import t5x_files
from t5x_lite.checkpoints.opening import open_checkpoint
from t5x_lite.data import files, text_files
from t5x_lite.tokenizers import huggingface_tokenizer, vocabularies
from t5x_lite.tokenizers.errors import SourceError

# A seed not to be tuned: `benchmarks/fuzz.py` tries others, many more times.
SEED = 20
# Readers of dozens of files, and of whole runs, get fewer rounds: all together take 20 s.
ROUNDS = dict.fromkeys(TARGETS, 40) | dict.fromkeys(("t5x", "t5x_orbax", "run", "gin"), 8)


@pytest.fixture(autouse=True)
def alone():
    jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1]))


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_broken_files_are_reported_by_name(name, tmp_path):
    fuzzing.prepare(name, tmp_path)
    rounds = fuzzing.attack(name, tmp_path, range(ROUNDS[name]), SEED)
    faults = [fault for _, fault in rounds]
    assert len(faults) == ROUNDS[name]
    assert [fault for fault in faults if fault] == []


CIRCLE = b"""\
ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} copy(%a)
  ROOT %b = f32[4]{0} fusion(%a), kind=kLoop, calls=%main
}
"""
# Smallest inputs that once ended in another error, for ever, or in all memory.
FAILED = [
    ("jsonl", "data.jsonl", b"{" + b"".join(b'"%d":0,' % n for n in range(10**5)) + b'"99999":0}'),
    ("pairs", "pairs.jsonl", b"[]"),
    ("pairs", "pairs.jsonl", b'{"line": "1"}'),
    ("pairs", "pairs.jsonl", b"\xff"),
    ("tables", "tiles.json", 100_000 * b"["),
    ("tables", "tiles.json", b'[{"shape": {}, "query": "a"}]'),
    ("tables", "plans.json", 100_000 * b"["),
    ("tables", "costs.json", 100_000 * b"["),
    ("tables", "speed.json", b"{}"),
    ("metrics", "report.json", b"[]"),
    ("vocabulary", "vocabulary/chat_template.jinja", b"\xff"),
    ("program", "program.hlo", CIRCLE),
    ("program", "program.hlo", CIRCLE.replace(b"copy(%a)", b"parameter(1)")),
    ("bindings", "bindings.txt", 80_000 * b"a" + b"=1"),
    ("sentence_t5", "modules.json", b"[1]"),
    ("sentence_t5", "modules.json", b"{}"),
    ("sentence_t5", "modules.json", b'[{"type": "a", "path": "\\u0000"}]'),
    ("t5x_inline", "checkpoint", serialization.msgpack_serialize({"version": np.ones(2)})),
    ("sentence_t5", "1_Pooling/config.json", b"[]"),
]


@pytest.mark.parametrize(("name", "file", "content"), FAILED)
def test_inputs_that_once_failed_do_so_no_more(name, file, content, tmp_path):
    fuzzing.prepare(name, tmp_path)
    folder = fuzzing.toy_folder(name, tmp_path)
    (folder / file).write_bytes(content)
    _, fault = fuzzing.read_folder(TARGETS[name], folder, folder / file)
    assert fault is None


CODED = ["jsonl", "csv", "quoted_tsv", "llama", "gguf", "gguf_tokenizer", "sentencepiece"]
CODED += ["parquet", "t5x_inline", "t5x_orbax"]


@pytest.mark.parametrize("name", CODED)
def test_mutators_know_the_formats_of_their_files(name, tmp_path):
    """A file that a codec parsed and wrote again is the same for its reader."""
    TARGETS[name].make(tmp_path)
    written = set()
    for path in tmp_path.rglob("*"):
        inside = path.relative_to(tmp_path).as_posix()
        codec = fuzz_formats.find_codec(inside) if path.is_file() else None
        if codec is None or (codec is fuzz_formats.JSON and path.suffix != ".json"):
            continue
        tree = codec.parse(path.read_bytes())
        path.write_bytes(codec.write(tree))
        assert codec.parse(path.read_bytes()) == tree
        written.add(codec)
    assert written - {fuzz_formats.JSON}
    TARGETS[name].read(tmp_path)


PACKED = [f"a.txt{ending}" for ending in fuzz_formats.PACKED]


@pytest.mark.parametrize(
    "path", ["a.json", "a.gguf", "a.gin", "a.jinja", "a.http", "a.csv", *PACKED]
)
def test_mutations_are_reproduced_by_their_seed_and_change_something(path):
    content = b'{"a": [1, "{{ b }}"]}\n'
    for ending, (_, pack) in fuzz_formats.PACKED.items():
        content = pack(content) if path.endswith(ending) else content
    twice = [
        [fuzz_formats.mutate_file(path, content, random.Random(seed)) for seed in range(50)]
        for _ in range(2)
    ]
    assert twice[0] == twice[1] and content not in twice[0] and len(set(twice[0])) > 25


def edited_json(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_shape_that_no_file_can_fill_is_not_believed(tmp_path):
    TARGETS["t5x"].make(tmp_path)
    zarr = next(tmp_path.glob("target.*embedding/.zarray"))
    edited_json(zarr, lambda about: about.update(shape=[2**40, 8]))
    with pytest.raises(SourceError, match="would be .* bytes, its files have"):
        zarr_arrays.ArrayReader(tmp_path, zarr.parent.name, ocdbt=False)


@pytest.mark.parametrize("lost", ["chunk", "separator"])
def test_weights_without_their_files_are_warned_about_by_name(tmp_path, lost, recwarn):
    TARGETS["t5x"].make(tmp_path)
    t5x_files.T5XTensors(tmp_path)
    assert not recwarn.list
    zarr = next(tmp_path.glob("target.token_embedder.embedding/.zarray"))
    if lost == "chunk":
        (zarr.parent / "0.0").unlink()
    else:
        edited_json(zarr, lambda about: about.update(dimension_separator="/"))
    with pytest.warns(UserWarning, match="files of token_embedder/embedding are missing"):
        source = t5x_files.T5XTensors(tmp_path)
    assert not source.read("token_embedder/embedding").any()


@pytest.mark.parametrize("chunks", [[2**32, 8], [40, 2**40], [2**62, 8], [0, 8], "x"])
def test_chunks_that_no_array_fills_are_refused_before_they_are_decoded(tmp_path, chunks):
    TARGETS["t5x"].make(tmp_path)
    zarr = next(tmp_path.glob("target.*embedding/.zarray"))
    edited_json(zarr, lambda about: about.update(chunks=chunks))
    with pytest.raises(SourceError, match=zarr.parent.name):
        t5x_files.T5XTensors(tmp_path)


def test_chunks_of_a_run_folder_are_compared_too(tmp_path):
    folder = write_ours(tmp_path / "run", T5, Drawn(T5))
    zarr = folder / "checkpoints/0/params/embedding/.zarray"
    edited_json(zarr, lambda about: about.update(chunks=[2**32, 8]))
    with pytest.raises(ValueError, match="its chunks, .* are larger than the array"):
        manager.load_params(folder, 0)


def test_two_weights_in_one_folder_are_refused(tmp_path):
    TARGETS["t5x"].make(tmp_path)
    tree = serialization.msgpack_restore((tmp_path / "checkpoint").read_bytes())
    one, other, *_ = t5x_files.flatten_leaves(tree["optimizer"]["target"]).values()
    other["kvstore"] = one["kvstore"]
    other["metadata"] = one["metadata"]
    (tmp_path / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))
    with pytest.raises(SourceError, match=" and .* both lie in .*target"):
        t5x_files.T5XTensors(tmp_path)


@pytest.mark.parametrize("depth", [900, 100_000])
def test_paths_and_metadata_that_nest_are_refused_by_name(tmp_path, depth):
    (tmp_path / "t5x").mkdir()
    TARGETS["t5x_orbax"].make(tmp_path / "t5x")
    about = next(tmp_path.rglob("_METADATA"))

    def nest(content):
        _, value = content["tree_metadata"].popitem()
        content["tree_metadata"]["(" * depth + ")" * depth] = value

    edited_json(about, nest)
    with pytest.raises(SourceError, match="t5x"):
        t5x_files.T5XTensors(tmp_path / "t5x")
    about.write_text("[" * depth)
    with pytest.raises(SourceError, match="t5x"):
        t5x_files.T5XTensors(tmp_path / "t5x")
    folder = write_ours(tmp_path / "run", T5, Drawn(T5))
    (folder / "checkpoints/0/note/metadata").write_text('{"note":' * depth)
    with pytest.raises(ValueError, match="metadata"):
        manager.load_params(folder, 0)


@pytest.mark.parametrize("way", ["../../elsewhere", "/etc"])
def test_a_path_in_a_checkpoint_cannot_lead_outside(tmp_path, way):
    TARGETS["t5x_orbax"].make(tmp_path)
    about = next(tmp_path.rglob("_METADATA"))

    def lead_outside(content):
        key, value = content["tree_metadata"].popitem()
        content["tree_metadata"][str(("target", way))] = value

    edited_json(about, lead_outside)
    with pytest.raises(SourceError, match="not a folder beside the checkpoint"):
        t5x_files.T5XTensors(tmp_path)


def test_a_line_that_unpacks_without_end_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MOST_BYTES", 2**20)
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(bytes(2**22)))
    for whole in (False, True):
        bytewise = config.Vocabulary("bytes")
        cfg = config.Files("mine", f"{tmp_path}/*.gz", bytewise, whole_files=whole)
        with pytest.raises(ValueError, match="bomb.txt.gz, .* more than 1,048,576 bytes"):
            list(files.read_rows(cfg, "train", {}))


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_an_id_that_no_vocabulary_has_is_reported(tmp_path, name):
    TARGETS["merges" if name == "vocab.json" else "tokenizer_json"].make(tmp_path)
    huge = 4 * 10**9

    def enlarge(content):
        vocabulary = content if name == "vocab.json" else content["model"]["vocab"]
        vocabulary["new"] = huge

    edited_json(tmp_path / name, enlarge)
    with pytest.raises(ValueError, match="4,000,000,000; no vocabulary has"):
        huggingface_tokenizer.read_tokenizer(tmp_path)


@pytest.mark.parametrize("field", ["head_dim", "layers", "mlp"])
def test_sizes_in_a_runs_config_are_compared_before_a_model_is_made(tmp_path, field):
    folder = write_ours(tmp_path / "run", T5, Drawn(T5))
    symbols = vocabularies.SymbolVocabulary("abc")
    vocabularies.save_pair(folder / "vocabulary", symbols, symbols)
    path = folder / "config.gin"
    lines = path.read_text().splitlines()
    ours = [
        f"{line.partition('=')[0]}= 2000000000" if f".{field} =" in line else line for line in lines
    ]
    path.write_text("\n".join(ours))
    for door in (
        run_folder.SavedWeights,
        lambda path: open_checkpoint(path).load(),
    ):
        with (
            fuzzing.limits(),
            pytest.raises(ValueError, match="at most .*; got 2000000000"),
        ):
            door(folder)


def test_a_chunk_that_is_shorter_than_its_settings_say_is_refused_by_name(tmp_path):
    fuzz_record_targets.make_teacher(tmp_path)
    settings = tmp_path / "settings.json"
    settings.write_text(settings.read_text().replace('"chunk": 2', '"chunk": 3'))
    with pytest.raises(ValueError, match="for step 2 are missing: settings.json has chunks of 3"):
        fuzz_record_targets.read_teacher(tmp_path)
