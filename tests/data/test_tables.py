# SPDX-License-Identifier: Apache-2.0
"""Tables are read to the letter, or refused at the line that is wrong; no quote is a guess."""

import csv
import io

import pytest
from file_toys import CELLS, described, read
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_lite.data.corpora import TextExample

HEADERS = {
    "utf-16": ("de\ten\na\tb\n".encode("utf-16"), "line 1 .* not UTF-8 but UTF-16 .iconv"),
    "latin-1": ("dé\ten\na\tb\n".encode("latin-1"), "line 1 .* not UTF-8 .byte 2 is 0xe9"),
    "empty": (b"", "line 1 .* the file is empty"),
    "twice": (b"de\ten\ten\na\tb\tc\n", "2 columns are named 'en'"),
    "old Mac": (b"de\ten\ra\tb\r", "lines end in CR alone"),
}


@pytest.mark.parametrize("broken", ["stop", "skip"])
@pytest.mark.parametrize("fault", HEADERS)
def test_a_header_that_cannot_be_read_drops_no_file(fault, broken, tmp_path):
    content, message = HEADERS[fault]
    (tmp_path / "a-1.tsv").write_text("de\ten\na\tb\n")
    (tmp_path / "a-2.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=f"a-2.tsv.*{message}"):
        read(described(tmp_path / "a-*.tsv", broken=broken))


def test_a_column_that_is_not_read_may_share_its_name(tmp_path):
    (tmp_path / "a.tsv").write_text("de\t\t\ten\na\t1\t2\tb\n")
    assert read(described(tmp_path / "a.tsv")) == [TextExample("a", "b", ("b",))]


@pytest.mark.parametrize("delimiter, ending", [("\t", "tsv"), (",", "csv")])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_what_a_csv_writer_quotes_comes_back_to_the_letter(delimiter, ending, quoting, tmp_path):
    written = io.StringIO()
    writer = csv.writer(written, delimiter=delimiter, quoting=quoting)
    writer.writerows([("de", "en"), *((cell, "y") for cell in CELLS)])
    (tmp_path / f"a.{ending}").write_text(written.getvalue(), newline="")
    quotes = True if ending == "tsv" else None
    assert [row.inputs for row in read(described(tmp_path / f"a.{ending}", quotes=quotes))] == CELLS


def test_a_cell_that_looks_quoted_is_never_read_by_guess(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('de\ten\n"She said ""yes"""\tb\n"Hello\tb\n"Hello"\tb\n"\tb\n')
    with pytest.raises(ValueError, match="line 2: .* set Files.quotes = True .* or False"):
        read(described(path))
    kept = read(described(path, quotes=False))
    assert [row.inputs for row in kept] == ['"She said ""yes"""', '"Hello', '"Hello"', '"']
    assert [row.inputs for row in read(described(path, broken="skip"))] == ['"Hello', '"']
    path.write_text('"de"\t"en"\n"a"\t"b"\n')
    with pytest.raises(ValueError, match="line 1 should hold the names .* Files.quotes = True"):
        read(described(path, broken="skip"))
    path.write_text('de\ten\n"a\tb"\tc\n')
    with pytest.raises(ValueError, match="line 2: 3 columns .* Files.quotes = True"):
        read(described(path))


@pytest.mark.parametrize("text", [b'a\t"b\n', b'a\t"b" c\nx\ty\n', b'a\t"b\xff"\nx\ty\n'])
def test_quotes_that_do_not_end_are_broken_lines(text, tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(b"de\ten\n" + text)
    with pytest.raises(ValueError, match="line 2: (broken quotes|not UTF-8)"):
        read(described(path, quotes=True))


TABLES = {
    # Name, content and what is wrong with it.
    "spaces.csv": ('de,en\n"a, b", "c, d"\n', "line 2: a space between ',' and a quote"),
    "alike.csv": ('de,en\n"a", "b"\n', "line 2: a space between ',' and a quote"),
    "header.csv": ("de, en\na,b\n", "line 1: no column 'en'.* ' en' has spaces or quotes"),
    "semicolons.csv": ("de;en\na;b\n", 'semicolons. Set .* Files.delimiter = ";"'),
    "quoted.csv": ('"de";"en"\n"a";"b"\n', 'semicolons. Set .* Files.delimiter = ";"'),
    "tabs.csv": ("de\ten\na\tb\n", 'tabs. Set Files.format = "tsv"'),
    "commas.tsv": ("de,en\na,b\n", 'commas. Set Files.format = "csv"'),
    "quoted.tsv": ('"de"\t"en"\n"a"\t"b"\n', "line 1 should hold .* Files.quotes = True"),
    "missing.tsv": ("de\tfr\na\tb\n", "line 1: no column 'en'; there are 'de', 'fr'$"),
    "missing.csv": ("de,fr\na,b\n", "line 1: no column 'en'; there are 'de', 'fr'$"),
    "short.csv": ('de,en\n"a\nb",c,"d"\n', "line 2: 3 columns where the first line has 2[.]"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_another_kind_is_named_at_its_header(name, tmp_path):
    content, message = TABLES[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read(described(tmp_path / name))
    if "line 1" in message or "Set" in message:  # no line of it is an example
        with pytest.raises(ValueError, match=message):
            read(described(tmp_path / name, broken="skip"))


def test_a_table_is_read_as_its_message_says(tmp_path):
    (tmp_path / "a.csv").write_text('"de";"en"\n"a;b";c, "d"\n')
    (row,) = read(described(tmp_path / "a.csv", delimiter=";"))
    assert row == TextExample("a;b", 'c, "d"', ('c, "d"',))
    for delimiter in (";;", '"', "\n", ""):
        with pytest.raises(ValueError, match="Files.delimiter must be one character"):
            described(tmp_path / "a.csv", delimiter=delimiter)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(' ",;\na', max_size=6), min_size=2, max_size=2), st.sampled_from(",;\t"))
def test_what_a_csv_writer_writes_is_never_refused(tmp_path_factory, cells, delimiter):
    written = io.StringIO()
    csv.writer(written, delimiter=delimiter).writerows([("de", "en"), cells])
    path = tmp_path_factory.getbasetemp() / "written.csv"
    path.write_text(written.getvalue(), newline="")
    (row,) = read(described(path, delimiter=delimiter))
    assert [row.inputs, row.targets] == cells
