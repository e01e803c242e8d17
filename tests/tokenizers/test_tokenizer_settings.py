# SPDX-License-Identifier: Apache-2.0
"""Hugging Face tokenizer folders that are broken, odd or incomplete: errors that name the field."""

import pytest
from test_tokenizers import byte_level, theirs, written

from t5x_lite.tokenizers import huggingface_tokenizer as conversion


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "No tokenizer in .*neither tokenizer.json nor spiece.model"),
        ({"tokenizer.json": "{}"}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer.json": "no JSON"}, "tokenizer.json is not a tokenizer"),
        ({"spiece.model": "nothing"}, "spiece.model is not a SentencePiece model"),
        ({"tokenizer.model": ""}, "tokenizer.model is not a SentencePiece model"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json is not JSON"),
        ({"config.json": "[]"}, "config.json is not a JSON object"),
        ({"vocab.json": "{}", "merges.txt": "a"}, "vocab.json and merges.txt"),
    ],
)
def test_a_folder_that_cannot_be_read_says_why(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        conversion.read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"eos_token": None, "pad_token": None}, "does not say what ends a text"),
        ({"added_tokens_decoder": {"9999": {"content": "<x>"}}}, "has no id 9999"),
    ],
)
def test_settings_that_do_not_fit_say_so(change, message, tmp_path):
    tokenizer = byte_level(["<|endoftext|>"]).to_str().encode()
    folder = written(
        tmp_path / "x", {"eos_token": "<|endoftext|>"} | change, tokenizer__json=tokenizer
    )
    with pytest.raises(ValueError, match=message):
        conversion.read_tokenizer(folder)


def test_an_end_that_is_no_id_is_refused(tmp_path):
    tokenizer = byte_level(["<|endoftext|>"]).to_str().encode()
    generation = {"eos_token_id": [0, 5000]}
    folder = written(tmp_path / "x", generation=generation, tokenizer__json=tokenizer)
    with pytest.raises(ValueError, match="eos_token_id has 5000"):
        conversion.read_tokenizer(folder)


def test_tokens_that_only_the_settings_add_are_tokens(tmp_path):
    tokenizer = byte_level(["<|endoftext|>"])
    size = tokenizer.get_vocab_size()
    added = {str(size): {"content": "<|user|>", "special": True, "normalized": False}}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    folder = written(
        tmp_path / "x",
        settings | {"added_tokens_decoder": added},
        {"model_type": "llama"},
        tokenizer__json=tokenizer.to_str().encode(),
    )
    ours, _ = conversion.read_tokenizer(folder)
    assert ours.encode("a<|user|>b") == theirs(folder).encode("a<|user|>b")
    assert ours.size == size + 1 and size in ours.encode("<|user|>")


@pytest.mark.parametrize("part", [None, "text_config", "decoder"])
def test_added_tokens_without_weights_are_plain_text(part, tmp_path):
    tokenizer = byte_level(["<|endoftext|>"])
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<image>"])
    config = {"vocab_size": size} if part is None else {part: {"vocab_size": size}}
    settings = {"eos_token": "<|endoftext|>"}
    folder = written(tmp_path / "x", settings, config, tokenizer__json=tokenizer.to_str().encode())
    ours, _ = conversion.read_tokenizer(folder)
    assert ours.size == size
    assert ours.decode(ours.encode("an <image>")) == "an <image>"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"eos_token": ["</s>"]}, "eos_token is .* not the name of a token"),
        ({"tokenizer_class": 7}, "tokenizer_class is 7"),
        ({"added_tokens_decoder": ["<x>"]}, "added_tokens_decoder is"),
        ({"added_tokens_decoder": {"1": {"lstrip": True}}}, "an added token is"),
    ],
)
def test_a_field_that_is_not_what_it_should_be_is_named(values, message, tmp_path):
    tokenizer = byte_level(["</s>"]).to_str().encode()
    folder = written(tmp_path / "x", {"eos_token": "</s>"} | values, tokenizer__json=tokenizer)
    with pytest.raises(ValueError, match=message):
        conversion.read_tokenizer(folder)


@pytest.mark.parametrize("role", ["eos_token_id", "bos_token_id", "pad_token_id"])
def test_an_id_that_is_none_is_named(role, tmp_path):
    tokenizer = byte_level(["</s>"]).to_str().encode()
    folder = written(
        tmp_path / "x", {"eos_token": "</s>"}, {role: "</s>"}, tokenizer__json=tokenizer
    )
    with pytest.raises(ValueError, match=f"{role} is .* not an id"):
        conversion.read_tokenizer(folder)


def test_early_llamas_padding_is_none(tmp_path):
    tokenizer = byte_level(["</s>"]).to_str().encode()
    config = {"pad_token_id": -1}
    folder = written(tmp_path / "x", {"eos_token": "</s>"}, config, tokenizer__json=tokenizer)
    assert conversion.read_tokenizer(folder)[1].pad is None
