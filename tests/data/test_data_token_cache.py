# SPDX-License-Identifier: Apache-2.0
"""Tokens on disk: complete or absent, verified when they are opened, written again if damaged."""

import json
import os

import numpy as np
import pytest
from test_data_content import described, first_target, write_pairs

from t5x_lite import config, data
from t5x_lite.data import cache, content, token_writer


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


def test_a_process_leaves_what_another_wrote_in_place_of_the_damage(tmp_path, monkeypatch):
    write_pairs(tmp_path / "train.jsonl")
    cfg = described(tmp_path)
    first_target(cfg)
    (folder,) = (tmp_path / "cache").iterdir()
    change_meta(folder)
    read, states = cache.read_folder, []

    def read_late(path, name):
        if not states:  # the damage is found, and another process is faster
            states.append(None)
            with pytest.raises(cache.DamagedTokens) as damage:
                read(path, name)
            first_target(cfg)
            states.append(cache.folder_state(folder))
            raise damage.value
        return read(path, name)

    monkeypatch.setattr(cache, "read_folder", read_late)
    first_target(cfg)
    assert cache.folder_state(folder) == states[1] is not None
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [folder.name]


CUTS = {
    "empty": lambda written: b"",
    "half": lambda written: written[: len(written) // 2],
    "a byte short": lambda written: written[:-1],
    "another letter": lambda written: written[:-400] + bytes([written[-400] ^ 1]) + written[-399:],
    "zeros": lambda written: bytes(len(written)),
    "text": lambda written: b"hello",
}


@pytest.mark.parametrize("damage", CUTS)
def test_a_damaged_vocabulary_in_the_cache_is_trained_again(damage, tmp_path, caplog):
    write_pairs(tmp_path / "a.jsonl", "black zebra, quick jumping fox " * 9)
    trained = config.Vocabulary("trained", size=310)
    vocabularies, texts = [], []
    for _ in range(3):
        files = config.Files("mine", str(tmp_path / "a.jsonl"), trained, inputs="inputs")
        cfg = config.Data(files, {"inputs": 24, "targets": 24}, cache_dir=str(tmp_path / "cache"))
        vocabularies.append(data.open_vocabularies(cfg)[1].model_bytes())
        texts.append(caplog.text)
        caplog.clear()
        (kept,) = (tmp_path / "cache").glob("pieces-*")
        if len(vocabularies) == 1:
            kept.write_bytes(CUTS[damage](kept.read_bytes()))
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]
    assert ["is damaged: it is written again" in text for text in texts] == [False, True, False]


@pytest.mark.parametrize("digest", ["", None, 5, [1], {}, "x", "0" * 63, True])
def test_a_remembered_digest_that_is_none_is_read_again(digest, tmp_path, monkeypatch):
    monkeypatch.setattr(content, "SMALL", 0)
    path, memory = tmp_path / "a.jsonl", tmp_path / content.REMEMBERED
    path.write_text("one")
    expected = content.digest_files([path])
    entries = {str(path): [*content.file_state(path), digest]}
    for known in (entries, {str(path): digest}, {str(path): []}, [digest]):
        memory.write_text(json.dumps(known))
        assert content.digest_files([path], tmp_path) == expected
