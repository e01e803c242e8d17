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
