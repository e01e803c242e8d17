# SPDX-License-Identifier: Apache-2.0
"""Laws of grown vocabularies: old ids stay, new names are one id each, sentinels stand on top."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_lite import config, data
from t5x_lite.data import built_in
from t5x_lite.data.corpora import TextExample
from t5x_lite.tokenizers import (
    extended,
    huggingface_tokenizer,
    sentencepiece_training,
    vocabularies,
)

SENTENCES = ["The quick brown fox.", "def f(x):\n    return  x + 1\n", "naïve café, 東京"] * 30
MODES = ("[NLU]", "[NLG]", "[S2S]")
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"), max_size=20)


def tokenizer_json(*added: str) -> bytes:
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>", "<unk>", *added],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def inner():
    return {
        "bytes": vocabularies.ByteVocabulary(),
        "sentencepiece": vocabularies.SentencePieceVocabulary(
            sentencepiece_training.train_sentencepiece(SENTENCES, 320)
        ),
        "tokenizer_json": vocabularies.TokenizerJsonVocabulary(tokenizer_json()),
        "symbols": vocabularies.SymbolVocabulary(list("abc []NLUGS2")),
    }


KINDS = ["bytes", "sentencepiece", "tokenizer_json", "symbols"]


@pytest.mark.parametrize("kind", KINDS)
def test_old_ids_stay_and_new_ones_are_names_then_sentinels(inner, kind):
    old, text = inner[kind], "abc a"
    new = extended.extend_vocabulary(old, MODES, 10)
    assert new.size == old.size + 13 and new.sentinels == 10
    assert new.encode(text) == old.encode(text)
    assert [new.encode(name) for name in MODES] == [[old.size + k] for k in range(3)]
    np.testing.assert_array_equal(new.sentinel_ids, new.size - 1 - np.arange(10))
    assert [new.decode([token]) for token in new.sentinel_ids[:2]] == [
        "<extra_id_0>",
        "<extra_id_1>",
    ]
    assert (new.eos, new.pad, new.stops, new.bos, new.ends) == (1, 0, (1,), None, True)
    assert vocabularies.sentinel_text(new, new.size - 3) == "<extra_id_2>"


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS[:3]), parts=st.lists(st.sampled_from(MODES) | TEXT, max_size=6))
def test_text_with_names_comes_back_to_the_letter(inner, kind, parts):
    new, text = extended.extend_vocabulary(inner[kind], MODES, 5), "".join(parts)
    ids = new.encode(text)
    assert new.decode(ids) == text
    assert all(token < new.size for token in ids)
    together = new.encode_all([text, "", "[NLU]", text])
    assert [each.tolist() for each in together] == [ids, [], [inner[kind].size], ids]


def test_a_blank_after_a_sentinel_is_kept_where_a_beginning_drops_it():
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world of the lazy brown fox"] * 50),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    old = vocabularies.SentencePieceVocabulary(model.getvalue())
    new = extended.extend_vocabulary(old, ("[NLU]",), 5)
    hello, world = old.encode("hello"), old.encode("world")
    assert new.decode([*hello, new.sentinel_ids[0], *world]) == "hello<extra_id_0> world"
    assert new.decode(new.encode("[NLU] hello world")) == "[NLU] hello world"


def test_the_longest_name_wins_and_sentinels_are_read_by_name(inner):
    new = extended.extend_vocabulary(inner["bytes"], ("<a>", "<a><b>"), 4)
    assert new.encode("<a><b><a>") == [260, 259]
    assert new.encode("x<extra_id_1>y") == [ord("x") + 3, new.size - 2, ord("y") + 3]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_gives_the_same_ids(inner, kind, tmp_path):
    new = extended.extend_vocabulary(inner[kind], MODES, 6)
    vocabularies.save_pair(tmp_path, new, inner[kind])
    loaded, plain = vocabularies.load_pair(tmp_path)
    text = "abc[NLG] a<extra_id_3>"
    assert loaded.encode(text) == new.encode(text)
    assert vocabularies.fingerprint(loaded) == vocabularies.fingerprint(new)
    assert vocabularies.fingerprint(loaded.inner) == vocabularies.fingerprint(plain)
    assert (loaded.size, loaded.sentinels, loaded.ends) == (new.size, 6, True)
    new.ends = False
    assert vocabularies.fingerprint(loaded) != vocabularies.fingerprint(new)


def test_pieces_that_are_there_serve_as_sentinels():
    unused = [f"<unused{k}>" for k in range(7)]
    old = vocabularies.TokenizerJsonVocabulary(tokenizer_json(*unused))
    new = extended.extend_vocabulary(old, pattern="<unused{}>")
    assert new.size == old.size and new.sentinels == 7
    assert new.sentinel_ids.tolist() == [old.token(name) for name in unused]
    assert new.decode([*old.encode("fox"), new.sentinel_ids[4]]) == "fox<unused4>"
    rebuilt = vocabularies.build_vocabulary(json.dumps(new.description()), new.model_bytes())
    np.testing.assert_array_equal(rebuilt.sentinel_ids, new.sentinel_ids)


def test_what_is_there_is_not_added_again(inner):
    new = extended.extend_vocabulary(inner["bytes"], MODES, 6)
    assert (
        extended.extend_vocabulary(new, MODES, 6) is new and extended.extend_vocabulary(new) is new
    )
    more = extended.extend_vocabulary(new, ("[X]",))
    assert more.size == new.size + 1 and more.encode("[NLU][X]") == [259, new.size]
    np.testing.assert_array_equal(more.sentinel_ids, new.sentinel_ids)


def test_what_cannot_grow_names_the_binding(inner):
    with pytest.raises(ValueError, match="extra_ids = 9: the vocabulary has 6 sentinels"):
        extended.extend_vocabulary(extended.extend_vocabulary(inner["bytes"], (), 6), (), 9)
    with pytest.raises(ValueError, match="has no piece '<unused0>'; bind Vocabulary.extra_ids"):
        extended.extend_vocabulary(inner["bytes"], pattern="<unused{}>")
    with pytest.raises(ValueError, match="'<extra_id_0>', which is empty or a sentinel"):
        extended.extend_vocabulary(inner["bytes"], ("<extra_id_0>",), 3)
    with pytest.raises(ValueError, match="Vocabulary.names has ''"):
        extended.extend_vocabulary(inner["bytes"], ("",), 3)


def rows():
    return (TextExample(None, text) for text in SENTENCES)


def test_a_config_grows_every_kind_and_a_checkpoints(inner, tmp_path):
    vocabularies.save_pair(tmp_path / "vocabulary", inner["bytes"], inner["bytes"])
    (tmp_path / "config.gin").write_text("")
    (tmp_path / "pieces.model").write_bytes(inner["sentencepiece"].model_bytes())
    configs = [
        config.Vocabulary("bytes", extra_ids=8, names=MODES),
        config.Vocabulary("trained", size=320, extra_ids=8, names=MODES),
        config.Vocabulary("checkpoint", path=str(tmp_path), extra_ids=8, names=MODES),
        config.Vocabulary(
            "sentencepiece", path=str(tmp_path / "pieces.model"), extra_ids=8, names=MODES
        ),
    ]
    text = built_in.TrainingText(rows, lambda: "source")
    for cfg in configs:
        for each in built_in.vocabulary_pair(cfg, text, str(tmp_path)):
            assert each.sentinels == 8 and each.size == each.inner.size + 11
            assert each.encode("[S2S]") == [each.size - 9]


def test_a_run_reads_text_in_a_grown_vocabulary(tmp_path):
    (tmp_path / "a.txt").write_text("some text to read\n" * 9)
    cfg = config.Data(
        config.Files(
            "toy", str(tmp_path / "*.txt"), config.Vocabulary("bytes", extra_ids=8, names=MODES)
        ),
        {"inputs": 32, "targets": 16},
        config.SpanCorruption(),
        cache_dir=str(tmp_path / "cache"),
    )
    batch = data.open_batches(cfg, "encoder_decoder", 4, 0).at(0)
    assert batch.inputs.max() == 259 + 3 + 8 - 1


@pytest.mark.parametrize("kind", KINDS[:3])
def test_transformers_reads_a_grown_vocabulary_as_we_do(inner, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    new = extended.extend_vocabulary(extended.extend_vocabulary(inner[kind], MODES), ("[X]",), 5)
    huggingface_tokenizer.write_tokenizer(new, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in ("[NLU]def f(x): <extra_id_0> x[X] + 1<extra_id_4>", "The fox[S2S][NLG]"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == new.encode(text)
    assert len(theirs) == new.size
