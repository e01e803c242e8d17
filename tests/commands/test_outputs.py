# SPDX-License-Identifier: Apache-2.0
"""Laws of the output files of commands: one process writes, and what it wrote stays whole."""

import pytest

from t5x_lite.cli import records


def test_two_processes_do_not_mix_their_lines_in_one_output(tmp_path):
    path = tmp_path / "out.jsonl"
    sink = records.Sink(str(path), {"input_digest": "x"})
    assert sink.begin(overwrite=False) == 0
    with sink.open() as output:
        records.append(output, ["one", "two"])
        output.flush()
        other = records.Sink(str(path), {"input_digest": "x"})
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=f"Another process is writing {path}"):
                other.begin(overwrite)
        with pytest.raises(ValueError, match="Another process"), other.open():
            pass
    assert path.read_text() == "one\ntwo\n" and other.begin(overwrite=False) == 2
    nowhere = [records.Sink("/dev/null", {"input_digest": "x"}) for _ in range(2)]
    with nowhere[0].open(), nowhere[1].open():
        pass


@pytest.mark.parametrize("size", [1, 3, 4, 100])
@pytest.mark.parametrize(
    "content", ["", "one", "one\n", "one\ntwo\nthr", "\n\n\nx", "a\n" + 20 * "b"]
)
def test_a_half_written_line_is_cut_off_wherever_pieces_of_the_file_end(
    content, size, tmp_path, monkeypatch
):
    monkeypatch.setattr(records, "MOST_BYTES", size)
    path = tmp_path / "out"
    path.write_text(content)
    assert records.complete_lines(path) == content.count("\n")
    assert path.read_text() == content[: content.rfind("\n") + 1]


@pytest.mark.parametrize("name", ["words.txt", "./words.txt", "link.txt", "hard.txt", "new.txt"])
def test_an_output_never_replaces_what_is_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = tmp_path / "words.txt"
    read.write_text("cat\n")
    (tmp_path / "link.txt").symlink_to("words.txt")
    (tmp_path / "hard.txt").hardlink_to(read)
    (tmp_path / "of.txt.settings.json").hardlink_to(read)
    sources = (None, "-", "gone.txt", str(read))
    sink = records.Sink(name, {"input_digest": "x"}, sources)
    if name == "new.txt":
        assert sink.begin(overwrite=True) == 0
        sink = records.Sink("of.txt", {"input_digest": "x"}, sources)
    for overwrite in (False, True):
        with pytest.raises(
            ValueError, match="--output would write over .*words.txt, which is read"
        ):
            sink.begin(overwrite)
    assert read.read_text() == "cat\n"
