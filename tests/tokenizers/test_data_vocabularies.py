# SPDX-License-Identifier: Apache-2.0
"""Laws of vocabularies: text comes back, ids stay in range, what is saved is what was."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_lite import config
from t5x_lite.data import built_in
from t5x_lite.data.corpora import TextExample
from t5x_lite.tokenizers import sentencepiece_training, vocabularies

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return  x + 1\n",
    "naïve café, 東京 und Zürich",
    "",
] * 30


def tokenizer_json() -> bytes:
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def every():
    return {
        "bytes": vocabularies.ByteVocabulary(extra_ids=10),
        "sentencepiece": vocabularies.SentencePieceVocabulary(
            sentencepiece_training.train_sentencepiece(SENTENCES, 400), extra_ids=10
        ),
        "tokenizer_json": vocabularies.TokenizerJsonVocabulary(tokenizer_json(), extra_ids=10),
        "symbols": vocabularies.SymbolVocabulary(list("abc "), extra_ids=10),
        "spaced": vocabularies.SymbolVocabulary(["AA", "B", "CH"], separator=" ", extra_ids=10),
        "numbers": vocabularies.IntegerVocabulary(50),
    }


KINDS = ["bytes", "sentencepiece", "tokenizer_json", "symbols", "spaced", "numbers"]
TEXTS = {"symbols": ["abca cab", ""], "spaced": ["AA CH B", ""], "numbers": ["3 44 2", ""]}


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back_to_the_letter(every, kind):
    for text in TEXTS.get(kind, SENTENCES[:4]):
        assert every[kind].decode(every[kind].encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_all_at_once_equals_one_by_one(every, kind):
    texts = TEXTS.get(kind, SENTENCES[:4])
    together = every[kind].encode_all(texts)
    assert [ids.tolist() for ids in together] == [every[kind].encode(text) for text in texts]
    assert every[kind].encode_all([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_stops_at_the_end_and_leaves_padding_out(every, kind):
    vocabulary, text = every[kind], TEXTS.get(kind, SENTENCES[:1])[0]
    ids = vocabulary.encode(text)
    assert vocabulary.decode([vocabulary.pad, *ids, vocabulary.eos, *ids]) == text
    assert vocabulary.decode(np.array([*ids, vocabulary.eos, 0], np.int32)) == text
    assert vocabularies.encode_with_ends(vocabulary, text) == [*ids, vocabulary.eos]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_gives_the_same_ids(every, kind, tmp_path):
    vocabulary, texts = every[kind], TEXTS.get(kind, SENTENCES[:4])
    vocabulary.ends = False
    vocabularies.save_pair(tmp_path, vocabulary, vocabulary)
    vocabulary.ends = True
    inputs, targets = vocabularies.load_pair(tmp_path)
    assert inputs.ends is False
    assert inputs.size == vocabulary.size and targets.sentinels == vocabulary.sentinels
    assert [inputs.encode(text) for text in texts] == [vocabulary.encode(text) for text in texts]
    assert vocabularies.fingerprint(inputs) != vocabularies.fingerprint(vocabulary)


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_sentinels_are_the_last_ids_and_go_by_name(every, kind):
    vocabulary = every[kind]
    assert vocabulary.sentinels == 10
    assert "<extra_id_0>" in vocabulary.decode([vocabulary.size - 1])
    assert "<extra_id_9>" in vocabulary.decode([vocabulary.size - 10])
    text = TEXTS.get(kind, SENTENCES[:1])[0]
    assert max(vocabulary.encode(text)) < vocabulary.size - 10


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_bytes_take_any_text(text):
    vocabulary = vocabularies.ByteVocabulary()
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert all(3 <= token < 259 for token in ids)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"), max_size=40))
def test_trained_pieces_give_back_text_they_never_saw(every, text):
    vocabulary = every["sentencepiece"]
    assert vocabulary.decode(vocabulary.encode(text)) == text


@pytest.mark.parametrize(
    "word", ["50", "2147483648", "9" * 5000, "-1", "+1", "1_0", "hello", "1.0", "\u0661", "0x1"]
)
def test_a_word_that_is_no_id_is_named(every, word):
    assert every["numbers"].encode("0 007\t49\n1") == [0, 7, 49, 1]
    with pytest.raises(ValueError, match="is no id of this vocabulary.* 0 to 49") as caught:
        every["numbers"].encode_all(["3", f"4 {word}"])
    assert repr(word[:40]) in str(caught.value)


def test_symbols_that_are_not_listed_are_unknown():
    assert vocabularies.SymbolVocabulary(list("ab")).encode("axb") == [3, 2, 4]


def test_sentinels_that_a_tokenizer_brings_are_found():
    described = json.loads(tokenizer_json())
    size = len(described["model"]["vocab"])
    for k in (2, 1, 0):
        described["added_tokens"].append(
            {
                "id": size + 2 - k,
                "content": f"<extra_id_{k}>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        )
    vocabulary = vocabularies.TokenizerJsonVocabulary(json.dumps(described).encode())
    assert (vocabulary.size, vocabulary.sentinels) == (size + 3, 3)


def test_a_vocabulary_trained_on_the_spot_has_the_size_asked_for_and_is_kept(tmp_path):
    calls = []

    def rows():
        calls.append(1)
        return (TextExample(None, text) for text in SENTENCES)

    cfg = config.Vocabulary("trained", size=320, extra_ids=7)
    text = built_in.TrainingText(rows, lambda: "source")
    first = built_in.build_vocabulary(cfg, text, str(tmp_path))
    second = built_in.build_vocabulary(cfg, text, str(tmp_path))
    assert first.size == 327 and first.sentinels == 7
    assert vocabularies.fingerprint(first) == vocabularies.fingerprint(second)
    assert len(calls) == 1


def rows():
    return (TextExample(None, text) for text in SENTENCES)


@pytest.mark.parametrize(
    "cfg, message",
    [
        (config.Vocabulary("sentencepiece", path="/no/such.model"), "no/such.model is not a file"),
        (config.Vocabulary("trained", size=100_000), "Vocabulary.size = 100000"),
        (config.Vocabulary("trained", size=50), "Vocabulary.size = 50"),
    ],
)
def test_a_vocabulary_that_cannot_be_made_names_the_binding(cfg, message, tmp_path):
    text = built_in.TrainingText(rows, lambda: "source")
    with pytest.raises(ValueError, match=message):
        built_in.build_vocabulary(cfg, text, str(tmp_path))


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizer_json"])
def test_a_file_of_another_kind_is_refused(kind, tmp_path):
    path = tmp_path / "model"
    path.write_text("no model at all")
    with pytest.raises(ValueError, match=f"is not a model of kind {kind}"):
        cfg = config.Vocabulary(kind, path=str(path))
        built_in.build_vocabulary(cfg, built_in.TrainingText(list, str), str(tmp_path))


def test_a_folder_without_vocabulary_is_named(tmp_path):
    with pytest.raises(ValueError, match="vocabulary.json is missing"):
        vocabularies.load_pair(tmp_path)


def test_an_end_that_is_reported_is_not_guessed_and_is_kept(tmp_path):
    explicit = vocabularies.TokenizerJsonVocabulary(tokenizer_json(), eos=300, pad=17)
    vocabularies.save_vocabulary(explicit, tmp_path)
    kept = vocabularies.load_vocabulary(tmp_path)
    assert (kept.eos, kept.pad) == (300, 17)
    inferred = vocabularies.TokenizerJsonVocabulary(tokenizer_json())
    assert (inferred.eos, inferred.pad) == (1, 0)
    assert vocabularies.fingerprint(inferred) != vocabularies.fingerprint(explicit)


def test_a_tokenizer_json_kept_before_ends_were_stored_still_loads(tmp_path):
    vocabularies.save_vocabulary(vocabularies.TokenizerJsonVocabulary(tokenizer_json()), tmp_path)
    old = {"kind": "tokenizer_json", "extra_ids": 0, "ends": True}
    (tmp_path / "vocabulary.json").write_text(json.dumps(old))
    assert vocabularies.load_vocabulary(tmp_path).eos == 1


def test_an_end_outside_of_the_tokenizer_is_refused():
    with pytest.raises(ValueError, match="eos = 4000 is none of"):
        vocabularies.TokenizerJsonVocabulary(tokenizer_json(), eos=4000)


def test_padding_without_a_token_of_its_own_takes_no_word_away():
    described = json.loads(tokenizer_json())
    described["added_tokens"] = [each for each in described["added_tokens"] if each["id"] != 0]
    described["model"]["vocab"]["!!"] = described["model"]["vocab"].pop("<pad>")
    vocabulary = vocabularies.TokenizerJsonVocabulary(json.dumps(described).encode())
    assert vocabulary.pad == vocabulary.eos
    assert vocabulary.decode([0]) == "!!"
