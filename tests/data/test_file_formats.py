# SPDX-License-Identifier: Apache-2.0
"""Readers of a user's files end early or guess nowhere: each fault is named, with file and line."""

import bz2
import dataclasses
import glob
import gzip
import json
import logging
import lzma
import os
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from file_toys import GOOD, described, read

from t5x_lite import config, data
from t5x_lite.data import files
from t5x_lite.tokenizers import vocabularies

SURROGATE = '{"de": "smile \\ud83d", "en": "ok"}'


def statistics(cfg: config.Files, folder):
    """Statistics of the batches of files, with the cache in a folder."""
    opened = config.Data(cfg, {"inputs": 16, "targets": 16}, cache_dir=str(folder / "cache"))
    return data.open_batches(opened, "encoder_decoder", 1, 0).statistics


@pytest.mark.parametrize("last", [b"", b"\r", b"\n"])
@pytest.mark.parametrize("ending", ["jsonl", "txt", "csv", "tsv"])
def test_lines_that_end_in_cr_alone_are_not_one_line(ending, last, tmp_path):
    (tmp_path / f"a.{ending}").write_bytes(b"one,two\rthree,four\rfive,six" + last)
    with pytest.raises(ValueError, match="lines end in CR alone"):
        read(described(tmp_path / f"a.{ending}", inputs=None))
    (tmp_path / "b.txt").write_bytes(b"10 %\r20 %\r30 %\ndone\n")
    assert len(read(described(tmp_path / "b.txt", inputs=None))) == 2


JSON_FAULTS = {
    '[{"de": "a", "en": "b"}]': 'line 1: a JSON array, .* Files.format = "json" reads an array',
    '[\n {"de": "a", "en": "b"}\n]': "line 1: a JSON array",
    '{\n "de": "a",\n "en": "b"\n}': "line 1: an object over several lines",
    '{"de": "a", "en": "b", "en": "c"}': "line 1: field 'en' is there twice",
    '{"de": "a", "en": ["x", 3]}': "line 1: item 2 of field 'en' is int, not text",
    '{"de": "a", "en": ["x", null]}': "line 1: item 2 of field 'en' is NoneType, not text",
    '{"de": "a", "en": ["x", "\\udc00"]}': "line 1: item 2 of field 'en' is not Unicode text",
    SURROGATE: r"line 1: field 'de' is not Unicode text: character 7 .*\\ud83d",
    '{"de": "a", "en": "b"}, ': "line 1: a comma after the object .sed ",
    '{"de": "a", "en": ["b",],}': "line 1: a comma before } or ]",
    '{"de": "a", "en": 3.5}': "line 1: field 'en' is float, not text .Files.numbers = True",
    '{"de": {"x": "a"}, "en": "b"}': "line 1: field 'de' is dict, not text",
}


@pytest.mark.parametrize("content", JSON_FAULTS)
def test_json_that_is_no_example_is_named_for_what_it_is(content, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=JSON_FAULTS[content]):
        read(described(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("content", ['[{"de": "a"}]', "\n[\n{}\n]", "{\n}"])
def test_a_file_that_is_one_json_value_is_never_skipped(content, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match="a.jsonl, line .: an? .*each"):
        read(described(tmp_path / "a.jsonl", broken="skip"))


@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_a_lone_surrogate_is_a_broken_line_for_every_vocabulary(kind, tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([GOOD, SURROGATE, *[GOOD] * 30]))
    cfg = described(path, vocabulary=config.Vocabulary(kind, size=272), broken="skip")
    with caplog.at_level(logging.WARNING):
        assert statistics(cfg, tmp_path).counts == {"broken lines left out": 1}
    assert "a.jsonl, line 2 is left out: field 'de' is not Unicode text" in caplog.text


@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_broken_lines_are_counted_once_and_the_first_are_named(kind, tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*["broken"] * 5, *[GOOD] * 30]))
    cfg = described(path, vocabulary=config.Vocabulary(kind, size=272), broken="skip")
    with caplog.at_level(logging.WARNING):
        assert statistics(cfg, tmp_path).counts == {"broken lines left out": 5}
    named = [record for record in caplog.records if "is left out" in record.getMessage()]
    assert len(named) == 3
    assert all(f"line {k} is left" in each.getMessage() for k, each in enumerate(named, 1))
    stream = config.Data(
        cfg, {"inputs": 16, "targets": 16}, cache_dir=str(tmp_path / "other"), stream=True
    )
    batches = data.open_batches(stream, "encoder_decoder", 1, 0)
    for step in range(100):  # several epochs
        batches.at(step)
    assert batches.statistics.counts == {"broken lines left out": 5}


@pytest.mark.parametrize("kind", ["bytes", "trained"])
@pytest.mark.parametrize("good", [0, 1, 40])
def test_a_missing_field_is_named_whatever_reads_it_first(kind, good, tmp_path):
    (tmp_path / "a.jsonl").write_text(f"{GOOD}\n" * good + '{"de": "a", "fr": "b"}\n' * 20)
    cfg = described(tmp_path / "a.jsonl", vocabulary=config.Vocabulary(kind, size=272))
    with pytest.raises(ValueError, match=f"line {good + 1}: no field 'en'; there are") as caught:
        statistics(cfg, tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["[1]/t.jsonl", "[ab]-*.jsonl", "a?.jsonl", "*.jsonl"])
def test_a_path_that_exists_is_that_file(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(GOOD)
    (tmp_path / "a1.jsonl").write_text(GOOD)
    assert files.list_paths(described(path), "train") == [path]


def test_a_folder_that_looks_like_a_pattern_is_that_folder(tmp_path):
    (tmp_path / "[1]").mkdir()
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / "[1]" / name).write_text(GOOD)
    paths = files.list_paths(described(tmp_path / "[1]" / "*.jsonl"), "train")
    assert [path.name for path in paths] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(ValueError, match=r"matches no file but a folder: .*\[1\]/\* names"):
        files.list_paths(described(tmp_path / "[1]"), "train")


@pytest.mark.parametrize("stream", [False, True])
def test_an_end_typed_after_targets_is_read_once(stream, tmp_path):
    (tmp_path / "vocabulary").mkdir()
    settings = {"tokenizer_class": "ByT5Tokenizer"}
    (tmp_path / "vocabulary" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "vocabulary" / "config.json").write_text('{"model_type": "t5"}')
    path = tmp_path / "a.jsonl"
    path.write_text('{"de": "a </s>", "en": "the park </s>"}\n{"de": "a", "en": "the park"}\n')
    vocabulary = config.Vocabulary("checkpoint", path=str(tmp_path / "vocabulary"))
    cfg = described(path, vocabulary=vocabulary, validation=str(path))
    opened = config.Data(
        cfg, {"inputs": 16, "targets": 16}, cache_dir=str(tmp_path / "c"), stream=stream, pack=False
    )
    batches = data.open_batches(opened, "encoder_decoder", 2, 0)
    batch = batches.at(0)
    for ids in (batch.inputs, batch.targets):
        assert (ids == 1).sum(axis=1).tolist() == [1, 1]
        assert (ids[0] == ids[1]).all()
    (name,) = batches.statistics.counts
    assert "end-of-sequence" in name and batches.statistics.counts[name] == 1
    assert [row.references for row in data.open_dataset(opened, "validation")] == [
        ("the park",)
    ] * 2


def test_an_end_typed_after_an_input_is_read_once_wherever_it_is_read():
    named = {"</s>": 1}
    vocabulary = vocabularies.ByteVocabulary(named=named)
    plain = vocabularies.encode_with_ends(vocabulary, "a")
    assert vocabularies.encode_with_ends(vocabulary, "a </s> ") == plain
    assert vocabularies.encode_texts(vocabulary, ["a</s>"], ended=False)[0].tolist() == plain
    unnamed = vocabularies.ByteVocabulary()
    assert vocabularies.encode_with_ends(unnamed, "a</s>") == [*unnamed.encode("a</s>"), 1]


def test_numbers_that_are_no_ids_are_broken_lines(tmp_path, caplog):
    numbers = vocabularies.IntegerVocabulary(50)
    vocabularies.save_pair(tmp_path / "vocabulary", numbers, numbers)
    path = tmp_path / "a.tsv"
    path.write_text("de\ten\n1 2\t3\n1 50\t3\n1 2\thello\n4\t5\n")
    (tmp_path / "config.gin").touch()
    vocabulary = config.Vocabulary("checkpoint", path=str(tmp_path))
    with pytest.raises(ValueError, match="a.tsv, line 3: '50' is no id .*Fix it, or set"):
        statistics(described(path, vocabulary=vocabulary), tmp_path)
    with caplog.at_level(logging.WARNING):
        cfg = described(path, vocabulary=vocabulary, broken="skip")
        assert statistics(cfg, tmp_path).counts == {"broken lines left out": 2}
    assert "line 4 is left out: 'hello' is no id" in caplog.text


def pack_zst(content):
    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return packed.getvalue().to_pybytes()


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": pack_zst}


def json_rows(count, first=0):
    draw = np.random.default_rng(first).bytes(8 * count).hex()
    lines = [
        json.dumps({"inputs": draw[16 * i : 16 * i + 16], "targets": f"{first + i}"})
        for i in range(count)
    ]
    return "\n".join([*lines, ""]).encode()


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize(
    "damage", ["nothing", "beginning", "middle", "end", "garbage", "cut", "empty"]
)
def test_a_packed_file_is_read_to_its_end_or_refused(ending, damage, tmp_path):
    """Parallel packers write many streams: a damaged one is not the end of the file."""
    streams = [PACKERS[ending](json_rows(5000, first)) for first in (0, 5000)]
    second = bytearray(streams[1])
    if damage in ("beginning", "middle", "end"):
        place = {"beginning": 1, "middle": len(second) // 2, "end": len(second) - 6}[damage]
        second[place] ^= 0x55
    content = streams[0] + bytes(second)
    content += b"garbage" if damage == "garbage" else b""
    content = {"cut": content[:-20], "empty": b""}.get(damage, content)
    path = tmp_path / f"mine.jsonl{ending}"
    path.write_bytes(content)
    cfg = described(path, inputs="inputs", targets="targets")
    if damage == "nothing":
        targets = [row.targets for row in files.read_rows(cfg, "train")]
        assert targets == [str(number) for number in range(10_000)]
        return
    with pytest.raises(ValueError, match=rf"mine.jsonl{ending} is not a complete {ending} file"):
        list(files.read_rows(dataclasses.replace(cfg, broken="skip"), "train"))


def test_zeros_between_and_after_xz_streams_are_padding(tmp_path):
    one, two = (lzma.compress(json_rows(3, first)) for first in (0, 3))
    path = tmp_path / "mine.jsonl.xz"
    for zeros in (b"", b"\0" * 4, b"\0" * 2**18):
        path.write_bytes(one + zeros + two + zeros)
        rows = list(files.read_rows(described(path, inputs="inputs", targets="targets"), "train"))
        assert [row.targets for row in rows] == list("012345")


def test_links_neither_repeat_data_nor_leave_any_out(tmp_path, caplog):
    folder = tmp_path / "data"
    (folder / "day1").mkdir(parents=True)
    (folder / "day1" / "a.jsonl").write_bytes(json_rows(3))
    (folder / "b.jsonl").write_bytes(json_rows(2, 3))
    (folder / "latest").symlink_to("day1")
    (folder / "day1" / "up").symlink_to("..")
    (folder / "twin.jsonl").symlink_to("b.jsonl")
    cfg = described(folder / "**" / "*.jsonl", inputs="inputs", targets="targets")
    targets = [row.targets for row in files.read_rows(cfg, "train")]
    assert sorted(targets) == list("01234")
    assert "by a link: it is read once" in caplog.text
    (folder / "c.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(ValueError, match="c.jsonl is a link to nothing"):
        list(files.read_rows(cfg, "train"))
    (folder / "c.jsonl").unlink()
    os.mkfifo(folder / "c.jsonl")
    with pytest.raises(ValueError, match="c.jsonl is not a regular file"):
        list(files.read_rows(cfg, "train"))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"\0" * 40 + b"\n", "not text but NULs, as a crash leaves them"),
        ("{}\n".encode("utf-32"), "UTF-32 .iconv -f UTF-32 "),
        ("{}\n".encode("utf-16"), "UTF-16 .iconv -f UTF-16 "),
        ("{}\n".encode("utf-16-le"), "UTF-16 .iconv -f UTF-16LE "),
    ],
)
def test_what_is_no_utf8_is_named_for_what_it_is(content, words, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"mine.jsonl, line 1: .*{words}"):
        list(files.read_rows(described(path, inputs="inputs", targets="targets"), "train"))


PATTERNS = (
    "**/*.j",
    "**",
    "*/*.j",
    "a/**/*.j",
    "**/b/**/*.j",
    "*/**/c/*",
    "**/**/1.j",
    "a/**/c/1.j",
)
PATTERNS += ("none/**/x", "**/[[]x]/*.j", "**/.h/**/1.j", "**/*", "*", "**/c")


def test_a_glob_matches_what_glob_does_where_no_link_is(tmp_path):
    for folder in ("a/b/c", "a/.h/x", "d", "a/d/e", "[x]"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name in ("1.j", "2.k", ".3.j"):
            (tmp_path / folder / name).touch()
    for pattern in PATTERNS:
        expected = {
            tmp_path / each for each in glob.glob(pattern, root_dir=tmp_path, recursive=True)
        }
        matched = set(files.expand_parts(tmp_path, Path(pattern).parts))
        assert {*filter(Path.is_file, matched)} == {*filter(Path.is_file, expected)}, pattern
