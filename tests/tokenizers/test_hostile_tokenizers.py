# SPDX-License-Identifier: Apache-2.0
"""A tokenizer.json can neither end the process nor raise what is not an Exception."""

import base64
import json

import pytest
import tokenizers
from test_tokenizers import SENTENCES, byte_level, folders, written
from tokenizers import models

from t5x_lite import config
from t5x_lite.checkpoints import text_settings
from t5x_lite.data import built_in
from t5x_lite.tokenizers import fast_tokenizers, vocabularies
from t5x_lite.tokenizers import huggingface_tokenizer as conversion

__all__ = ["folders"]  # a fixture


def described(**changes):
    """A tokenizer.json of two letters and an end, with changes."""
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "</s>": 2}, merges=[]))
    return json.loads(tokenizer.to_str()) | changes


def replacing(content, pattern=None):
    return {"type": "Replace", "pattern": pattern or {"String": "a"}, "content": content}


def sequence(*rules, kind="normalizers"):
    return {"type": "Sequence", kind: list(rules)}


def template(count):
    piece = {"SpecialToken": {"id": "x", "type_id": 0}}
    special = {"x": {"id": "x", "ids": [2] * count, "tokens": ["</s>"] * count}}
    single = [*[piece] * 100, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def charsmap(text):
    """The table of a normalizer that has `text` for something."""
    table = (256 * 4).to_bytes(4, "little") + bytes(256 * 4) + text + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


GROWING = {
    "rules that double": dict(normalizer=sequence(*[replacing("aa")] * 30)),
    "an expression": dict(normalizer=replacing("x" * 2000, {"Regex": ""})),
    "a prefix": dict(normalizer=sequence({"type": "Prepend", "prepend": "x" * 2000})),
    "in sequences": dict(normalizer=sequence(*[sequence(*[replacing("aa")] * 5)] * 6)),
    "a table": dict(normalizer=charsmap(b"x" * 10**5)),
    "when decoding": dict(decoder=sequence(*[replacing("aa")] * 30, kind="decoders")),
    "around a text": dict(post_processor=template(10**5)),
    "a subword prefix": dict(
        model=described()["model"]
        | {"vocab": {"a": 0, "</s>": 1}, "end_of_word_suffix": "x" * 2000}
    ),
}


@pytest.mark.parametrize("name", GROWING)
def test_rules_that_grow_a_text_without_bound_are_refused_when_loaded(name, tmp_path):
    content = json.dumps(described(**GROWING[name])).encode()
    with pytest.raises(ValueError, match="may make a text .* times as long"):
        vocabularies.TokenizerJsonVocabulary(content)
    folder = written(tmp_path / "hf", {"eos_token": "</s>"}, tokenizer__json=content)
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer \(its"):
        conversion.read_tokenizer(folder)


CATASTROPHIC = {"Regex": "(a+)+$"}
WORDS = {"type": "Split", "pattern": CATASTROPHIC, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "changes", [dict(pre_tokenizer=WORDS), dict(normalizer=replacing("x", CATASTROPHIC))]
)
def test_an_expression_that_backtracks_for_ever_is_an_error_of_the_text(changes):
    vocabulary = vocabularies.TokenizerJsonVocabulary(json.dumps(described(**changes)).encode())
    text = "a" * 40 + "b"
    for encode in (vocabulary.encode, lambda text: vocabulary.encode_all(["b", text])):
        with pytest.raises(ValueError, match="the tokenizers library fails on it"):
            encode(text)
    assert vocabulary.encode("bb") == [1, 1]


@pytest.mark.parametrize("name", ["precompiled_charsmap", "\\u0070recompiled_charsmap"])
def test_a_table_that_is_cut_off_is_refused_before_it_is_allocated(name):
    table = base64.b64encode((2**32 - 4).to_bytes(4, "little") + b"xxxx").decode()
    rule = {"type": "Precompiled", "precompiled_charsmap": table}
    content = json.dumps(described(normalizer=sequence(rule)))
    content = content.replace("precompiled_charsmap", name)
    # The library reads both of two fields of one name, Python the last alone.
    twice = content.replace('"normalizer":', '"normalizer": null, "normalizer":', 1)
    before = content[:-1] + ', "normalizer": null}'
    for each in (content, twice, before):
        with pytest.raises(ValueError, match="table of its normalizer is cut off"):
            vocabularies.TokenizerJsonVocabulary(each.encode())


def test_a_text_without_tokens_and_an_unknown_is_an_error_of_the_text():
    model = {"type": "Unigram", "vocab": [["</s>", 0.0], ["a", -1.0]], "unk_id": None}
    content = described(model=model | {"byte_fallback": False})
    vocabulary = vocabularies.TokenizerJsonVocabulary(json.dumps(content).encode())
    assert vocabulary.encode("a") == [1]
    with pytest.raises(ValueError, match="the tokenizers library fails on it: .*unk_id"):
        vocabulary.encode("b")


def test_a_panic_while_loading_is_an_error_at_every_door(tmp_path):
    rule = {"type": "Precompiled", "precompiled_charsmap": 1.5}
    content = json.dumps(described(normalizer=rule)).encode()
    (tmp_path / "tokenizer.json").write_bytes(content)
    cfg = config.Vocabulary("tokenizer_json", path=str(tmp_path / "tokenizer.json"))
    for load in (
        lambda: vocabularies.TokenizerJsonVocabulary(content),
        lambda: built_in.build_vocabulary(cfg, built_in.TrainingText(list, str), str(tmp_path)),
        lambda: text_settings.read_named_vocabulary(cfg.path, 0),
        lambda: conversion.read_tokenizer(tmp_path),
    ):
        with pytest.raises(ValueError, match="the tokenizers library fails on it"):
            load()


@pytest.mark.parametrize("strategy", [{"Fixed": 10**12}, "BatchLongest"])
def test_padding_and_truncation_of_a_file_are_never_used(strategy, tmp_path):
    padding = {
        "strategy": strategy,
        "direction": "Right",
        "pad_to_multiple_of": 10**12,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "a",
    }
    content = json.dumps(described(padding=padding)).encode()
    folder = written(tmp_path / "hf", {"eos_token": "</s>"}, tokenizer__json=content)
    assert conversion.read_tokenizer(folder)[0].encode("ab") == [0, 1]


def test_published_kinds_stay_far_below_the_bound(folders):
    """Those of every family here, and rules as ALBERT's, the longest chain there is."""
    rules = [replacing('"', {"String": "``"}), replacing(" ", {"Regex": " {2,}"})]
    albert = sequence(*rules, {"type": "NFKD"}, {"type": "Lowercase"}, charsmap(b"x" * 33))
    for content in [byte_level(["</s>"]).to_str(), json.dumps(described(normalizer=albert))]:
        tokenizer = tokenizers.Tokenizer.from_str(content)
        rules = (tokenizer.normalizer, tokenizer.decoder)
        parts = [fast_tokenizers.component(part) for part in rules]
        assert max(map(fast_tokenizers.rule_growth, parts)) < 100
    for folder in folders.values():
        assert conversion.read_tokenizer(folder)[0].encode(SENTENCES[0])
