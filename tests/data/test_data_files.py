# SPDX-License-Identifier: Apache-2.0
"""A user's own files: every format gives the same rows, every fault is named and counted."""

import gzip
import json

import pytest

from t5x_lite import config, data
from t5x_lite.data import files, token_writer
from t5x_lite.data.corpora import TextExample
from t5x_lite.data.task import BEGINNING

BYTES = config.Vocabulary("bytes")
PAIRS = [("eins", "one"), ("zwei", "two"), ("drei\u2028", "three ünï")]
ROWS = [TextExample(source, target, (target,)) for source, target in PAIRS]


def described(pattern, **changes) -> config.Files:
    fields = dict(name="toy", train=str(pattern), vocabulary=BYTES, inputs="de", targets="en")
    return config.Files(**(fields | changes))


def read(cfg: config.Files, split="train", counts=None) -> list[TextExample]:
    """Examples of a split.

    Args:
      cfg: the files.
      split: of the files.
      counts: receives the number of lines left out.
    """
    return list(files.read_rows(cfg, split, {} if counts is None else counts))


def opened(cfg: config.Files, folder, **changes) -> config.Data:
    """Data of files.

    Args:
      cfg: the files.
      folder: of the cache.
      **changes: other fields of config.Data.
    """
    fields = dict(lengths={"inputs": 16, "targets": 16}, cache_dir=str(folder / "cache"))
    return config.Data(task=cfg, **(fields | changes))


def as_jsonl(path):
    """Writes PAIRS as JSONL."""
    lines = [json.dumps({"de": de, "en": en, "more": 1}) for de, en in PAIRS]
    path.write_text("\n".join(lines) + "\n\n")


def as_tsv(path):
    """Writes PAIRS as TSV."""
    path.write_text("en\tde\tmore\n" + "".join(f"{en}\t{de}\t1\n" for de, en in PAIRS))


def as_parquet(path):
    """Writes PAIRS as Parquet."""
    import pyarrow
    import pyarrow.parquet

    columns = {"de": [de for de, _ in PAIRS], "en": [en for _, en in PAIRS], "more": [1, 2, 3]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def as_gzip(path):
    """Writes PAIRS as JSONL, compressed."""
    as_jsonl(path.with_suffix(""))
    path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))


WRITERS = {
    "a.jsonl": as_jsonl,
    "a.tsv": as_tsv,
    "a.parquet": as_parquet,
    "a.jsonl.gz": as_gzip,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(name, tmp_path):
    WRITERS[name](tmp_path / name)
    assert read(described(tmp_path / name)) == ROWS


def test_text_is_one_example_per_line_or_per_file(tmp_path):
    (tmp_path / "a.txt").write_text("first\n\nsecond\n")
    (tmp_path / "b.txt").write_text("third")
    cfg = described(tmp_path / "*.txt", inputs=None, targets="text")
    assert [row.targets for row in read(cfg)] == ["first", "second", "third"]
    whole = described(tmp_path / "*.txt", inputs=None, whole_files=True)
    assert [row.targets for row in read(whole)] == ["first\n\nsecond\n", "third"]


def test_a_glob_reads_its_files_in_order_of_name(tmp_path):
    for name in "cab":
        (tmp_path / f"{name}.txt").write_text(name)
    assert [row.targets for row in read(described(tmp_path / "?.txt", inputs=None))] == list("abc")


def test_a_list_of_targets_is_a_list_of_right_answers(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"de": "Ei", "en": ["egg", "ovum"]}\n')
    assert read(described(tmp_path / "a.jsonl")) == [TextExample("Ei", "egg", ("egg", "ovum"))]


FAULTS = {
    '{"de": "a", "en"': "line 2: not JSON",
    '["a"]': "line 2: a JSON array",
    "3": "line 2: not a JSON object",
    '{"de": "a"}': "line 2: no field 'en'; there are 'de'",
    '{"de": 3, "en": "b"}': "line 2: field 'de' is int, not text",
    '{"de": "a", "en": []}': "line 2: field 'en' is list, not text",
    '{"de": "a", "en": null}': "line 2: field 'en' is NoneType, not text",
}


@pytest.mark.parametrize("line", FAULTS)
def test_a_broken_line_stops_with_its_number_or_is_counted(line, tmp_path):
    path = tmp_path / "a.jsonl"
    good = '{"de": "x", "en": "y"}\n'
    path.write_text(good + line + "\n" + good)
    with pytest.raises(ValueError, match=FAULTS[line]) as caught:
        read(described(path))
    assert "a.jsonl" in str(caught.value) and 'Files.broken = "skip"' in str(caught.value)
    counts = {}
    assert len(read(described(path, broken="skip"), counts=counts)) == 2
    assert counts == {"broken lines left out": 1}


def test_a_line_that_is_not_utf8_is_a_broken_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n\xff\xfe\ngood\n")
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        read(described(path, inputs=None))
    assert len(read(described(path, inputs=None, broken="skip"))) == 2


def test_a_tsv_line_of_other_width_is_a_broken_line(tmp_path):
    (tmp_path / "a.tsv").write_text("de\ten\na\tb\na\tb\tc\n")
    with pytest.raises(ValueError, match="line 3: 3 columns where the first line has 2"):
        read(described(tmp_path / "a.tsv"))


def test_skipped_lines_are_told_and_counted_again_from_the_cache(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"de": "x", "en": "y"}\nbroken\n')
    cfg = opened(described(path, broken="skip"), tmp_path)
    for _ in range(2):
        statistics = data.open_batches(cfg, "encoder_decoder", 1, 0).statistics
        assert statistics.counts == {"broken lines left out": 1}
        assert "1 broken lines left out" in str(statistics)


def test_a_missing_file_names_the_binding(tmp_path):
    with pytest.raises(ValueError, match="Files.train of 'toy' matches no file: .*nothing"):
        read(described(tmp_path / "nothing*.jsonl"))


def test_an_empty_file_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match="toy-train has no example"):
        data.open_batches(
            opened(described(tmp_path / "a.jsonl"), tmp_path), "encoder_decoder", 1, 0
        )
    with pytest.raises(ValueError, match="toy has no examples in train"):
        cfg = opened(described(tmp_path / "a.jsonl"), tmp_path, stream=True)
        data.open_batches(cfg, "encoder_decoder", 1, 0)


def test_an_unknown_ending_asks_for_the_format(tmp_path):
    (tmp_path / "a.dat").write_text('{"de": "x", "en": "y"}\n')
    with pytest.raises(ValueError, match="set Files.format to jsonl, json, tsv, csv, text"):
        read(described(tmp_path / "a.dat"))
    assert len(read(described(tmp_path / "a.dat", format="jsonl"))) == 1


def test_what_is_no_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_text("text")
    with pytest.raises(ValueError, match="a.parquet: not a Parquet file"):
        read(described(tmp_path / "a.parquet"))


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"de": "x", "en": "y"}\n')
    cfg = opened(described(path), tmp_path)
    assert len(data.open_dataset(cfg, "train")) == 1
    path.write_text('{"de": "x", "en": "y"}\n' * 2)
    assert len(data.open_dataset(cfg, "train")) == 2


def test_the_cache_is_used_and_not_made_again(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    as_jsonl(path)
    cfg = opened(described(path), tmp_path)
    first = data.open_dataset(cfg, "train").parts[0]
    monkeypatch.setattr(token_writer, "write_chunks", lambda *_: pytest.fail("made again"))
    assert data.open_dataset(cfg, "train").parts[0].digest == first.digest


def test_a_cache_made_by_another_at_the_same_time_is_taken(tmp_path, monkeypatch):
    as_jsonl(tmp_path / "a.jsonl")
    cfg = opened(described(tmp_path / "a.jsonl"), tmp_path)
    fill, inside = token_writer.write_chunks, []

    def slow(folder, entry):
        fill(folder, entry)
        if not inside:
            inside.append(1)
            data.open_dataset(cfg, "train").parts  # noqa: B018

    monkeypatch.setattr(token_writer, "write_chunks", slow)
    assert len(data.open_dataset(cfg, "train")) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_failed_reading_leaves_nothing_behind(tmp_path):
    # Beyond the examples that are read before the cache is looked up.
    (tmp_path / "a.jsonl").write_text('{"de": "x", "en": "y"}\n' * BEGINNING + "broken\n")
    with pytest.raises(ValueError, match=f"line {BEGINNING + 1}"):
        data.open_batches(
            opened(described(tmp_path / "a.jsonl"), tmp_path), "encoder_decoder", 1, 0
        )
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path):
    as_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match="Data.cache_dir .*Data.stream = True"):
        len(data.open_dataset(opened(described(tmp_path / "a.jsonl"), tmp_path), "train"))


def test_evaluation_text_is_as_it_was_written(tmp_path):
    as_jsonl(tmp_path / "a.jsonl")
    files_of = described(tmp_path / "a.jsonl", validation=str(tmp_path / "a.jsonl"))
    cfg = opened(files_of, tmp_path, vocabulary=None)
    assert list(data.open_dataset(cfg, "validation")) == ROWS
    assert list(data.open_dataset(cfg, "train")) == ROWS
    with pytest.raises(IndexError, match="has 3 examples, not number 3"):
        data.open_dataset(cfg, "validation")[3]


def test_tasks_of_a_mixture_must_share_their_vocabulary(tmp_path):
    as_jsonl(tmp_path / "a.jsonl")
    first = described(tmp_path / "a.jsonl")
    second = described(
        tmp_path / "a.jsonl", name="b", vocabulary=config.Vocabulary("bytes", None, None, 5)
    )
    cfg = opened(config.Mixture((first, second), (1.0, 1.0)), tmp_path)
    with pytest.raises(ValueError, match="must share one vocabulary: b "):
        data.open_batches(cfg, "encoder_decoder", 1, 0)
