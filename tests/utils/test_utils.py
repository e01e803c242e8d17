# SPDX-License-Identifier: Apache-2.0
"""Laws of near names and of files that appear whole."""

import errno
import os

import pytest

from t5x_lite.utils import atomic_files, nearest


def test_near_names_are_few_and_the_nearest_first():
    known = [f"config_{number:03}" for number in range(200)]
    assert nearest.near_names("confg_017", known)[0] == "config_017"
    assert len(nearest.near_names("confg", known)) == nearest.MOST == 5
    assert nearest.suggest("x", known).endswith("and 195 more")
    assert nearest.suggest("TRAIN", ["train", "trains"]) == "did you mean train or trains?"
    assert nearest.suggest("x", []) == "known: none"


def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_files.write_atomically(path, "é")
    assert path.read_bytes() == "é".encode()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            atomic_files.write_atomically(path, b"other")
    assert [each.name for each in tmp_path.iterdir()] == ["file"] and path.read_text() == "é"
    with pytest.raises(FileNotFoundError):
        atomic_files.write_atomically(tmp_path / "missing" / "file", "x")
