# SPDX-License-Identifier: Apache-2.0
"""Laws of written tokenizers: transformers reads from them the ids that we have."""

import json
import shutil

import pytest
from test_tokenizers import (
    NAMED,
    NASTY,
    SENTENCES,
    byte_level,
    folders,
    llama_pieces,
    rebuilt_differently,
    t5_pieces,
    theirs,
)

from t5x_lite.tokenizers import huggingface_tokenizer as conversion
from t5x_lite.tokenizers import sentencepiece_training, vocabularies

__all__ = ["folders"]  # a fixture
PHONEMES = ["a", "b", "c", " ", "\n", "AA0", "B", "é", "한"]


def made_here(extra_ids=0):
    """A vocabulary of every kind that a run can have."""
    trained = sentencepiece_training.train_sentencepiece(SENTENCES, 400)
    chat = byte_level(["<|endoftext|>", "<s>"], post="<s> $A").to_str().encode()
    return {
        "bytes": vocabularies.ByteVocabulary(extra_ids),
        "bytes_open": vocabularies.ByteVocabulary(extra_ids, ends=False),
        "trained": vocabularies.SentencePieceVocabulary(trained, extra_ids),
        "t5": vocabularies.SentencePieceVocabulary(t5_pieces(), extra_ids),
        "t5_open": vocabularies.SentencePieceVocabulary(t5_pieces(), extra_ids, ends=False),
        "llama": vocabularies.SentencePieceVocabulary(llama_pieces(), extra_ids),
        "json": vocabularies.TokenizerJsonVocabulary(chat, extra_ids),
        "json_open": vocabularies.TokenizerJsonVocabulary(chat, extra_ids, ends=False),
        "symbols": vocabularies.SymbolVocabulary(PHONEMES, extra_ids=extra_ids),
        "spaced": vocabularies.SymbolVocabulary(PHONEMES[4:], separator=" ", extra_ids=extra_ids),
    }


KINDS = list(made_here())
# Characters and marks that transformers normalizes differently from SentencePiece.
COMBINED = "e\u0301"


@pytest.fixture(scope="module", params=[0, 3])
def every(request):
    return made_here(request.param)


def plain(kind, text):
    return not (kind.startswith("t5") and COMBINED in text)


def whole(vocabulary, text, start=None):
    return [*([] if start is None else [start]), *vocabularies.encode_with_ends(vocabulary, text)]


@pytest.mark.parametrize("model_type", ["t5", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_our_ids(every, kind, model_type, tmp_path):
    vocabulary = every[kind]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    conversion.write_tokenizer(vocabulary, tmp_path)
    reference = theirs(tmp_path)
    for text in [*NASTY, "AA0 B é", "abc"]:
        if plain(kind, text):
            assert reference.encode(text) == whole(vocabulary, text), repr(text)
    assert reference.eos_token_id == vocabulary.eos
    assert len(reference) == vocabulary.size


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_our_text(every, kind, tmp_path):
    vocabulary = every[kind]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    conversion.write_tokenizer(vocabulary, tmp_path)
    reference = theirs(tmp_path)
    for text in ["The quick brown fox", "AA0 B é", "cab", *NASTY[8:12]]:
        # The unknown is a mark of each library's own.
        unknown = 2 if kind in ("t5", "t5_open", "symbols", "spaced") else None
        ids = [token for token in vocabulary.encode(text) if token != unknown]
        if plain(kind, text):
            decoded = reference.decode([*ids, vocabulary.eos], skip_special_tokens=True)
            assert decoded.strip() == vocabulary.decode(ids).strip(), repr(text)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_back_with_the_same_ids(every, kind, tmp_path):
    vocabulary = every[kind]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    conversion.write_tokenizer(vocabulary, tmp_path)
    again, ends = conversion.read_tokenizer(tmp_path)
    assert (again.size, again.sentinels or vocabulary.sentinels) == (
        vocabulary.size,
        vocabulary.sentinels,
    )
    assert (again.eos, ends.stops, again.ends) == (
        vocabulary.eos,
        (vocabulary.eos,),
        vocabulary.ends,
    )
    for text in [*NASTY, "AA0 B é"]:
        if plain(kind, text):
            assert again.encode(text) == vocabulary.encode(text), repr(text)
    for k in range(vocabulary.sentinels):
        token = vocabulary.size - 1 - k
        assert again.decode([token]).strip() == f"<extra_id_{k}>"
        assert again.encode(f"<extra_id_{k}>") == [token]


@pytest.mark.parametrize("kind", ["bytes", "bytes_open", "trained", "json", "symbols"])
def test_a_decoders_start_stands_before_its_prompts(every, kind, tmp_path):
    vocabulary = every[kind]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    conversion.write_tokenizer(vocabulary, tmp_path, conversion.StartToken(0, written=True))
    assert theirs(tmp_path).encode("abc") == whole(vocabulary, "abc", start=0)
    again, ends = conversion.read_tokenizer(tmp_path)
    assert (ends.start, ends.add_bos) == (0, True)


@pytest.mark.parametrize("kind", ["bytes", "trained", "json", "symbols"])
def test_a_start_that_is_not_written_before_prompts_is_named(every, kind, tmp_path):
    vocabulary = every[kind]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    conversion.write_tokenizer(vocabulary, tmp_path, conversion.StartToken(1))
    assert theirs(tmp_path).encode("abc") == whole(vocabulary, "abc")
    assert theirs(tmp_path).bos_token_id == 1
    assert conversion.read_tokenizer(tmp_path)[1].start == 1


@pytest.mark.parametrize("kind", ["bytes", "trained", "t5", "t5_open", "llama", "symbols"])
def test_padding_that_decoders_begin_with_is_not_named_twice(every, kind, tmp_path):
    vocabulary = every[kind]
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "t5", "decoder_start_token_id": vocabulary.pad})
    )
    conversion.write_tokenizer(vocabulary, tmp_path, conversion.StartToken(vocabulary.pad))
    reference = theirs(tmp_path)
    assert reference.bos_token is None and reference.unk_token == "<unk>"
    assert reference.convert_tokens_to_ids("<unk>") == reference.unk_token_id is not None
    assert conversion.read_tokenizer(tmp_path)[1].start == vocabulary.pad


def test_letters_in_and_phonemes_out_are_one_tokenizer(tmp_path):
    letters = vocabularies.SymbolVocabulary(PHONEMES)
    phonemes = vocabularies.SymbolVocabulary(PHONEMES, separator=" ")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    conversion.write_tokenizers(letters, phonemes, tmp_path)
    reference = theirs(tmp_path)
    assert reference.encode("cab") == vocabularies.encode_with_ends(letters, "cab")
    assert reference.decode(phonemes.encode("AA0 B AA0")) == "AA0 B AA0"
    assert theirs(tmp_path / "targets").encode("AA0 B") == [*phonemes.encode("AA0 B"), 1]


def test_a_pair_of_one_kind_is_one_tokenizer(tmp_path):
    conversion.write_tokenizers(
        vocabularies.ByteVocabulary(), vocabularies.ByteVocabulary(), tmp_path
    )
    assert not (tmp_path / "targets").exists()


THEIRS = ["t5", "t5_few", "byt5", "llama", "gpt2", "chat", "begun", "t5gemma"]


@pytest.mark.parametrize("kind", THEIRS)
def test_a_tokenizer_of_theirs_read_and_written_gives_the_same_ids(folders, kind, tmp_path):
    ours, ends = conversion.read_tokenizer(folders[kind])
    shutil.copy(folders[kind] / "config.json", tmp_path)
    written = ends.add_bos and ours.bos is None and "t5" not in kind
    conversion.write_tokenizers(
        *conversion.vocabulary_pair(ours), tmp_path, conversion.StartToken(ends.start, written)
    )
    there, back = theirs(folders[kind]), theirs(tmp_path)
    for text in NASTY + NAMED:
        if not rebuilt_differently(kind, text):
            assert back.encode(text) == there.encode(text), repr(text)
    assert back.eos_token_id == ours.eos
    again, same = conversion.read_tokenizer(tmp_path)
    assert (same.start, same.add_bos) == (ends.start, ends.add_bos)
    for text in NASTY + NAMED:
        if not rebuilt_differently(kind, text):
            assert again.encode(text) == ours.encode(text), repr(text)


ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def saved_by_transformers(kind, folders, folder):
    """The folder of a kind among folders, as transformers saves it in another folder, with a
    tokenizer.json."""
    tokenizer = theirs(folders[kind])
    tokenizer.save_pretrained(folder)
    shutil.copy(folders[kind] / "config.json", folder)
    return tokenizer


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("kind", ["t5", "llama", "gpt2", "chat", "begun", "t5gemma"])
def test_a_tokenizer_keeps_its_class_and_special_tokens(kind, extended, folders, tmp_path):
    before = saved_by_transformers(kind, folders, tmp_path / "there")
    ours, ends = conversion.read_tokenizer(tmp_path / "there")
    pair = conversion.vocabulary_pair(ours)
    if extended:
        pair = tuple(vocabularies.ExtendedVocabulary(each, ["[NLU]"]) for each in pair)
    vocabularies.save_pair(tmp_path / "run", *pair)
    shutil.copytree(tmp_path / "there", tmp_path / "back", ignore=lambda *_: ["tokenizer.json"])
    conversion.write_tokenizers(
        *vocabularies.load_pair(tmp_path / "run"),
        tmp_path / "back",
        conversion.StartToken(ends.start, ends.add_bos and ours.bos is None and "t5" not in kind),
    )
    after = theirs(tmp_path / "back")
    assert type(after) is type(before)
    for role in ROLES:
        assert getattr(after, role) == getattr(before, role), role
    assert sorted(after.all_special_tokens) == sorted(before.all_special_tokens)
    for text in [*NASTY, *NAMED]:
        assert after.encode(text) == before.encode(text), repr(text)
    if extended:
        assert after.convert_tokens_to_ids("[NLU]") == len(before)
    fingerprints = [vocabularies.fingerprint(each) for each in (pair[0],)]
    assert "tokenizer_class" in json.dumps(pair[0].description())
    assert fingerprints[0] == vocabularies.fingerprint(vocabularies.load_pair(tmp_path / "run")[0])


def test_ends_that_the_tokenizer_has_no_token_for_are_refused(tmp_path):
    vocabulary = vocabularies.TokenizerJsonVocabulary(byte_level(["</s>"]).to_str().encode())
    with pytest.raises(ValueError, match="begin or end with id 9999"):
        conversion.write_tokenizer(vocabulary, tmp_path, conversion.StartToken(9999, written=True))


@pytest.mark.parametrize(
    "vocabulary, message",
    [
        (vocabularies.IntegerVocabulary(50), "kind numbers has no tokenizer"),
        (vocabularies.SymbolVocabulary(["A"], separator="-"), "joined by '-'"),
        (vocabularies.SymbolVocabulary(["</s>", "A"], separator=" "), "named </s> are special"),
    ],
)
def test_what_no_tokenizer_can_be_is_refused_and_nothing_is_written(vocabulary, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        conversion.write_tokenizer(vocabulary, tmp_path / "out")
    assert not (tmp_path / "out").exists()
