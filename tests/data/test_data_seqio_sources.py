# SPDX-License-Identifier: Apache-2.0
"""seqio Tasks of a user: files and code that change, vocabularies and ids that do not fit."""

import json
import os

import numpy as np
import pytest

pytest.importorskip("seqio")

import seqio
import tensorflow as tf

from t5x_lite import config, data
from t5x_lite.data.task import BEGINNING
from t5x_lite.tokenizers import sentencepiece_training

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
BYTES = seqio.ByteVocabulary(extra_ids=5)
ENDED = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]


def split_line(ds):
    """Inputs and targets of lines with a tab."""

    def one(line):
        parts = tf.strings.split(line, "\t")
        return {"inputs": parts[0], "targets": parts[1]}

    return ds.map(one)


def prefixed(prefix):
    return lambda ds: ds.map(lambda x: {"inputs": prefix + x["inputs"], "targets": x["targets"]})


@pytest.fixture
def add(tmp_path):
    """Registers a task over a text file, in place of one of the same name."""
    (tmp_path / "data.tsv").write_text("".join(f"question {i}\tanswer {i}\n" for i in range(9)))
    names = set()

    def register(preprocessors=(*ENDED,), name="mine", vocabulary=BYTES, add_eos=True, source=None):
        if name in names:
            seqio.TaskRegistry.remove(name)
        names.add(name)
        source = source or seqio.TextLineDataSource({"train": str(tmp_path / "data.tsv")})
        feature = seqio.Feature(vocabulary, add_eos=add_eos)
        seqio.TaskRegistry.add(
            name,
            source,
            preprocessors=[split_line, *preprocessors],
            output_features={"inputs": feature, "targets": feature},
        )

    yield register
    for name in names:
        seqio.TaskRegistry.remove(name)


def described(folder, task="mine", **changes) -> config.Data:
    """Data of a seqio Task.

    Args:
      folder: of the cache.
      task: its name.
      **changes: other fields of config.Data.
    """
    fields = dict(lengths={"inputs": 40, "targets": 40}, cache_dir=str(folder / "cache"))
    return config.Data(task, **(fields | changes))


def opened(cfg) -> data.Batches:
    return data.open_batches(cfg, "encoder_decoder", 2, 0)


def texts(cfg) -> list[str]:
    dataset = data.open_dataset(cfg, "train")
    return [row.inputs for row in dataset]


@pytest.mark.parametrize("stream", [False, True])
def test_a_task_over_a_file_that_was_never_read_is_read(stream, add, tmp_path):
    add()
    path = tmp_path / "data.tsv"
    # relatime, the default of Linux, changes the time of access at the first reading alone.
    os.utime(path, ns=(0, path.stat().st_mtime_ns))
    cfg = described(tmp_path, stream=stream)
    state = json.loads(json.dumps(opened(cfg).state()))
    os.utime(path, ns=(10**18, path.stat().st_mtime_ns))
    path.chmod(0o600)
    opened(cfg).restore(state)
    path.write_text(path.read_text().replace("question 3", "question 7"))
    with pytest.raises(ValueError, match="has changed since the checkpoint|have changed since"):
        opened(cfg).restore(state)


def test_a_closure_of_another_value_is_another_task(add, tmp_path):
    cfg = described(tmp_path)
    for prefix in ("one: ", "two: ", "one: "):
        add([prefixed(prefix), *ENDED])
        assert texts(cfg)[0] == f"{prefix}question 0"


def test_code_decides_beyond_the_first_examples(add, tmp_path):
    rows = (f"question {i}\tanswer {i}\n" for i in range(BEGINNING + 10))
    (tmp_path / "data.tsv").write_text("".join(rows))
    last, cfg = f"question {BEGINNING + 9}", described(tmp_path)

    def renamed(name):
        def rename(x):
            return x | {"inputs": tf.strings.regex_replace(x["inputs"], f"^{last}$", name)}

        return lambda ds: ds.map(rename)

    for name in ("one", "two"):
        add([renamed(name), *ENDED])
        assert texts(cfg)[-1] == name


@pytest.mark.parametrize("stream", [False, True])
def test_a_value_that_no_code_shows_is_seen_in_the_first_examples(stream, add, tmp_path):
    (tmp_path / "prefix").write_text("one: ")

    def read_prefix(ds):
        return prefixed((tmp_path / "prefix").read_text())(ds)

    add([read_prefix, *ENDED])
    cfg = described(tmp_path, stream=stream)
    state = opened(cfg).state()
    assert texts(cfg)[0] == "one: question 0"
    (tmp_path / "prefix").write_text("two: ")
    assert texts(cfg)[0] == "two: question 0"
    with pytest.raises(ValueError, match="first examples of mine are not|have changed since"):
        opened(cfg).restore(state)


def test_other_code_with_the_same_examples_continues_a_stream(add, tmp_path, caplog):
    add([prefixed("one: "), *ENDED])
    cfg = described(tmp_path, stream=True)
    state = opened(cfg).state()
    add([lambda ds: prefixed("one: ")(ds), *ENDED])
    opened(cfg).restore(state)
    assert "The code or the options that read mine have changed" in caplog.text


def test_examples_that_differ_at_each_reading_are_cached_once(add, tmp_path, caplog):
    drawn = iter(range(100))

    def draw(ds):
        return prefixed(f"{next(drawn)}: ")(ds)

    add([draw, *ENDED])
    cfg = described(tmp_path)
    first = texts(cfg)
    assert texts(cfg) == first
    assert "differ each time they are read" in caplog.text
    cfg = described(tmp_path, stream=True)
    state = opened(cfg).state()
    opened(cfg).restore(state)


def test_a_file_of_the_same_size_and_time_is_read_again(add, tmp_path):
    add()
    cfg, path = described(tmp_path), tmp_path / "data.tsv"
    first, stat = texts(cfg), path.stat()
    path.write_text(path.read_text().replace("question 8", "question 9"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert texts(cfg) == [*first[:8], "question 9"]


def test_a_pattern_without_files_is_named(add, tmp_path):
    add(source=seqio.TextLineDataSource({"train": str(tmp_path / "nothing*.tsv")}))
    with pytest.raises(ValueError, match="mine: the source of its split train matches no file"):
        opened(described(tmp_path))


def pieces(folder, name, text) -> seqio.SentencePieceVocabulary:
    """Vocabulary trained on a text.

    Args:
      folder: of its model.
      name: of its model.
      text: to train on.
    """
    path = folder / name
    path.write_bytes(sentencepiece_training.train_sentencepiece([text] * 30, 290))
    return seqio.SentencePieceVocabulary(str(path))


@pytest.mark.parametrize("mixed_by", ["seqio", "config"])
def test_tasks_of_a_mixture_share_one_vocabulary(mixed_by, add, tmp_path):
    add(name="mine", vocabulary=pieces(tmp_path, "a", "question answer 0123456789"))
    add(name="other", vocabulary=pieces(tmp_path, "b", "9876543210 rewsna noitseuq"))
    task = config.Mixture(("mine", "other"), (1.0, 1.0))
    if mixed_by == "seqio":
        seqio.MixtureRegistry.add("mixed", ["mine", "other"], default_rate=1.0)
        task = "mixed"
    try:
        with pytest.raises(ValueError, match="must share one vocabulary: other have another"):
            opened(described(tmp_path, task))
        with pytest.raises(ValueError, match="must share one vocabulary"):
            data.open_vocabularies(described(tmp_path, task))
    finally:
        if mixed_by == "seqio":
            seqio.MixtureRegistry.remove("mixed")


def test_tasks_that_end_otherwise_are_mixed_with_a_warning(add, tmp_path, caplog):
    add(name="mine")
    add([seqio.preprocessors.tokenize], name="other", add_eos=False)
    opened(described(tmp_path, config.Mixture(("mine", "other"), (1.0, 1.0))))
    assert caplog.text.count("add_eos of other is not that of mine") == 1


def shifted(amount):
    """Ids that stand apart by amount, as a foreign tokenizer's."""

    def shift(ds):
        return ds.map(lambda x: x | {"targets": x["targets"] + amount})

    return shift


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("amount, token", [(31_000, 31_100), (-200, -100), (2**20, 2**20 + 100)])
def test_ids_outside_the_vocabulary_are_refused(amount, token, stream, add, tmp_path):
    add([*ENDED, shifted(amount)])
    message = rf"mine \(train\), targets: example 0 has id {token}, .* ids 0 to 263"
    with pytest.raises(ValueError, match=message):
        opened(described(tmp_path, stream=stream))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_text_that_is_not_tokenized_is_named(split, add, tmp_path):
    path = str(tmp_path / "data.tsv")
    add([], source=seqio.TextLineDataSource({"train": path, "validation": path}))
    message = rf"mine \({split}\), inputs: example 0 holds text, not ids: add .*tokenize"
    with pytest.raises(ValueError, match=message):
        data.open_batches(described(tmp_path), "encoder_decoder", 2, 0, split=split)


@pytest.mark.parametrize("stream", [False, True])
def test_examples_without_the_end_that_the_feature_names_are_told(stream, add, tmp_path, caplog):
    add([seqio.preprocessors.tokenize])
    opened(described(tmp_path, stream=stream))
    assert "9 of 9 targets do not finish with the end of the sequence (id 1)" in caplog.text
    assert "9 of 9 inputs do not finish" in caplog.text
    caplog.clear()
    add()
    opened(described(tmp_path, stream=stream))
    assert "do not finish" not in caplog.text


def test_inputs_with_an_end_that_inference_does_not_add_are_told(add, tmp_path, caplog):
    def append(ds):
        return ds.map(lambda x: {name: tf.concat([ids, [1]], 0) for name, ids in x.items()})

    def only_ids(ds):
        return ds.map(lambda x: {name: x[name] for name in ("inputs", "targets")})

    add([seqio.preprocessors.tokenize, only_ids, append], add_eos=False)
    opened(described(tmp_path))
    assert "all inputs finish with the end of the sequence" in caplog.text
    assert "Give the feature add_eos=True" in caplog.text


def test_the_end_is_counted_in_empty_and_full_examples():
    from t5x_lite.data.cache import Feature

    feature = Feature(np.array([5, 1, 1, 7]), np.array([0, 0, 2, 3, 4]), 1, ends=False)
    assert feature.count_ended() == 2
