# SPDX-License-Identifier: Apache-2.0
"""Laws of windows that run through examples: what stood between two examples stays, or none is
joined."""

import numpy as np
import pytest

from t5x_lite import config, data
from t5x_lite.config import gin_file, windows
from t5x_lite.data import cache, objective_ids, objectives, rows
from t5x_lite.tokenizers import vocabularies

VOCABULARY = vocabularies.ByteVocabulary(extra_ids=30)
OBJECTIVES = {"spans": config.SpanCorruption, "middle": config.FillInTheMiddle}


def preprocessor(join, vocabulary=VOCABULARY, kind="spans"):
    fit = windows.LengthLimits(24, 24, "encoder_decoder")
    return objectives.make_preprocessor(OBJECTIVES[kind](join=join), fit, vocabulary)


def feature(texts, vocabulary=VOCABULARY, ends=True):
    ids = [[*vocabulary.encode(text), *([vocabulary.eos] if ends else [])] for text in texts]
    offsets = np.cumsum([0, *map(len, ids)])
    return cache.Feature(np.concatenate([*map(np.array, ids)]), offsets, vocabulary.eos, ends)


def whole(stream):
    """The text of a stream from its begin on, once round."""
    (tokens,) = stream.windows(np.zeros(1, int), stream.size)
    return VOCABULARY.decode(tokens)


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize(
    "texts",
    [["one", "two"], ["one\n", "two\n", "3"], ["", "a", "", "b"], ["\n", "a"], ["x" * 50, "y"]],
)
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_newline_stands_between_examples_unless_one_is_there(texts, ends, kind):
    if not ends:
        texts = [text for text in texts if text]
    stream = rows.Stream(feature(texts, ends=ends), preprocessor("newline", kind=kind))
    lines = [text if text.endswith("\n") else text + "\n" for text in texts if text]
    assert whole(stream) == "".join(lines)
    bare = rows.Stream(feature(texts, ends=ends), preprocessor("nothing", kind=kind))
    assert whole(bare) == "".join(texts)


def test_a_window_from_any_place_is_part_of_the_circle():
    stream = rows.Stream(feature(["one", "two\n", "", "three"]), preprocessor("newline"))
    (circle,) = stream.windows(np.zeros(1, int), 2 * stream.size)
    for begin in range(stream.size):
        (window,) = stream.windows(np.array([begin]), stream.size)
        np.testing.assert_array_equal(window, circle[begin : begin + stream.size])


def test_objectives_that_keep_ends_see_them_and_nothing_else():
    fit = windows.LengthLimits(24, 24, "encoder_decoder")
    prefix = objectives.make_preprocessor(config.PrefixLM(), fit, VOCABULARY)
    tokens = feature(["one", "two"])
    stream = rows.Stream(tokens, prefix)
    np.testing.assert_array_equal(stream.windows(np.zeros(1, int), 8)[0], tokens.tokens)


@pytest.mark.parametrize("length", [1, 2, 3, 19, 20, 21, 40, 41, 42])
def test_separate_windows_hold_one_example_each_and_all_of_it(length):
    plan = rows.plan_separate(np.array([0, length, length + 5]), 20)
    covered = [np.arange(b, b + n) for b, n in zip(plan.begins, plan.lengths, strict=True)]
    first = [each for each in covered if each[0] < length]
    assert all(each[-1] < length for each in first)
    kept = np.concatenate([np.zeros(0, int), *first])
    rest = length % 20 == 1
    np.testing.assert_array_equal(kept, np.arange(length - rest))
    assert len(covered) == len(first) + 1 and plan.lengths.min() >= 2


@pytest.mark.parametrize("seed", [0, 1])
def test_examples_that_are_never_joined_are_all_read_alone(seed, tmp_path):
    lines = [f"sentence {k} ends here." for k in range(30)] + ["x"]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n")

    def texts(join):
        cfg = config.Files("toy", str(tmp_path / "a.txt"), config.Vocabulary("bytes", extra_ids=30))
        opened = config.Data(
            cfg,
            {"inputs": 48, "targets": 32},
            objective=config.SpanCorruption(join=join),
            cache_dir=str(tmp_path / "cache"),
        )
        batches = data.open_batches(opened, "encoder_decoder", 10, seed)
        return [
            VOCABULARY.decode(ids[ids > 2])
            for step in range(batches.statistics.rows // 10)
            for ids in batches.at(step).inputs
        ]

    apart, joined, bare = texts("never"), texts("newline"), texts("nothing")
    assert len(apart) == 30 and not any("\n" in text or ".s" in text for text in apart)
    assert all(text.count(" ") <= 3 for text in apart)  # of one sentence at most
    assert sum("\n" in text for text in joined) > len(joined) / 2
    assert any(".s" in text for text in bare) and not any(".s" in text for text in joined)


def test_the_seam_is_the_newline_of_the_vocabulary_or_nothing():
    assert preprocessor("newline").seam.tolist() == [ord("\n") + 3]
    for without in (
        vocabularies.SymbolVocabulary(list("ab"), extra_ids=30),
        vocabularies.SymbolVocabulary(["AA", "B"], separator=" ", extra_ids=30),
    ):
        assert preprocessor("newline", without).seam.tolist() == []
    assert objective_ids.newline_ids(vocabularies.IntegerVocabulary(50)) == []


def test_a_saved_run_goes_on_as_it_was_trained():
    objective = "data/objective/config.SpanCorruption"
    run = gin_file.load_run(
        ["configs/runs/g2p.gin"],
        [
            "config.Data.objective=@config.SpanCorruption()",
            "config.Data.vocabulary=@config.Vocabulary()",
            'config.Vocabulary.kind="bytes"',
            "config.Vocabulary.extra_ids=100",
            "config.Model.vocab=384",
        ],
    )
    text = gin_file.to_text(run)
    assert f"{objective}.join = 'newline'" in text
    assert gin_file.from_text(text) == run
    before = text.replace(f"{objective}.join = 'newline'\n", "")
    assert gin_file.from_text(before).data.objective.join == "nothing"
    assert gin_file.from_text(gin_file.to_text(gin_file.from_text(before))) == gin_file.from_text(
        before
    )
