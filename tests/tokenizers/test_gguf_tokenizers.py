# SPDX-License-Identifier: Apache-2.0
"""Laws of a .gguf file's tokenizer: the ids of the one that the model was trained with."""

import io
import json

import mixed_text
import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from t5x_lite.tokenizers import gguf_tokenizer
from t5x_lite.tokenizers.errors import GgufError

LINES = mixed_text.lines()
TRAINING = [line for line in LINES if line.strip()]


@pytest.fixture(scope="module")
def byte_level():
    """Metadata of a byte-level BPE trained on half of the lines."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<end>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING[::2], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
    }


def ours(metadata):
    tokenizer = tokenizers.Tokenizer.from_buffer(gguf_tokenizer.tokenizer_json(metadata))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("pre", [None, "gpt-2", "default", "llama-bpe", "qwen2", "tekken"])
def test_byte_level_ids_are_those_of_transformers(byte_level, pre):
    import unicodedata

    from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs

    names = theirs.GGUF_TOKENIZER_MAPPING["tokenizer"]
    metadata = byte_level | ({"tokenizer.ggml.pre": pre} if pre else {})
    fields = {
        name: metadata[f"tokenizer.{key}"]
        for key, name in names.items()
        if f"tokenizer.{key}" in metadata
    }
    there, _ = theirs.convert_gguf_tokenizer("llama", fields)
    encode = ours(metadata)
    for line in LINES + ["<|user|>hi<end>", ""]:
        # Qwen's own tokenizer composes characters first, which transformers leaves out here.
        normalized = unicodedata.normalize("NFC", line) if pre == "qwen2" else line
        expected = there.encode(normalized, add_special_tokens=False).ids
        if pre == "llama-bpe" and encode(line) != expected:
            # Llama 3 takes a word that is a token whole, though its merges would not make it.
            assert len(encode(line)) < len(expected)
        else:
            assert encode(line) == expected, line


def test_composed_and_decomposed_text_is_one_to_qwen(byte_level):
    encode = ours(byte_level | {"tokenizer.ggml.pre": "qwen2"})
    assert encode("e\u0301te\u0301") == encode("\u00e9t\u00e9")


def train_pieces(**options):
    """A SentencePiece BPE model with bytes for other characters, as Llama 2's is.

    Args:
      options: more options of SentencePiece's trainer.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING[::2]),
        model_writer=model,
        vocab_size=1200,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def pieces():
    return train_pieces(split_digits=True)


def of_pieces(processor):
    """The metadata that llama.cpp's converter makes of a SentencePiece model."""
    kinds = []
    for k in range(processor.get_piece_size()):
        unknown, control = processor.is_unknown(k), processor.is_control(k)
        kinds.append(2 if unknown else 3 if control else 6 if processor.is_byte(k) else 1)
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [
            processor.id_to_piece(k) for k in range(processor.get_piece_size())
        ],
        "tokenizer.ggml.scores": [
            processor.get_score(k) for k in range(processor.get_piece_size())
        ],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
    }


def test_sentencepiece_ids_are_those_of_sentencepiece(pieces):
    encode = ours(of_pieces(pieces))
    different = [line for line in LINES if encode(line) != pieces.encode(line)]
    assert different == []


def test_sentencepiece_ids_become_their_text_again(pieces):
    tokenizer = tokenizers.Tokenizer.from_buffer(gguf_tokenizer.tokenizer_json(of_pieces(pieces)))
    for line in LINES:
        ids = tokenizer.encode(line, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == line


@pytest.mark.parametrize(
    "changes, trouble",
    [
        ({"tokenizer.ggml.model": "wordpiece"}, "'wordpiece'; those known are gpt2, llama"),
        ({"tokenizer.ggml.pre": "martian"}, "'martian', which is not known here.*llama-bpe"),
        ({"tokenizer.ggml.token_type": [1]}, "1 of token_type"),
        ({"tokenizer.ggml.merges": None}, "merges"),
        ({"tokenizer.ggml.merges": ["nothing like"]}, "merge 'nothing like'"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id is 1000000"),
    ],
)
def test_a_tokenizer_that_cannot_be_is_named(byte_level, changes, trouble):
    metadata = {k: v for k, v in (byte_level | changes).items() if v is not None}
    with pytest.raises(GgufError, match=trouble):
        gguf_tokenizer.tokenizer_json(metadata, "toy.gguf")
        gguf_tokenizer.stop_tokens(gguf_tokenizer.GgufTokenizerFields(metadata, "toy.gguf"))


def with_user_pieces(user, **options):
    """A SentencePiece model with user-defined pieces, and the metadata of its file."""
    processor = train_pieces(user_defined_symbols=user, **options)
    metadata = of_pieces(processor)
    kinds = metadata["tokenizer.ggml.token_type"]
    for name in user:
        assert processor.id_to_piece(processor.piece_to_id(name)) == name
        kinds[processor.piece_to_id(name)] = 4
    return processor, metadata | {"tokenizer.ggml.add_space_prefix": False}


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("spelled", ["▁", " "])
def test_user_defined_pieces_are_matched_whole_longest_first(spelled, architecture):
    user = ["▁" * n for n in range(2, 32)] + ["\n" * n for n in range(2, 5)] + ["<table>"]
    processor, metadata = with_user_pieces(user, add_dummy_prefix=False)
    metadata["general.architecture"] = architecture
    metadata["tokenizer.ggml.tokens"] = [
        token.replace("▁", spelled) if kind == 4 else token
        for token, kind in zip(
            metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True
        )
    ]
    tokenizer = tokenizers.Tokenizer.from_buffer(gguf_tokenizer.tokenizer_json(metadata))
    texts = [f"a{' ' * n}b" for n in range(70)] + [" " * n for n in range(70)]
    texts += ["def f():\n\n\n\n\n        return <table> x", "<table><table>"]
    for text in [*texts, *LINES]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == processor.encode(text), repr(text)
        assert tokenizer.decode(ids) == text
    assert [len(tokenizer.id_to_token(k)) for k in tokenizer.encode(" " * 40).ids] == [31, 9]


@pytest.mark.parametrize("kind", [3, 4])
def test_answers_end_where_the_template_ends_a_turn(kind, byte_level, tmp_path):
    import types

    from t5x_lite.checkpoints import text_settings

    tokens = [*byte_level["tokenizer.ggml.tokens"], "<|im_start|>", "<|im_end|>"]
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}"
    )
    metadata = byte_level | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*byte_level["tokenizer.ggml.token_type"], kind, kind],
    }

    def stops(**more):
        chat = {f"tokenizer.{name}": value for name, value in more.items()}
        source = types.SimpleNamespace(metadata=metadata | chat, path=tmp_path / "toy.gguf")
        settings = text_settings.parse_gguf(source)
        assert settings.ends.stops == settings.vocabularies[1].stops
        return settings.ends.stops

    end = len(tokens) - 1
    assert stops() == (0,)
    assert stops(chat_template=template) == (0, end)
    assert stops(chat_template="{{ messages[1].content }}<end>") == (0,)
    assert stops(chat_template="{{ messages[1].content }}!") == (0,)
    assert stops(chat_template="{{ nonsense(") == stops(chat_template="no messages") == (0,)
