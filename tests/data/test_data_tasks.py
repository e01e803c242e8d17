# SPDX-License-Identifier: Apache-2.0
"""Laws of the built-in tasks and of names."""

import ast
import itertools
import subprocess
import sys

import pytest

from t5x_lite import config, data
from t5x_lite.data import built_in, corpora

LENGTHS = {"inputs": 64, "targets": 64}


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def test_each_word_is_in_one_split_and_always_the_same():
    words = {split: {row.inputs for row in corpora.cmudict_rows(split, False)} for split in SPLITS}
    total = sum(map(len, words.values()))
    assert total == len(set().union(*words.values())) == len(corpora.pronunciations(False))
    assert len(words["test"]) / total == pytest.approx(0.10, abs=0.005)
    assert len(words["validation"]) / total == pytest.approx(0.05, abs=0.005)
    # Frozen: results on these words are published.
    assert corpora.split_of("tomato") == "train"
    assert [corpora.split_of(word) for word in ("abalones", "abandoned")] == ["test", "train"]


SPLITS = ("train", "validation", "test")


def test_a_word_is_trained_on_with_each_pronunciation_and_judged_by_all_of_them():
    train = [row.targets for row in corpora.cmudict_rows("train", False) if row.inputs == "tomato"]
    assert train == ["T AH M EY T OW", "T AH M AA T OW"]
    judged = [row for row in corpora.cmudict_rows("test", False) if len(row.references) > 1]
    assert judged and all(row.targets == row.references[0] for row in judged)
    assert all(len(set(row.references)) == len(row.references) for row in judged)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cmudict_g2p", "cmudict_g2p_stress"])
def test_every_letter_and_phoneme_has_an_id(name):
    task = built_in.built_in_task(name, None, "")
    inputs, targets = task.vocabularies
    assert inputs.size == targets.size
    for split in SPLITS:
        for chunk in task.read(split):
            assert all(2 not in ids for ids in chunk.inputs)
            assert all(2 not in ids for ids in chunk.targets)
            for i in (0, len(chunk.targets) - 1):
                assert inputs.decode(chunk.inputs[i]) == chunk.rows[i].inputs
                assert targets.decode(chunk.targets[i]) == chunk.rows[i].targets


def test_successors_are_those_of_the_alphabet_and_test_words_are_longer():
    rows = {split: list(corpora.successor_rows(split)) for split in SPLITS}
    for row in (*rows["train"][:500], *rows["test"]):
        # One letter further; z begins anew.
        pairs = zip(row.inputs, row.targets.split(" "), strict=True)
        assert all((ord(a) - 96) % 26 == ord(b) - 97 for a, b in pairs)
    assert {len(row.inputs) for row in rows["train"]} == set(range(2, 11))
    lengths = [len(row.inputs) for row in rows["test"]]
    assert all(lengths.count(length) == 50 for length in range(2, 31))
    assert rows["test"] == list(corpora.successor_rows("test"))
    inputs, targets = built_in.BUILT_IN["letter_successors"].vocabularies()
    for row in rows["test"][:60]:
        assert inputs.decode(inputs.encode(row.inputs)) == row.inputs
        assert targets.decode(targets.encode(row.targets)) == row.targets


def test_stress_is_kept_only_where_it_is_asked_for():
    plain = next(corpora.cmudict_rows("test", False)).targets
    stressed = next(corpora.cmudict_rows("test", True)).targets
    assert plain == stressed.translate(str.maketrans("", "", "012")) != stressed


def test_library_files_are_in_one_split_each_and_hold_no_tests():
    result = [name for split in SPLITS for name, _ in corpora.stdlib_files(split)]
    assert len(result) == len(set(result)) > 400
    assert not any("test" in name.split("/") or "site-packages" in name for name in result)


def test_docstrings_are_taken_out_of_their_functions():
    for row in itertools.islice(corpora.docstring_rows("validation"), 100):
        (function,) = ast.parse(row.inputs).body
        assert ast.get_docstring(function) is None
        assert row.targets.strip() == row.targets != ""
    text = 'def f(x):\n    """Adds."""\n    return x\n\ndef g(): "No body."\n'
    assert list(corpora.documented_functions(text)) == [
        corpora.TextExample("def f(x):\n    return x", "Adds.", ("Adds.",))
    ]


def test_functions_are_docstrings_the_other_way_with_their_first_paragraph():

    def first(rows):
        return list(itertools.islice(rows("validation"), 100))

    pairs = zip(first(corpora.function_rows), first(corpora.docstring_rows), strict=True)
    for function, docstring in pairs:
        assert function.targets == docstring.inputs and function.references == (docstring.inputs,)
        assert docstring.targets.startswith(function.inputs) and "\n\n" not in function.inputs


def test_a_built_in_task_takes_another_vocabulary(cache_dir):
    cfg = config.Data("cmudict_g2p", LENGTHS, vocabulary=config.Vocabulary("bytes"))
    inputs, targets = data.open_vocabularies(cfg)
    assert inputs.size == targets.size == 259


def test_inputs_to_be_continued_have_no_end_and_others_have(cache_dir):

    def ends(objective):
        return [
            each.ends
            for each in data.open_vocabularies(config.Data("python_stdlib", LENGTHS, objective))
        ]

    assert ends(None) == ends(config.SpanCorruption()) == [True, True]
    assert ends(config.PrefixLM()) == ends(config.CausalLM()) == [False, True]


def test_a_dataset_gives_text_references_and_metrics(cache_dir):
    cfg = config.Data("cmudict_g2p", LENGTHS, cache_dir=cache_dir)
    dataset = data.open_dataset(cfg, "validation")
    rows = list(corpora.cmudict_rows("validation", False))
    assert len(dataset) == len(rows)
    assert dataset[7] == rows[7]
    assert dataset.references(7) == list(rows[7].references)
    assert dataset.metrics == ("per", "wer") and dataset.has_inputs
    assert dataset.score(["A"]) == ({}, {})


def test_names_of_ours_need_no_tensorflow_and_the_room_no_jax(tmp_path):
    code = f"""
import sys
from t5x_lite import config, data
cfg = config.Data("cmudict_g2p", {LENGTHS}, cache_dir={str(tmp_path)!r})
data.open_batches(cfg, "encoder_decoder", 8, 0, "validation").at(0)
loaded = {{"tensorflow", "seqio", "jax", "gin"}} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)
