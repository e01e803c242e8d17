# SPDX-License-Identifier: Apache-2.0
"""Laws of commands on stores: they read and write there what they read and write on a disk."""

import bz2
import functools
import gzip
import hashlib
import http.server
import json
import lzma
import threading
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hub_toys import write_folders

from t5x_lite import config, convert, data, infer
from t5x_lite.checkpoints import sources
from t5x_lite.checkpoints.formats import safetensors_files
from t5x_lite.checkpoints.opening import WEIGHTS_ONLY, ConversionOptions, open_checkpoint
from t5x_lite.cli import records
from t5x_lite.config import gin_file
from t5x_lite.data import files
from t5x_lite.utils import remote_folders, remote_streams
from t5x_lite.utils.paths import parse_path
from t5x_lite.utils.remote_paths import RemotePath

WORDS = ["abba", "cab", "d"]
WEIGHT = "encoder/layers/mlp/up"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = write_folders(tmp_path_factory.mktemp("folders"))
    words = [f"--from={folder / 'ours'}", f"--to={folder / 't5x'}", "--format=t5x"]
    convert.main(words)
    return folder


@pytest.fixture
def place(store, folders, monkeypatch, tmp_path):
    """The address of copies of all folders, with an empty cache on this machine."""
    monkeypatch.setenv("HOME", str(tmp_path))
    root = parse_path(store.address("toys"))
    if not root.exists():
        root.upload(folders)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ours", "hf", "shards", "t5x"])
def test_a_checkpoint_of_a_store_has_the_weights_of_its_copy(place, folders, name):
    options = ConversionOptions(vocabulary="none")
    here, there = (open_checkpoint(root / name, options=options) for root in (folders, place))
    assert here.kind == there.kind and here.model == there.model
    first, second = here.weights(), there.weights()
    assert first.names == second.names
    np.testing.assert_array_equal(first.read(WEIGHT, 1), second.read(WEIGHT, 1))


def test_of_a_folder_in_a_store_no_more_is_read_than_is_needed(place, folders, store, monkeypatch):
    monkeypatch.setattr(remote_folders, "FIRST_BYTES", 8)
    read, ranges = RemotePath.read_range, []

    def record(path, begin, end):
        ranges.append((path.suffix, end - begin))
        return read(path, begin, end)

    monkeypatch.setattr(RemotePath, "read_range", record)
    opened = open_checkpoint(place / "shards", options=WEIGHTS_ONLY)
    names = opened.weights(read=False).names
    root = sources.locate_source(place / "shards").path
    assert not list(root.glob("*.safetensors"))
    shards = (folders / "shards").glob("*.safetensors")
    headers = [8 + int.from_bytes(path.read_bytes()[:8], "little") for path in shards]
    assert sum(size for suffix, size in ranges if suffix == ".safetensors") == sum(headers)
    assert opened.weights().names == names and list(root.glob("*.safetensors"))
    copied = len(store.requests)
    safetensors_files.open_safetensors(root)
    assert len(store.requests) == copied


def test_a_folder_that_is_written_anew_is_copied_anew(place, tmp_path):
    again = place.parent / "again"
    for path in place.list_files():
        if "/hf/" in str(path):
            (again / path.name).write_bytes(path.read_bytes())
    first = sources.locate_source(again).path
    assert sources.locate_source(again).path == first
    text = (again / "config.json").read_text()
    changed = text.replace('"dropout_rate": 0.0', '"dropout_rate": 0.5')
    assert changed != text
    (again / "config.json").write_text(changed)  # of the same size, within the same second
    assert open_checkpoint(again).model.dropout == 0.5
    assert sources.locate_source(again).path != first


@pytest.mark.slow
@pytest.mark.parametrize("format", ["huggingface", "t5x", "ours"])
def test_a_conversion_from_a_store_to_a_store_is_that_of_a_disk(place, folders, format, tmp_path):
    here, there = tmp_path / "out", place.parent / f"out-{format}"
    for root, to in ((folders, here), (place, there)):
        convert.main([f"--from={root / 'hf'}", f"--to={to}", f"--format={format}"])
    written = sorted(path for path in here.rglob("*") if path.is_file())
    names = [path.relative_to(here).as_posix() for path in written]
    assert sorted(path.relative_to(there).as_posix() for path in there.list_files()) == names
    for name in names:
        if name.endswith((".safetensors", "config.json", ".model")):
            assert (there / name).read_bytes() == (here / name).read_bytes()
    with pytest.raises(SystemExit):
        convert.main([f"--from={place / 'hf'}", f"--to={there}", f"--format={format}"])


@pytest.mark.slow
def test_lines_of_a_store_are_decoded_into_a_store(place, folders, tmp_path):
    text = "".join(f"{word}\n" for word in WORDS)
    (tmp_path / "words.txt").write_text(text)
    (place.parent / "words.txt").write_text(text)
    options = ["--max_new_tokens=6"]
    for checkpoint, source, output in (
        (folders / "ours", tmp_path / "words.txt", tmp_path / "out.jsonl"),
        (place / "ours", place.parent / "words.txt", place.parent / "out.jsonl"),
    ):
        words = [f"--checkpoint={checkpoint}", f"--input={source}", f"--output={output}"]
        infer.main([*words, *options])
    there = place.parent / "out.jsonl"
    assert there.read_text() == (tmp_path / "out.jsonl").read_text()
    lines = there.read_text().splitlines(keepends=True)
    there.write_text(lines[0])
    infer.main([*words, *options])
    assert there.read_text() == "".join(lines)


PACKED = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: bytes(pyarrow.compress(content, "zstd", asbytes=True)),
}


@pytest.fixture
def site(tmp_path):
    """Address of a site that has the files of a folder, and sends no ranges of them."""
    serve = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("ending", PACKED)
def test_packed_lines_are_read_from_a_disk_a_store_and_a_site(
    place, site, tmp_path, monkeypatch, ending
):
    monkeypatch.setattr(remote_streams, "READ_BYTES", 512)
    rows = [{"text": f"wörd {k}"} for k in range(300)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    name = f"rows.JSONL{ending}"
    (tmp_path / name).write_bytes(PACKED[ending](lines))
    (place.parent / name).write_bytes(PACKED[ending](lines))
    digests = []
    for path in (tmp_path / name, place.parent / name, f"{site}/{name}"):
        source = records.Source(str(path), records.is_json_lines(str(path)), "text")
        assert [record.text for record in source.records()] == [row["text"] for row in rows]
        assert source.count() == 300
        digests.append(source.digest())
    # Whatever packs them, an output goes on after the same lines.
    assert digests == 3 * [hashlib.sha256(lines).hexdigest()]


@pytest.mark.parametrize("ending", [ending for ending in PACKED if ending])
def test_a_truncated_input_is_refused_by_name(tmp_path, ending):
    path = tmp_path / f"rows.txt{ending}"
    path.write_bytes(PACKED[ending](b"".join(b"%d\n" % (k * k) for k in range(9999)))[:-9])
    with pytest.raises(ValueError, match=rf"rows.txt\{ending} is not a complete .*copy it again"):
        records.Source(str(path), False, "input").count()


def test_files_of_a_store_are_examples_by_globs(place, tmp_path):
    rows = [{"inputs": f"in {k}", "targets": f"out {k}"} for k in range(6)]
    root = place.parent / "data"
    lines = [json.dumps(row) + "\n" for row in rows]
    (root / "part-0.jsonl").write_text("".join(lines[:2]))
    (root / "part-1.jsonl.gz").write_bytes(gzip.compress("".join(lines[2:4]).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[4:]), tmp_path / "rows.parquet")
    (root / "part-2.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes())
    (root / "deeper" / "part-3.jsonl").write_text(lines[0])
    (root / "run.gin").write_text(
        f"""
from __gin__ import dynamic_registration
from t5x_lite import config
config.Data.task = @config.Files()
config.Data.lengths = {{"inputs": 16, "targets": 16}}
config.Data.cache_dir = "{tmp_path}/tokens"
config.Files.name = "stored"
config.Files.train = "{root}/part-*"
config.Files.inputs = "inputs"
config.Files.vocabulary = @config.Vocabulary()
config.Vocabulary.kind = "bytes"
"""
    )
    cfg = gin_file.load_data([str(root / "run.gin")], [])
    assert isinstance(cfg.task, config.Files)
    read = [each[:2] for each in files.read_rows(cfg.task, "train")]
    assert read == [(row["inputs"], row["targets"]) for row in rows]
    assert len(files.list_paths(cfg.task, "train")) == 3
    batches = data.open_batches(cfg, "encoder_decoder", 2, seed=0)
    state = batches.state()
    (root / "part-0.jsonl").write_text("".join(reversed(lines[:2])))
    with pytest.raises(ValueError, match="has changed|have changed"):
        data.open_batches(cfg, "encoder_decoder", 2, seed=0).restore(state)
