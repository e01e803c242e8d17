# SPDX-License-Identifier: Apache-2.0
"""The law of token tables: ids are accepted if and only if the text that the vocabulary decodes
from them matches the expression, spaces at its beginning included."""

import functools
import io
import itertools
import json
import re

import numpy as np
import pytest
import sentencepiece

from t5x_lite import config
from t5x_lite.decoding.steering import constraints, patterns
from t5x_lite.tokenizers import token_bytes, vocabularies
from t5x_lite.tokenizers.extended import ExtendedVocabulary
from t5x_lite.tokenizers.subwords import SentencePieceVocabulary, TokenizerJsonVocabulary
from t5x_lite.tokenizers.symbols import IntegerVocabulary, SymbolVocabulary

PATTERNS = (" ?a( [ab]+)*", " a.*", "[ ab]{0,5}", "(ab| b)?", "  ?b?|a")
PIECES = ("▁", "▁a", "▁▁a", "a", "b", "ab", "a▁", "▁b", "▁▁")
END = "</s>"


@functools.cache
def train_sentencepiece(**options) -> SentencePieceVocabulary:
    model = io.BytesIO()
    texts = ["a b ab  a ba b a", "ab a  b", "b a  ba ab"] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=272,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=9,
        user_defined_symbols=["▁▁a", "▁▁"],
        **options,
    )
    return SentencePieceVocabulary(model.getvalue())


def tokenizer_json(decoder: dict | None, pieces=PIECES, added=()) -> TokenizerJsonVocabulary:
    names = [END, "<unk>", *pieces, *(f"<0x{byte:02X}>" for byte in range(256))]
    model = {"type": "BPE", "vocab": {name: token for token, name in enumerate(names)}}
    model |= {"merges": [], "byte_fallback": True, "unk_token": "<unk>"}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = [{"id": 0, "content": END, "special": True, **special}]
    tokens += [
        {"id": len(names) + number, "content": name, "special": False, **special}
        for number, name in enumerate(added)
    ]
    content = {"version": "1.0", "model": model, "decoder": decoder, "added_tokens": tokens}
    content |= dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer"))
    return TokenizerJsonVocabulary(json.dumps(content | {"post_processor": None}).encode())


def sequence(*steps: dict) -> dict:
    return {"type": "Sequence", "decoders": [*steps]}


REPLACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
UNDERSCORE = {"type": "Replace", "pattern": {"String": "▁"}, "content": "a"}
BYTES, FUSE = {"type": "ByteFallback"}, {"type": "Fuse"}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
BYTE_LEVEL = {"type": "ByteLevel"} | dict.fromkeys(
    ("add_prefix_space", "trim_offsets", "use_regex"), True
)
MAKERS = {
    "sentencepiece": train_sentencepiece,
    "no dummy prefix": lambda: train_sentencepiece(add_dummy_prefix=False),
    "spaces kept": lambda: train_sentencepiece(remove_extra_whitespaces=False),
    "neither": lambda: train_sentencepiece(add_dummy_prefix=False, remove_extra_whitespaces=False),
    "suffix": lambda: train_sentencepiece(treat_whitespace_as_suffix=True),
    "extended": lambda: ExtendedVocabulary(train_sentencepiece(), ["ba"], 0),
    "llama": lambda: tokenizer_json(sequence(REPLACE, BYTES, FUSE, STRIP)),
    "gemma": lambda: tokenizer_json(sequence(REPLACE, BYTES, FUSE)),
    "other replace": lambda: tokenizer_json(sequence(UNDERSCORE, BYTES, FUSE)),
    "metaspace": lambda: tokenizer_json(METASPACE),
    "metaspace, never": lambda: tokenizer_json(METASPACE | {"prepend_scheme": "never"}),
    "added": lambda: tokenizer_json(sequence(REPLACE, BYTES, FUSE, STRIP), added=[" ab", "▁b▁"]),
    "none": lambda: tokenizer_json(None),
    "byte level": lambda: tokenizer_json(BYTE_LEVEL, ("Ġ", "Ġa", "ĠĠa", "a", "b", "ab")),
    "symbols": lambda: SymbolVocabulary(["a", "b", "ab", " "], " "),
    "characters": lambda: SymbolVocabulary(["a", "b", " "]),
    "bytes": lambda: vocabularies.ByteVocabulary(0),
}


def short_ids(spelled: token_bytes.TokenBytes) -> list[int]:
    """Ids that write a, b and spaces alone."""
    return [token for token, text in spelled.by_id.items() if re.fullmatch(b"[ ab]+", text)]


def accepts(table: constraints.ConstraintTable, ids: tuple[int, ...], stop: int) -> bool:
    state = int(table.start)
    for token in (*ids, stop):
        state = int(table.following[state, table.classes[token]])
        if state < 0:
            return False
    return True


@pytest.mark.parametrize("kind", MAKERS)
def test_ids_are_accepted_if_their_text_matches(kind):
    vocabulary = MAKERS[kind]()
    spelled = token_bytes.token_bytes(vocabulary)
    ids = short_ids(spelled)
    assert len(ids) >= 3
    draw = np.random.default_rng(0)
    sequences = [ids_ for length in range(3) for ids_ in itertools.product(ids, repeat=length)]
    sequences += [tuple(draw.choice(ids, 5).tolist()) for _ in range(200)]
    texts = [vocabulary.decode([*each]) for each in sequences]
    for pattern in PATTERNS:
        matches = [re.fullmatch(pattern, text) is not None for text in texts]
        if not any(matches):
            continue
        table = constraints.compile_table(
            patterns.Constraint(pattern), spelled, vocabulary.stops, vocabulary.size
        )
        accepted = [accepts(table, each, vocabulary.stops[0]) for each in sequences]
        assert [*zip(sequences, accepted, strict=True)] == [*zip(sequences, matches, strict=True)]


@pytest.mark.parametrize(
    "decoder",
    [
        sequence(REPLACE, BYTES, STRIP, FUSE),
        sequence(REPLACE, BYTES, FUSE, STRIP | {"stop": 1}),
        sequence(REPLACE | {"pattern": {"Regex": "a+"}}, FUSE),
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "BPEDecoder", "suffix": "</w>"},
    ],
    ids=["strip", "end", "regex", "wordpiece", "bpe"],
)
def test_decoders_that_do_not_say_what_a_token_writes_are_refused(decoder):
    with pytest.raises(ValueError, match="decoding cannot be constrained"):
        token_bytes.token_bytes(tokenizer_json(decoder))


@pytest.mark.parametrize(
    "field, wrong, right",
    [
        ("regex", "(a", "a"),
        ("json_schema", '{"type": "strin"}', '{"type": "string"}'),
        ("json_schema", "{", "{}"),
        ("grammar", "start: (", 'start: "a"'),
        ("grammar", "root ::= (", 'root ::= "a"'),
    ],
)
def test_a_mistake_in_a_constraint_is_reported_before_what_the_vocabulary_lacks(
    field, wrong, right
):
    numbers = IntegerVocabulary(10)
    for text, words in ((wrong, f"Decode.{field}"), (right, "cannot be constrained")):
        with pytest.raises(ValueError, match=words):
            constraints.find_constraint(config.Decode(**{field: text}), numbers, 10)


@pytest.mark.parametrize(
    "field, text, words",
    [
        ("grammar", "root ::= root", "allows no text at all"),
        ("grammar", 'start: "a" start', "allows no text at all"),
        ("regex", "[^\\x00-\\U0010ffff]", "allows no text at all"),
        ("regex", "\\ud83d", "has half of a surrogate pair"),
        ("grammar", 'root ::= "\\ud83d"', "has half of a surrogate pair"),
        ("json_schema", '{"const": "\\ud83d"}', "has half of a surrogate pair"),
        ("regex", "z", "can be spelled with the tokens"),
        ("regex", "(" * 5000 + ")" * 5000, "nests its groups too deeply"),
    ],
)
def test_a_message_says_if_a_constraint_or_the_vocabulary_lacks_a_text(field, text, words):
    letters = SymbolVocabulary(["a", "b"])
    with pytest.raises(ValueError, match=rf"Decode.{field} .*{words}"):
        constraints.find_constraint(config.Decode(**{field: text}), letters, letters.size)
