# SPDX-License-Identifier: Apache-2.0
"""Laws of labels as ids: there and back, numbers to the last bits, tags by the tokens of a text."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_lite.tokenizers import labels, vocabularies
from t5x_lite.tokenizers.labels import LabelError, LabelVocabulary, TextSpan
from t5x_lite.tokenizers.offsets import token_offsets

TAGS = ("O", "B-color", "I-color", "B-animal", "I-animal")


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
@settings(max_examples=300, deadline=None)
def test_a_number_comes_back_to_one_unit_in_the_last_place(value):
    token = labels.encode_number(value)
    assert 0 <= token < labels.NUMBERS
    back = np.float32(labels.decode_number(token))
    assert abs(float(back) - value) <= float(np.spacing(np.abs(np.float32(value))))


REFUSED = {
    ("number", "ten"): "'ten' is no number",
    ("number", ""): "'' is no number",
    ("number", "nan"): "nan is not a finite number of float32",
    ("number", "1e39"): "1e\\+39 is not a finite number of float32",
    ("labels", "a, b"): "'a, b' is no JSON list",
    ("labels", "[" * 100_000): "is no JSON list",
    ("labels", '{"a": 1}'): "is no JSON list of labels",
    ("labels", "[1]"): "'\\[1\\]' is no JSON list of labels",
    ("classes", "yse"): "'yse' is none of Model.readout's labels: .*yes",
    ("tags", '"color"'): "is no JSON list of spans",
    ("tags", "[[0, 3]]"): "\\[0, 3\\] is no span \\[begin, end, name\\]",
    ("tags", '[[0, true, "color"]]'): "is no span",
    ("tags", '[[0, 8, "color"]]'): "the span 0 to 8 is not in the 7 characters of text",
    ("tags", '[[3, 3, "color"]]'): "the span 3 to 3 is not in",
    ("tags", '[[0, 4, "color"], [3, 7, "animal"]]'): "the spans 0 to 4 and 3 to 7 overlap",
    ("tags", '[[0, 3, "colour"]]'): "'colour' is none of Model.readout's labels: .*color",
}


@pytest.mark.parametrize("kind, text", REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_target_of_a_readout_is_refused_with_the_reason(kind, text):
    names = {"tags": TAGS, "classes": ("no", "yes"), "labels": ("a", "b")}.get(kind, ())
    vocabulary = LabelVocabulary(kind, names)
    with pytest.raises(LabelError, match=REFUSED[kind, text]):
        if kind == "tags":
            vocabulary.encode_tags("red cat", text, vocabularies.ByteVocabulary())
        else:
            vocabulary.encode(text)


def test_labels_are_flags_in_their_order_and_come_back():
    vocabulary = LabelVocabulary("labels", ("a", "b, c", "ä"))
    assert vocabulary.encode('["ä", "a"]') == [1, 0, 1]
    assert json.loads(vocabulary.decode([1, 0, 1])) == ["a", "ä"]
    assert vocabulary.encode("[]") == [0, 0, 0]
    with pytest.raises(LabelError, match="'b' is none of Model.readout's labels"):
        vocabulary.encode('["b"]')


def test_a_vocabulary_of_labels_comes_back_from_its_folder(tmp_path):
    pair = vocabularies.ByteVocabulary(), LabelVocabulary("classes", ("no", "yes"))
    vocabularies.save_pair(tmp_path, *pair)
    _, saved = vocabularies.load_pair(tmp_path)
    assert isinstance(saved, LabelVocabulary)
    assert (saved.outputs, saved.names) == ("classes", ("no", "yes"))
    assert vocabularies.fingerprint(saved) == vocabularies.fingerprint(pair[1])


TEXTS = ["red cat", "a dög  is red", "red", " red  cat ", "日本 red 🙂cat"]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_have_the_offsets_of_their_characters(text):
    vocabulary = vocabularies.ByteVocabulary()
    offsets = token_offsets(vocabulary, text)
    assert len(offsets) == len(vocabularies.encode_with_ends(vocabulary, text))
    places = [place for place, each in enumerate(text) for _ in each.encode()]
    assert offsets == [*((place, place + 1) for place in places), (len(text), len(text))]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_cover_every_character_that_is_no_space_in_order(text, pieces):
    offsets = token_offsets(pieces, text)
    assert len(offsets) == len(vocabularies.encode_with_ends(pieces, text))
    assert all(before[1] <= after[1] for before, after in zip(offsets, offsets[1:], strict=False))
    covered = {place for begin, end in offsets for place in range(begin, end)}
    assert covered >= {place for place, each in enumerate(text) if not each.isspace()}


@pytest.mark.parametrize("text", TEXTS)
def test_spans_come_back_from_their_tags(text, pieces):
    begin = text.index("red")
    spans = [TextSpan(begin, begin + 3, "color")]
    if "cat" in text:
        spans.append(TextSpan(text.index("cat"), text.index("cat") + 3, "animal"))
    for inputs in (vocabularies.ByteVocabulary(), pieces):
        tags = LabelVocabulary("tags", TAGS).encode_tags(text, labels.write_spans(spans), inputs)
        named = [TAGS[tag] for tag in tags]
        back = labels.spans_of_tags(named, token_offsets(inputs, text), text)
        assert [span for span, _ in back] == spans


@pytest.mark.parametrize(
    "spans, words",
    [
        ([[0, 9, "color"]], "is not in the 7 characters"),
        ([[0, 3, "color"], [2, 5, "animal"]], "overlap"),
        ([[0, 3, "shape"]], "'shape' is none of Model.readout's labels"),
        ([[0, 3]], "is no span"),
        ([["0", 3, "color"]], "is no span"),
    ],
)
def test_spans_that_cannot_be_are_refused(spans, words):
    with pytest.raises(LabelError, match=words):
        LabelVocabulary("tags", TAGS).encode_tags(
            "red cat", json.dumps(spans), vocabularies.ByteVocabulary()
        )


@pytest.fixture(scope="module")
def pieces() -> vocabularies.SentencePieceVocabulary:
    """Subwords of a few words, with bytes for all others."""
    from t5x_lite.tokenizers import sentencepiece_training

    lines = ["red cat", "a dog is red", "the cat is a dog", "red red cat dog"] * 20
    return vocabularies.SentencePieceVocabulary(
        sentencepiece_training.train_sentencepiece(iter(lines), 290)
    )
