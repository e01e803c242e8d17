# SPDX-License-Identifier: Apache-2.0
"""Packed files, arrays, and fields of fields: what is read is what was written, or is named."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
from file_toys import CELLS, GOOD, described, read

from t5x_lite.data import file_formats, files, label_fields
from t5x_lite.data.corpora import TextExample
from t5x_lite.data.fields import FieldError


def test_parquet_columns_of_one_name_are_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["de", "en", "en"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet: .*several columns are named 'en'"):
        read(described(tmp_path / "a.parquet"))


NULS = {
    "utf-16-le": "not UTF-8 but UTF-16 .iconv -f UTF-16LE",
    "utf-16-be": "not UTF-8 but UTF-16 .iconv -f UTF-16BE",
}


@pytest.mark.parametrize("ending", ["jsonl", "tsv", "csv", "txt"])
@pytest.mark.parametrize("encoding", NULS)
def test_utf_16_without_a_mark_is_named(ending, encoding, tmp_path):
    content = {"jsonl": GOOD, "tsv": "de\ten\na\tb\n", "csv": "de,en\na,b\n", "txt": "a cat\n"}
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content[ending].encode(encoding))
    with pytest.raises(ValueError, match=f"line 1.*{NULS[encoding]}"):
        read(described(path, inputs=None if ending == "txt" else "de"))
    if ending != "txt":
        return
    with pytest.raises(ValueError, match=f"the file.*{NULS[encoding]}"):
        read(described(path, inputs=None, whole_files=True))


@pytest.mark.parametrize(
    "ending, text", [("tsv", "de\ten\na\tb\0c d e f\n"), ("csv", "de,en\na,b\0c d e f\n")]
)
def test_a_nul_is_no_text(ending, text, tmp_path):
    (tmp_path / f"a.{ending}").write_text(text)
    with pytest.raises(ValueError, match="line 2: not text: character . is a NUL"):
        read(described(tmp_path / f"a.{ending}"))


PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: bytes(pyarrow.compress(content, "zstd", asbytes=True)),
}


@pytest.mark.parametrize("ending", [".jsonl", ".JSONL", ".json", ".csv", ".TSV", ".txt"])
@pytest.mark.parametrize("packed", [*PACKERS, ".GZ", ".Zst"])
def test_packed_files_are_those_inside(packed, ending, tmp_path):
    texts = {
        ".jsonl": GOOD,
        ".json": f"[{GOOD}]",
        ".tsv": "de\ten\nthe dog\tthe cat\n",
        ".csv": "de,en\nthe dog,the cat\n",
        ".txt": "the cat\n",
    }
    content = texts[ending.lower()].encode()
    path = tmp_path / f"a{ending}{packed}"
    pack = PACKERS[packed.lower()]
    path.write_bytes(pack(content))
    inputs = None if ending == ".txt" else "de"
    (row,) = read(described(path, inputs=inputs, targets="en"))
    assert (row.inputs, row.targets) == ("the dog" if inputs else None, "the cat")
    path.write_bytes(pack(content) + pack(content.partition(b"\n")[2] or content))
    if ending == ".jsonl":  # two packed parts, as `cat a.gz b.gz` joins them
        path.write_bytes(pack(content + b"\n") + pack(content))
        assert len(read(described(path))) == 2


@pytest.mark.parametrize("damage", ["cut", "other"])
@pytest.mark.parametrize("broken", ["stop", "skip"])
@pytest.mark.parametrize("packed", PACKERS)
def test_a_packed_file_that_is_not_whole_is_refused(packed, broken, damage, tmp_path):
    lines = "".join(f'{{"de": "{k}", "en": "{hash(str(k)) % 7}"}}\n' for k in range(2000))
    content = PACKERS[packed](lines.encode())
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else lines.encode())
    with pytest.raises(ValueError, match=f"a.jsonl{packed} is not a complete {packed} file"):
        read(described(path, broken=broken))


def test_a_packed_file_that_cannot_be_read_is_not_called_incomplete(tmp_path):
    with pytest.raises(FileNotFoundError):
        list(files.read_records(described(tmp_path / "a.jsonl.gz"), tmp_path / "a.jsonl.gz"))


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("block", [1, 7, 2**20])
def test_an_array_of_objects_is_read_item_by_item(block, indent, tmp_path, monkeypatch):
    monkeypatch.setattr(file_formats, "BLOCK", block)
    rows = [
        {"de": CELLS[k % 8] + "]},{ \u00e9\U0001f600", "en": "x", "n": [k, {"a": 1.5}]}
        for k in range(20)
    ]
    path = tmp_path / "a.json"
    for mark in ("", "\ufeff", " \n"):
        path.write_text(mark + json.dumps(rows, indent=indent, ensure_ascii=False) + "\n")
        assert [row.inputs for row in read(described(path))] == [row["de"] for row in rows]
    path.write_text("[ ]")
    assert read(described(path)) == []
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read(described(path))) == len(rows)


ARRAYS = {
    f"[{GOOD}, {GOOD}": "item 2 of the array: ',' is missing",
    f"[{GOOD} {GOOD}]": "item 1 of the array: ',' is missing",
    f"[{GOOD},]": "item 2 of the array: not JSON",
    f"[{GOOD}] x": "item 1 of the array: 'x' after the end",
    f"[{GOOD}, {{": "item 2 of the array: not JSON",
    f'[{GOOD}, {{"a": tru ': "item 2 of the array: not JSON",
    "[" * 100_000: "item 1 of the array: (nested too deeply|not JSON)",
    f"[{GOOD}, 3]": "item 2: not a JSON object",
    '[{"de": "a", "en": "b", "en": "c"}]': "item 1: field 'en' is there twice",
    '[{"de": "a"}]': "item 1: no field 'en'",
}


@pytest.mark.parametrize("number", range(len(ARRAYS)))
@pytest.mark.parametrize("block", [1, 2**20])
def test_a_broken_array_is_named_at_its_item(block, number, tmp_path, monkeypatch):
    monkeypatch.setattr(file_formats, "BLOCK", block)
    content, message = list(ARRAYS.items())[number]
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=f"a.json, {message}"):
        read(described(tmp_path / "a.json"))
    if "of the array" in message:
        with pytest.raises(ValueError, match=message):
            read(described(tmp_path / "a.json", broken="skip"))
    (tmp_path / "b.json").write_bytes(f"[{GOOD}, ".encode() + b'{"de": "\xff"}]')
    with pytest.raises(ValueError, match="b.json, after item .: not UTF-8"):
        read(described(tmp_path / "b.json"))


NESTED = {"translation": {"de": "Hund", "en": "dog"}, "a.b": "dotted", "n": 3, "x": 0.5, "y": True}


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_fields_of_fields_templates_numbers_and_labels(ending, tmp_path):
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([NESTED]), path)
    else:
        path.write_text(json.dumps([NESTED] if ending == "json" else NESTED))

    def example(**changes):
        (row,) = read(described(path, **changes))
        return row.inputs, row.targets

    assert example(inputs="translation.de", targets="translation.en") == ("Hund", "dog")
    pair = "translate German to English: {translation.de}", "{a.b} ({translation.en}) {}"
    assert example(inputs=pair[0], targets=pair[1]) == (
        "translate German to English: Hund",
        "dotted (dog) {}",
    )
    assert example(inputs="x", targets="n {n}", numbers=True) == ("0.5", "n 3")
    assert example(inputs="a.b", targets="n", labels=("a", "b", "c", "d"))[1] == "d"
    assert example(inputs="a.b", targets="is it? {y}", labels=("no", "yes"))[1] == "is it? yes"
    faults = {
        ("translation.fr", "a.b"): "field 'translation' has no field 'fr'; there are 'de', 'en'",
        ("translation.de.x", "a.b"): "field 'translation' has no field 'de.x'",
        ("translation", "a.b"): "field 'translation' is dict, not text",
        ("y", "a.b"): "field 'y' is bool, not text",
        ("n", "a.b"): "field 'n' is int, not text .*Files.numbers = True",
    }
    for (inputs, targets), message in faults.items():
        with pytest.raises(ValueError, match=message):
            example(inputs=inputs, targets=targets)
    for labels, message in {("a", "b"): "is 3, and there are 2 names"}.items():
        with pytest.raises(ValueError, match=message):
            example(inputs="a.b", targets="n", labels=labels)


def test_a_template_applies_to_every_right_answer(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "who?", "a": {"text": ["I", "me"]}}\n')
    (row,) = read(described(tmp_path / "a.jsonl", inputs="q", targets="answer: {a.text}"))
    assert row == TextExample("who?", "answer: I", ("answer: I", "answer: me"))
    with pytest.raises(ValueError, match="field 'a.text' is list, not text"):
        read(described(tmp_path / "a.jsonl", inputs="q", targets="{q} {a.text}"))
    (tmp_path / "a.txt").write_text("ein Hund\n")
    (row,) = read(described(tmp_path / "a.txt", inputs=None, targets="German: {targets}"))
    assert row.targets == "German: ein Hund"
    (tmp_path / "b.jsonl").write_text('{"q": -1, "n": NaN}\n')
    with pytest.raises(ValueError, match="field 'q' is -1: it has no label"):
        read(described(tmp_path / "b.jsonl", inputs=None, targets="q", labels=("a",)))
    with pytest.raises(ValueError, match="field 'n' is float, not text"):
        read(described(tmp_path / "b.jsonl", inputs=None, targets="n", numbers=True))


@pytest.mark.parametrize(
    "kind, value, words",
    [
        ("classes", 2.5, "is 2.5, no label: a label is a text or an integer"),
        ("classes", "", "is '', no label"),
        ("classes", 3, "is 3, and there are 2 names of labels"),
        ("classes", "\ud800", "is "),
        ("labels", 7, "is int, no list of labels"),
        ("labels", "[1, 2", r"is '\[1, 2', no JSON list"),
        ("number", True, "is bool, no number"),
        ("number", [1], "is list, no number"),
        ("number", "ten", "'ten' is no number"),
        ("tags", 3, "is int, no list of spans"),
        ("tags", [{"start": 0, "end": 3}], "has a span without 'label'"),
        ("tags", ["O", "B-color"], "has 2 tags, but the inputs are 3 words between single spaces"),
        ("tags", [[0, 30, "color"]], "the span 0 to 30 is not in the 11 characters"),
    ],
    ids=range(13),
)
def test_a_field_that_is_no_target_of_a_readout_says_of_which_form_one_is(kind, value, words):
    with pytest.raises(FieldError, match=words):
        label_fields.write_target(kind, value, ("no", "yes"), "the red cat")
