# SPDX-License-Identifier: Apache-2.0
"""Identity of data: content decides, and nothing else does."""

import dataclasses
import itertools
import json
import os
import shutil

import numpy as np
import pytest

from t5x_lite import config, data
from t5x_lite.data import content, task, token_writer
from t5x_lite.tokenizers.vocabularies import ByteVocabulary

BYTES = config.Vocabulary("bytes", extra_ids=20)
SECOND = 10**9


def write_pairs(path, answer="answer", count=12) -> None:
    """Writes examples to a file.

    Args:
      path: the file.
      answer: text of the targets.
      count: number of examples.
    """
    rows = [{"inputs": f"question {i}", "targets": f"{answer} {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def described(folder, train="train.jsonl", **changes) -> config.Data:
    """Data of the examples of a folder.

    Args:
      folder: of the files and the cache.
      train: files of the training split.
      **changes: other fields of config.Data.
    """
    files = config.Files("mine", str(folder / train), BYTES, inputs="inputs")
    fields = dict(lengths={"inputs": 24, "targets": 24}, cache_dir=str(folder / "cache"))
    return config.Data(files, **(fields | changes))


def first_target(cfg: config.Data) -> str:
    batch = data.open_batches(cfg, "encoder_decoder", 1, 0)
    tokens = next(batch.evaluation()).targets[0]
    return ByteVocabulary(20).decode(tokens)


def folders(folder) -> list:
    return sorted(path.name for path in (folder / "cache").iterdir() if path.is_dir())


def keep_time(path, stat) -> None:
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def touched(path) -> None:
    os.utime(path, ns=(1, path.stat().st_mtime_ns))


def without_others(path) -> None:
    path.chmod(0o600)


def copied(path) -> None:
    shutil.copy(path, f"{path}.new")
    os.replace(f"{path}.new", path)


def dated(path) -> None:
    os.utime(path, ns=(1, 1))


UNCHANGED = [touched, without_others, copied, dated]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("change", UNCHANGED)
def test_reading_and_copying_a_file_change_nothing(change, stream, tmp_path):
    path = tmp_path / "train.jsonl"
    write_pairs(path)
    cfg = described(tmp_path, stream=stream)
    state = json.loads(json.dumps(data.open_batches(cfg, "encoder_decoder", 2, 0).state()))
    change(path)
    data.open_batches(cfg, "encoder_decoder", 2, 0).restore(state)
    assert stream or len(folders(tmp_path)) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_data_that_moved_are_the_same_data(stream, tmp_path):
    write_pairs(tmp_path / "train.jsonl")
    state = data.open_batches(described(tmp_path, stream=stream), "encoder_decoder", 2, 0).state()
    (tmp_path / "moved").mkdir()
    os.replace(tmp_path / "train.jsonl", tmp_path / "moved" / "part.jsonl")
    cfg = described(tmp_path, train="moved/*.jsonl", stream=stream)
    data.open_batches(cfg, "encoder_decoder", 2, 0).restore(state)
    assert stream or len(folders(tmp_path)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("padding", [0, 2 * content.SMALL])
def test_other_content_of_the_same_size_and_time_is_other_data(
    stream, padding, tmp_path, monkeypatch
):
    monkeypatch.setattr(content, "SETTLED_NS", -SECOND)  # so that a large file is remembered
    path, last = tmp_path / "train.jsonl", task.BEGINNING + 9

    def write(answer):
        write_pairs(path, count=last + 1)
        text = path.read_text().replace(f"answer {last}", f"{answer} {last}")
        path.write_text(text + "\n" * padding)

    def last_target():
        return data.open_dataset(described(tmp_path), "train")[last].targets

    write("answer")
    old, cfg = path.stat(), described(tmp_path, stream=stream)
    batches = data.open_batches(cfg, "encoder_decoder", 2, 0)
    state = json.loads(json.dumps(batches.state()))
    assert last_target() == f"answer {last}"
    write("reword")
    keep_time(path, old)
    assert path.stat().st_size == old.st_size and path.stat().st_mtime_ns == old.st_mtime_ns
    assert last_target() == f"reword {last}"
    with pytest.raises(ValueError, match=r"train\.jsonl has changed"):
        data.open_batches(cfg, "encoder_decoder", 2, 0).restore(state)


def test_a_large_file_is_read_once_for_each_state(tmp_path, monkeypatch):
    path = tmp_path / "large"
    path.write_bytes(b"a" * (content.SMALL + 1))
    os.utime(path, ns=(1, 1))
    monkeypatch.setattr(content, "SETTLED_NS", -content.SETTLED_NS)
    reads = []
    whole = content.whole_digest
    monkeypatch.setattr(content, "whole_digest", lambda name: reads.append(name) or whole(name))
    first = content.digest_files([path], tmp_path)
    assert content.digest_files([path], tmp_path) == first and len(reads) == 1
    (tmp_path / content.REMEMBERED).write_text("[1")
    assert content.digest_files([path], tmp_path) == first and len(reads) == 2
    path.write_bytes(b"b" * (content.SMALL + 1))
    os.utime(path, ns=(1, 1))
    assert content.digest_files([path], tmp_path) != first and len(reads) == 3


def test_a_file_that_may_still_change_is_not_remembered(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(b"a" * (content.SMALL + 1))
    content.digest_files([path], tmp_path)
    assert not (tmp_path / content.REMEMBERED).exists()


@pytest.mark.parametrize("blocks", [2, content.BLOCKS])
@pytest.mark.parametrize("size", [1, content.BLOCK, 40 * content.BLOCK])
def test_a_sample_sees_the_size_and_both_ends(size, blocks, tmp_path):
    path, digests = tmp_path / "file", set()
    for body in (b"a" * size, b"a" * (size + 1), b"b" + b"a" * size, b"a" * size + b"b"):
        path.write_bytes(body)
        digests.add(content.sampled_digest(str(path), blocks))
    assert len(digests) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_content_that_changes_while_it_is_read_is_refused(stream, tmp_path, monkeypatch):
    path, times = tmp_path / "train.jsonl", itertools.count()
    write_pairs(path)
    encode = task.vocabularies.encode_texts

    def date_again():
        os.utime(path, ns=(1, next(times)))

    def meanwhile(vocabulary, texts):
        change()
        return encode(vocabulary, texts)

    change = date_again

    monkeypatch.setattr(task.vocabularies, "encode_texts", meanwhile)
    cfg = described(tmp_path, stream=stream)
    data.open_batches(cfg, "encoder_decoder", 1, 0)

    def write_again():
        # At once: the stream that was opened first may read on, and write too.
        number = next(times)
        write_pairs(tmp_path / f"{number}", f"other {number}")
        os.replace(tmp_path / f"{number}", path)

    change = write_again
    write_pairs(path, "another")
    with pytest.raises(ValueError, match="changed while they were read"):
        data.open_batches(cfg, "encoder_decoder", 1, 0)


def test_older_copies_of_tokens_are_listed(tmp_path, caplog):
    path = tmp_path / "train.jsonl"
    write_pairs(path)
    first_target(described(tmp_path))
    (old,) = folders(tmp_path)
    assert "tokenized again" not in caplog.text
    write_pairs(path, "other")
    first_target(described(tmp_path))
    assert "mine-train was tokenized again" in caplog.text and old in caplog.text


IDS = [
    (np.array([1, 300]), "has id 300, but its vocabulary has the ids 0 to 258"),
    (np.array([-1, 3]), "has id -1"),
    (np.array(b"text"), "holds text, not ids: add seqio.preprocessors.tokenize"),
    (np.array(["a", "b"]), "holds text, not ids"),
    (np.array([1.0]), "is not a row of ids, but float64"),
    (np.array(3), r"is not a row of ids, but int64 of shape \(\)"),
    (np.array([[3]]), r"is not a row of ids, but int64 of shape \(1, 1\)"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("side", ["inputs", "targets"])
@pytest.mark.parametrize("ids, message", IDS)
def test_ids_are_those_of_the_vocabulary(ids, message, side, stream, tmp_path, monkeypatch):
    good = np.array([5, 1])
    both = {"inputs": [good, good, good], "targets": [good, good, good]}
    both[side] = [good, good, ids]

    def read(split, begin=0, epoch=0, probe=False):
        yield token_writer.Chunk(**both)

    pair = (ByteVocabulary(), ByteVocabulary())
    foreign = task.Task("mine", ("train",), pair, read, source=lambda split: "", has_inputs=True)
    monkeypatch.setattr("t5x_lite.data.tasks.resolve", lambda cfg: [(foreign, 1.0)])
    with pytest.raises(ValueError, match=rf"mine \(train\), {side}: example 2 {message}"):
        data.open_batches(described(tmp_path, stream=stream), "encoder_decoder", 2, 0)


def test_a_file_of_two_splits_is_told_by_name(tmp_path, caplog):
    for name in ("m1", "m2"):
        write_pairs(tmp_path / f"{name}.jsonl", name)
    (tmp_path / "linked.jsonl").symlink_to(tmp_path / "m1.jsonl")
    files = config.Files("mine", str(tmp_path / "m*.jsonl"), BYTES, inputs="inputs")

    def warned(validation):
        caplog.clear()
        cfg = described(tmp_path, train="m*.jsonl")
        cfg = config.Data(
            dataclasses.replace(files, validation=str(tmp_path / validation)),
            cfg.lengths,
            cache_dir=cfg.cache_dir,
        )
        data.open_batches(cfg, "encoder_decoder", 2, 0)
        return "m1.jsonl is read by train and by validation too" in caplog.text

    assert warned("m1.jsonl") and warned("linked.jsonl")
    write_pairs(tmp_path / "other.jsonl", "other")
    assert not warned("other.jsonl")


def long_data(folder, inputs, targets, **changes) -> config.Data:
    """Data of one long example and lengths of 24.

    Args:
      folder: of the files and the cache.
      inputs: characters of the inputs.
      targets: characters of the targets.
      **changes: fields of config.Data.
    """
    row = {"inputs": "i" * inputs, "targets": "t" * targets}
    (folder / "long.jsonl").write_text(json.dumps(row) + "\n")
    return described(folder, train="long.jsonl", **changes)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
def test_long_inputs_are_truncated_and_counted(stream, layout, tmp_path, caplog):
    batches = data.open_batches(long_data(tmp_path, 90, 5, stream=stream), layout, 2, 0)
    assert batches.statistics.truncated == {"inputs": 1, "targets": 0}
    assert "1 inputs truncated (100.00%)" in caplog.text
    assert batches.at(0).loss_weights.any()


@pytest.mark.parametrize("stream", [False, True])
def test_targets_that_are_all_truncated_are_refused(stream, tmp_path):
    with pytest.raises(ValueError, match=r"None of the 1 targets of mine fits 24 tokens whole"):
        data.open_batches(long_data(tmp_path, 5, 90, stream=stream), "encoder_decoder", 2, 0)


def test_a_long_validation_split_does_not_stop_training(tmp_path):
    write_pairs(tmp_path / "train.jsonl")
    cfg = long_data(tmp_path, 90, 90)
    files = dataclasses.replace(
        cfg.task, train=str(tmp_path / "train.jsonl"), validation=str(tmp_path / "long.jsonl")
    )
    cfg = config.Data(files, cfg.lengths, cache_dir=cfg.cache_dir)
    for split in ("train", "validation"):
        data.open_batches(cfg, "encoder_decoder", 2, 0, split=split)


def test_one_vocabulary_is_trained_on_all_files_of_a_mixture(tmp_path):
    write_pairs(tmp_path / "one.jsonl", "black zebra " * 9)
    write_pairs(tmp_path / "two.jsonl", "quick jumping fox " * 9)
    trained = config.Vocabulary("trained", size=320, extra_ids=4)

    def mixed(*kinds):
        files = [
            config.Files(name, str(tmp_path / f"{name}.jsonl"), kind, inputs="inputs")
            for name, kind in zip(("one", "two"), kinds, strict=True)
        ]
        mixture = config.Mixture(tuple(files), (1.0, 3.0))
        return config.Data(mixture, {"inputs": 40, "targets": 250}, cache_dir=str(tmp_path / "c"))

    cfg = mixed(trained, trained)
    vocabulary, _ = data.open_vocabularies(cfg)
    for text in ("black zebra", "jumping fox"):
        assert vocabulary.decode(vocabulary.encode(text)) == text
    assert data.open_batches(cfg, "encoder_decoder", 4, 0).at(0).targets.any()
    assert len(list((tmp_path / "c").glob("pieces-*"))) == 1
    smaller = config.Vocabulary("trained", size=310, extra_ids=4)
    with pytest.raises(ValueError, match="must share one vocabulary: two "):
        data.open_batches(mixed(trained, smaller), "encoder_decoder", 4, 0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, None),
        ({"lengths": {"targets": 8}}, 'set Data.lengths\\["inputs"\\]'),
        ({"train": "nothing.jsonl"}, "matches no file"),
        ({"train": "broken.jsonl"}, "line 1: not JSON"),
        ({"train": "empty.jsonl"}, "mine has no examples in train"),
    ],
)
def test_a_check_refuses_what_opening_would(changes, message, tmp_path):
    write_pairs(tmp_path / "train.jsonl")
    (tmp_path / "broken.jsonl").write_text("nonsense\n")
    (tmp_path / "empty.jsonl").touch()
    cfg = described(tmp_path, **changes)
    if message is None:
        data.check_examples(cfg, "encoder_decoder", "train")
        assert not (tmp_path / "cache").exists()
        return
    with pytest.raises(ValueError, match=message):
        data.check_examples(cfg, "encoder_decoder", "train")
