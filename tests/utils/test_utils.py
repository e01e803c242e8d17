# SPDX-License-Identifier: Apache-2.0
"""Laws of near names, of files that appear whole, and of files that somebody else wrote."""

import errno
import os
import re
import tomllib
from pathlib import Path

import pytest

from t5x_lite.utils import atomic_files, bounded_files, extras, nearest

ROOT = Path(__file__).parents[2]


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


def test_an_extra_is_installed_from_the_clone_or_as_the_package_requires_it(monkeypatch, tmp_path):
    assert extras.install_command("plan") == f"pip install '{ROOT}[plan]'"
    required = ["jax>=0.10", "libtpu<0.1,>=0.0.52; extra == 'plan'", 'gguf>=0.17; extra == "gguf"']
    required += ["seqio>=0.0.20; python_version < '3.14' and extra == 'seqio'"]
    monkeypatch.setattr(extras, "ROOT", tmp_path)
    monkeypatch.setattr(extras.importlib.metadata, "requires", lambda name: required)
    assert extras.install_command("plan") == "pip install 'libtpu<0.1,>=0.0.52'"
    assert extras.install_command("seqio") == "pip install 'seqio>=0.0.20'"


def test_messages_name_extras_that_exist_and_never_the_name_that_is_on_no_index():
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    used = set()
    for path in (ROOT / "t5x_lite").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"pip install\W+t5x_lite", text), path
        used |= set(re.findall(r"install_command\([\"']([\w-]+)", text))
    assert len(used) >= 4 and used <= known["optional-dependencies"].keys()
    assert known["authors"] and known["keywords"] and len(known["classifiers"]) > 8


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "nests too deep"),
        (b'{"a":' * 100_000, "nests too deep"),
        (b"[" + b"1," * 2**19 + b"1]", "at most 1,048,576 are read"),
        (b"[1]", "holds list"),
    ],
)
def test_json_that_cannot_be_read_names_the_file_and_the_reason(tmp_path, content, reason):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(bounded_files.UnreadableFileError, match=f"x.json.*{reason}"):
        bounded_files.read_json_object(path, most=2**20)


def test_what_has_no_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", "/dev/zero", tmp_path):
        with pytest.raises(bounded_files.UnreadableFileError, match="is not a regular file"):
            bounded_files.read_json(path)
    with pytest.raises(FileNotFoundError):
        bounded_files.read_json(tmp_path / "absent.json")
