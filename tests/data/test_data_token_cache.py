# SPDX-License-Identifier: Apache-2.0
"""Tokens on disk: complete or absent, verified when they are opened, written again if damaged."""

import json
import os

import numpy as np
import pytest
from test_data_content import described, first_target, write_pairs

from t5x_lite import data
from t5x_lite.data import cache, token_writer


def overwrite(name, ids):
    """Change of a token file, as a function of its folder."""

    def change(folder):
        path = folder / name
        size = path.stat().st_size
        path.write_bytes(np.full(size // 2, ids, np.uint16).tobytes())

    return change


def cut_offsets(folder):
    offsets = np.load(folder / "targets_offsets.npy")
    np.save(folder / "targets_offsets.npy", offsets[::-1])


def drop_keys(folder):
    (folder / "meta.json").write_text("{}")


def change_meta(folder):
    meta = json.loads((folder / "meta.json").read_text())
    meta["features"]["targets"]["eos"] = 7
    (folder / "meta.json").write_text(json.dumps(meta))


def empty_meta(folder):
    (folder / "meta.json").write_bytes(b"")


def lose_inputs(folder):
    (folder / "inputs.bin").unlink()


DAMAGE = {
    "ids beyond the vocabulary": overwrite("targets.bin", 60_000),
    "zeros": overwrite("targets.bin", 0),
    "falling offsets": cut_offsets,
    "no keys": drop_keys,
    "other eos": change_meta,
    "empty meta": empty_meta,
    "no inputs": lose_inputs,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_tokens_are_written_again(name, tmp_path, caplog):
    write_pairs(tmp_path / "train.jsonl")
    cfg = described(tmp_path)
    whole = data.open_batches(cfg, "encoder_decoder", 2, 0)
    wanted = whole.at(1)
    (folder,) = (tmp_path / "cache").iterdir()
    DAMAGE[name](folder)
    again = data.open_batches(cfg, "encoder_decoder", 2, 0)
    again.restore(whole.state())
    np.testing.assert_array_equal(again.at(1).targets, wanted.targets)
    assert f"{folder} are damaged" in caplog.text and "written again" in caplog.text
    caplog.clear()
    data.open_batches(cfg, "encoder_decoder", 2, 0)
    assert "damaged" not in caplog.text


def test_tokens_that_cannot_be_read_now_are_not_removed(tmp_path, monkeypatch):
    write_pairs(tmp_path / "train.jsonl")
    cfg = described(tmp_path)
    first_target(cfg)
    (folder,) = (tmp_path / "cache").iterdir()

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(cache, "read_meta", fail)
    with pytest.raises(ValueError, match="cannot be read now .*Input/output error"):
        first_target(cfg)
    assert folder.exists()


def test_tokens_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(token_writer, "sync_folder", lambda folder: events.append(folder.name))
    rename = os.rename

    def renamed(old, new):
        assert events == [old.name]
        rename(old, new)

    monkeypatch.setattr(token_writer.os, "rename", renamed)
    write_pairs(tmp_path / "train.jsonl")
    first_target(described(tmp_path))
    assert len(events) == 1
