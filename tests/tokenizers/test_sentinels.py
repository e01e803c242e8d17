# SPDX-License-Identifier: Apache-2.0
"""Laws of sentinels: a name in a text is its id, at any place, and ids are found by their names."""

import functools
import itertools
import json
import re

import numpy as np
import pytest
from test_tokenizers import (
    SENTENCES,
    byte_level,
    llama_pieces,
    t5_pieces,
    theirs,
    written,
)

from t5x_lite import config, convert
from t5x_lite.checkpoints import text_settings
from t5x_lite.config import checked, windows
from t5x_lite.data import built_in, objective_ids, objectives, randomness
from t5x_lite.tokenizers import (
    extended,
    sentencepiece_training,
    special_tokens,
    vocabularies,
)
from t5x_lite.tokenizers import huggingface_tokenizer as conversion

COUNT = 5
TEXTS = ["a{}", "{}a", "a{}b", "a {} b", "{}", "{}{}", " {} a", "a b{} ", "a, {}.\nb {}"]


@functools.cache
def trained():
    return sentencepiece_training.train_sentencepiece(SENTENCES, 400)


def json_with_a_hole():
    described = json.loads(byte_level(["</s>"]).to_str())
    vocab = described["model"]["vocab"]
    vocab[max(vocab, key=vocab.get)] += 3
    return json.dumps(described).encode()


def chat_json():
    return byte_level(["<|endoftext|>", "</s>"]).to_str().encode()


MAKERS = {
    "bytes": lambda: vocabularies.ByteVocabulary(COUNT),
    "symbols": lambda: vocabularies.SymbolVocabulary(list("ab ,.\n"), extra_ids=COUNT),
    "spaced": lambda: vocabularies.SymbolVocabulary(["a", "b"], separator=" ", extra_ids=COUNT),
    "trained": lambda: vocabularies.SentencePieceVocabulary(trained(), COUNT),
    "t5": lambda: vocabularies.SentencePieceVocabulary(t5_pieces(), COUNT),
    "llama": lambda: vocabularies.SentencePieceVocabulary(llama_pieces(), COUNT),
    "json": lambda: vocabularies.TokenizerJsonVocabulary(chat_json(), COUNT),
    "json_hole": lambda: vocabularies.TokenizerJsonVocabulary(json_with_a_hole(), COUNT),
    "extended": lambda: extended.ExtendedVocabulary(
        vocabularies.ByteVocabulary(), ["[NLU]"], COUNT
    ),
}


@pytest.fixture(scope="module")
def every():
    return {kind: make() for kind, make in MAKERS.items()}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_name_is_its_id_at_any_place(every, kind):
    vocabulary = every[kind]
    for text in TEXTS:
        names = [f"<extra_id_{k}>" for k in (3, 0)][: text.count("{}")]
        ids = vocabulary.encode(text.format(*names))
        expected = [vocabulary.sentinel_ids[k] for k in (3, 0)][: len(names)]
        sentinels = set(vocabulary.sentinel_ids.tolist())
        assert [token for token in ids if token in sentinels] == expected, text
        assert vocabulary.encode_all([text.format(*names)])[0].tolist() == ids


@pytest.mark.parametrize("kind", ["bytes", "symbols", "trained", "llama", "json", "json_hole"])
def test_text_with_names_comes_back_to_the_letter(every, kind):
    for text in TEXTS:
        typed = text.format("<extra_id_3>", "<extra_id_0>")
        assert every[kind].decode(every[kind].encode(typed)) == typed


def test_pieces_of_seqio_that_begin_with_a_space_are_found_everywhere():
    """Its sentinels are spelled so in every model, also in one that keeps the spaces of a text."""
    from sentencepiece import sentencepiece_model_pb2 as schema

    for model in (trained(), llama_pieces()):
        proto = schema.ModelProto.FromString(model)
        kind = schema.ModelProto.SentencePiece.USER_DEFINED
        for name in ("▁<extra_id_1>", "▁<extra_id_0>"):
            proto.pieces.add(piece=name, score=0.0, type=kind)
        vocabulary = vocabularies.SentencePieceVocabulary(proto.SerializeToString())
        top = vocabulary.size - 1
        assert vocabulary.sentinel_ids.tolist() == [top, top - 1]
        for text in ("a <extra_id_0> b", "<extra_id_0> b", " <extra_id_0>", "a<extra_id_0>b"):
            ids = vocabulary.encode(text)
            assert ids.count(top) == 1
            assert vocabulary.encode(vocabulary.decode(ids)) == ids
        assert vocabulary.encode("a <extra_id_0> b") == vocabulary.processor.encode(
            "a <extra_id_0> b"
        )


@pytest.mark.parametrize("kind", ["bytes", "trained", "t5", "llama", "json", "json_hole"])
def test_what_spans_became_can_be_typed(every, kind):
    """encode(decode(ids)) is ids, for inputs and targets of span corruption between whole words."""
    vocabulary = every[kind]
    words = [vocabulary.encode(word) for word in ("The fox", " jumps over", " the dog")]
    if kind == "llama":  # the model begins every text with a space
        words[1:] = [vocabulary.encode(word.strip()) for word in ("jumps over", "the dog")]
    s0, s1 = vocabulary.sentinel_ids[:2].tolist()
    for ids in (
        [*words[0], s0, *words[2]],
        [s0, *words[1], s1],
        [*words[0], s0],
        [s0, s1, *words[1]],
    ):
        text = vocabulary.decode(ids)
        assert vocabulary.encode(text) == ids, text


def test_byte_text_with_sentinels_has_the_ids_of_training(every):
    vocabulary = every["bytes"]
    fit = windows.LengthLimits(24, 16, "encoder_decoder")
    preprocessor = objectives.make_preprocessor(config.SpanCorruption(), fit, vocabulary)
    text = np.array(vocabulary.encode("the quick brown fox")[: preprocessor.window])
    keys = randomness.keys(3, np.arange(20))
    inputs, targets = preprocessor.parts(np.tile(text, (20, 1)), keys)
    for part in (inputs, targets):
        for ids in np.split(part.tokens, np.cumsum(part.lengths)[:-1]):
            typed = vocabulary.decode(ids)
            assert vocabularies.encode_with_ends(vocabulary, typed) == ids.tolist(), typed


def test_text_without_names_keeps_its_ids(every):
    """Those of SentencePiece itself, and of the tokenizer without sentinels."""
    import sentencepiece

    for kind, model in (("trained", trained()), ("t5", t5_pieces()), ("llama", llama_pieces())):
        alone = sentencepiece.SentencePieceProcessor(model_proto=model)
        assert [ids.tolist() for ids in every[kind].encode_all(SENTENCES)] == alone.encode(
            SENTENCES
        )
    plain = vocabularies.TokenizerJsonVocabulary(chat_json())
    for text in SENTENCES[:7]:
        assert every["json"].encode(text) == plain.encode(text)


@pytest.mark.parametrize("kind", ["bytes", "trained", "t5", "json", "symbols"])
def test_an_exported_tokenizer_reads_names_as_we_do(every, kind, tmp_path):
    vocabulary = every[kind]
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    conversion.write_tokenizer(vocabulary, tmp_path)
    reference, again = theirs(tmp_path), conversion.read_tokenizer(tmp_path)[0]
    for text in TEXTS:
        typed = text.format("<extra_id_3>", "<extra_id_0>")
        ids = vocabulary.encode(typed)
        assert reference.encode(typed, add_special_tokens=False) == ids, typed
        assert again.encode(typed) == ids


def t5_folder(folder):
    """A T5 tokenizer to which tokens were added, as transformers saves it."""
    model = t5_pieces()
    plain = written(
        folder / "plain",
        {"tokenizer_class": "T5Tokenizer"},
        {"model_type": "t5", "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
        spiece__model=model,
    )
    tokenizer = theirs(plain)
    tokenizer.add_tokens(["{", "}", "\n", "[SEP]"])
    tokenizer.save_pretrained(folder / "added")
    (folder / "added" / "config.json").write_text((plain / "config.json").read_text())
    return folder / "added", tokenizer


def test_sentinels_are_found_by_name_below_added_tokens(tmp_path):
    folder, reference = t5_folder(tmp_path)
    expected = [reference.convert_tokens_to_ids(f"<extra_id_{k}>") for k in range(100)]
    assert expected[0] < len(reference) - 1
    for extra_ids in (0, 100):
        cfg = config.Vocabulary("checkpoint", path=str(folder), extra_ids=extra_ids)
        inputs, targets = built_in.vocabulary_pair(
            cfg, built_in.TrainingText(list, str), str(tmp_path)
        )
        for each in (inputs, targets):
            assert each.sentinel_ids.tolist() == expected
            assert each.size == len(reference)
        assert targets.decode([expected[7]]) == "<extra_id_7>"
    fit = windows.LengthLimits(32, 32, "encoder_decoder")
    preprocessor = objectives.make_preprocessor(config.SpanCorruption(), fit, targets)
    inputs, _ = preprocessor.parts(np.full((1, 20), 5), np.array([9], np.uint64))
    assert expected[0] in inputs.tokens


@pytest.mark.parametrize("kind", MAKERS)
def test_an_id_beyond_the_vocabulary_is_no_sentinel(every, kind):
    """A model often has more ids than its vocabulary, and may write any of them."""
    vocabulary = every[kind]
    last = vocabulary.sentinel_ids[0]
    for token in (vocabulary.size, vocabulary.size + 50, 2**31 - 1):
        assert "extra_id" not in vocabulary.decode([token])
        assert vocabulary.decode([last, token]).count("<extra_id_") == 1


NAMES = [f"<extra_id_{k}>" for k in range(4)]
ORDERS = {
    "descending": NAMES[::-1],
    "ascending": NAMES,
    "apart": list(
        itertools.chain.from_iterable(zip(NAMES, ["[A]", "[B]", "[C]", "[D]"], strict=True))
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_sentinels_of_any_order_are_found_by_name(order, tmp_path):
    specials = ["</s>", *ORDERS[order]]
    content = byte_level(specials).to_str().encode()
    vocabulary = vocabularies.TokenizerJsonVocabulary(content)
    expected = [vocabulary.tokenizer.token_to_id(name) for name in NAMES]
    assert vocabulary.sentinel_ids.tolist() == expected and vocabulary.sentinels == 4
    assert vocabulary.decode(vocabulary.encode("a<extra_id_2>b")) == "a<extra_id_2>b"
    vocabularies.save_vocabulary(vocabulary, tmp_path)
    again = vocabularies.load_vocabulary(tmp_path)
    assert again.sentinel_ids.tolist() == expected
    byt5 = vocabularies.ByteVocabulary(named=dict(zip(specials, range(259, 270), strict=False)))
    assert byt5.sentinel_ids.tolist() == [byt5.token(name) for name in NAMES]


def t5_with_sentinels():
    """T5's pieces with those of its sentinels in the model, as seqio keeps them."""
    from t5x_lite.tokenizers.subwords import with_sentinels

    return with_sentinels(t5_pieces(), 4)


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizer_json"])
def test_a_model_file_that_has_sentinels_gets_no_second_ones(kind, tmp_path):
    content = t5_with_sentinels()
    if kind == "tokenizer_json":
        content = byte_level(["</s>", *NAMES, "[A]"]).to_str().encode()
    path = tmp_path / ("a.model" if kind == "sentencepiece" else "a.json")
    path.write_bytes(content)
    for extra_ids in (0, 3, 4):
        cfg = config.Vocabulary(kind, path=str(path), extra_ids=extra_ids)
        built = built_in.build_vocabulary(cfg, built_in.TrainingText(list, str), str(tmp_path))
        named = text_settings.read_named_vocabulary(str(path), extra_ids).vocabularies[0]
        for vocabulary in (built, named):
            assert vocabulary.sentinel_ids.tolist() == [vocabulary.token(name) for name in NAMES]
    with pytest.raises(
        ValueError, match="has 4 sentinels, and new ones would go by the same names"
    ):
        cfg = config.Vocabulary(kind, path=str(path), extra_ids=5)
        built_in.build_vocabulary(cfg, built_in.TrainingText(list, str), str(tmp_path))


def test_a_vocabulary_without_sentinels_says_what_there_is():
    bare = vocabularies.ByteVocabulary()
    fit = windows.LengthLimits(32, 32, "encoder_decoder")
    with pytest.raises(ValueError, match="Vocabulary.extra_ids .* Vocabulary.sentinels = "):
        objectives.make_preprocessor(config.SpanCorruption(), fit, bare)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_newline_between_examples_is_read_back_or_there_is_none(every, kind):
    vocabulary = every[kind]
    seam = objective_ids.newline_ids(vocabulary)
    assert bool(seam) == (kind not in ("t5", "spaced"))  # T5's pieces begin with a space instead
    first, second = vocabulary.encode("a b"), vocabulary.encode("b a")
    text = vocabulary.decode([*first, *seam, *second])
    assert not seam or text.split("\n")[0] == "a b"


@pytest.mark.parametrize("kind", MAKERS)
def test_half_a_surrogate_pair_is_refused_by_every_vocabulary(every, kind):
    for encode in (every[kind].encode, lambda text: every[kind].encode_all(["a", text])):
        with pytest.raises(ValueError, match="not Unicode text: character 2 is half of a surr"):
            encode("a\ud83db")


MOST = checked.MOST_SENTINELS
OTHERS = ["<extra_id_", "<extra_id_7>s", "<extra_id_100>", "<extra_id_07>", " <extra_id_3> x"]


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 100, 101, 110, 999])
@pytest.mark.parametrize("spaced", ["none", "all", "some"])
def test_numbered_names_are_found_as_in_a_list_of_all_of_them(count, spaced):
    names = [special_tokens.SENTINEL.replace("{}", str(k)) for k in range(count)]
    ids = {name: token for token, name in enumerate(dict.fromkeys([*OTHERS, *names]))}
    taken = {"none": [], "all": names, "some": names[::3]}[spaced]
    named = special_tokens.NamedTokens(ids, spaced=taken)
    alternatives = [
        (" ?" if name in taken else "") + re.escape(name)
        for name in sorted(ids, key=len, reverse=True)
    ]
    listed = re.compile(f"({'|'.join(alternatives)})")
    numbers = [*range(12), 99, 100, 101, 109, 110, 998, 999, 1000, "007", "", "-1"]
    typed = [f"<extra_id_{number}>" for number in numbers]
    text = "b ".join([f"{name}{name} {name}s  {name} x" for name in typed] + OTHERS)
    assert named.pattern.split(text) == listed.split(text)


def test_the_largest_number_of_sentinels_is_the_same_everywhere(tmp_path):
    cfg = config.Vocabulary("bytes", extra_ids=MOST)
    vocabulary, _ = built_in.vocabulary_pair(cfg, built_in.TrainingText(list, str), str(tmp_path))
    vocabularies.save_vocabulary(vocabulary, tmp_path)
    again = vocabularies.load_vocabulary(tmp_path)
    assert again.encode(f"<extra_id_{MOST - 1}>") == vocabulary.encode(f"<extra_id_{MOST - 1}>")
    assert again.sentinels == MOST and len(again.named.pattern.pattern) < 1000
    with pytest.raises(ValueError, match="Vocabulary.extra_ids must be at most 100,000"):
        config.Vocabulary("bytes", extra_ids=MOST + 1)
    more = json.dumps(vocabulary.description() | {"extra_ids": MOST + 1})
    for make in (
        lambda: vocabularies.build_vocabulary(more, None),
        lambda: vocabularies.ByteVocabulary(MOST + 1),
        lambda: vocabularies.SymbolVocabulary("ab", extra_ids=MOST + 1),
        lambda: extended.ExtendedVocabulary(vocabularies.ByteVocabulary(), extra_ids=MOST + 1),
    ):
        with pytest.raises(ValueError, match="extra_ids is 100,001; it is at most 100,000"):
            make()
    with pytest.raises(SystemExit):
        convert.parser().parse(["--from=a", "--to=b", f"--extra_ids={MOST + 1}"])
