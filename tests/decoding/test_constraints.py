# SPDX-License-Identifier: Apache-2.0
"""Laws of constrained decoding: allowed tokens by enumeration of a language, texts by parsers that
are not ours, and the same tokens by every way of decoding."""

import functools
import io
import itertools
import json
import re
import tracemalloc

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from conftest import mark_exhaustive
from decoding_laws import KINDS
from test_decoding_loop import lively, use_one_device

from t5x_lite import config, decoding
from t5x_lite.decoding import generation, streaming
from t5x_lite.decoding.drafters import lookup, recycling
from t5x_lite.decoding.protocol import chain
from t5x_lite.decoding.steering import (
    constraints,
    machine,
    patterns,
    processor,
    regex_syntax,
)
from t5x_lite.tokenizers import token_bytes, vocabularies

EOS, VOCAB = 1, 8
IDS = {2: b"a", 3: b"b", 4: b"ab", 5: b"ba", 6: b"c"}
PATTERNS = ("(ab|c)*b?", "a{2,5}", "(a|ba)c", "c?", r"a+(c[ab]+)?")


@functools.cache
def table_of(pattern: str) -> constraints.ConstraintTable:
    spelled = token_bytes.TokenBytes(IDS)
    return constraints.compile_table(patterns.Constraint(pattern), spelled, (EOS,), VOCAB)


@functools.cache
def sentences(pattern: str, budget: int) -> set[tuple[int, ...]]:
    """All sequences of at most `budget` ids, the end included, whose text matches."""
    texts = set()
    for length in range(budget):
        for ids in itertools.product(IDS, repeat=length):
            if re.fullmatch(pattern, b"".join(map(IDS.get, ids)).decode()):
                texts.add((*ids, EOS))
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_allowed_tokens_are_those_that_some_text_goes_on_with(pattern):
    budget = 5
    language = sentences(pattern, budget)
    for length in range(budget):
        prefixes = sorted({ids[:length] for ids in language if len(ids) > length})
        for prefix in prefixes[:40]:
            expected = {ids[length] for ids in language if ids[:length] == prefix}
            for split in {0, length // 2, length}:  # tokens of the text, then drafts
                assert allowed_after(pattern, prefix, split, budget) == expected


def allowed_after(pattern, prefix, split, budget):
    """Ids that are allowed after `split` tokens of a text and the rest as drafts.

    Args:
      pattern: regular expression.
      prefix: ids of the text so far.
      split: how many of them are committed.
      budget: most new tokens.
    """
    with jax.set_mesh(None):
        rules = constraints.make_automaton(table_of(pattern), np.array([budget]))
        one = np.ones(1, np.int32)
        text = processor.Text(np.zeros((1, 9), np.int32), one, one)
        state = rules.begin(text, VOCAB)
        if split:
            state = rules.observe(state, jnp.array([prefix[:split]]), one * split)
        drafts = prefix[split:]
        tree = chain(1 + len(drafts))
        block = jnp.array([[0, *drafts]])
        paths = processor.draft_paths(tree.paths, tree.depth, block)
        logits = rules.process(state, text, paths, jnp.zeros((1, tree.width, VOCAB)))
        return set(np.flatnonzero(np.isfinite(logits[0, -1])).tolist())


def test_unspellable_languages_and_what_is_not_an_expression_are_refused():
    with pytest.raises(ValueError, match=r"No text of Decode.regex can be spelled"):
        table_of("d+")
    bytes_ = vocabularies.ByteVocabulary(0)

    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            constraints.find_constraint(config.Decode(**options), bytes_, 384)

    refused("Decode.json_schema is not JSON", json_schema="{")
    refused("has the type 'nothing'", json_schema='{"type": "nothing"}')
    refused("Decode.json_schema allows nothing", json_schema={"enum": []})
    refused("is not JSON", json_schema=100_000 * "[")
    refused("Decode.json_schema: it is not JSON", json_schema={"const": float("nan")})
    refused("repeats parts to 1,000,000 states", regex="(a{1000}){1000}")
    refused("needs more than 100,000 states", regex="(a|b)*a(a|b){17}")
    refused("shortest text of Decode.regex has 9 tokens", regex="a{8}", max_new_tokens=8)
    refused("with Decode.force_words allows no text at all", regex="a*", force_words=("b",))
    with pytest.raises(ValueError, match="can follow one of Decode.regex and Decode.choices"):
        config.Decode(regex="a", choices=("b",))
    with pytest.raises(ValueError, match=r"min_new_tokens may forbid .* Decode.regex allows"):
        config.Decode(regex="a", min_new_tokens=3)


def test_ids_that_the_model_lacks_are_refused():
    use_one_device()
    cfg, _ = toy("decoder_only")
    for options in (
        {"forced_bos_token_id": 300},
        {"suppress_tokens": (5, 300)},
        {"bad_words_ids": ((1, 300),)},
        {"logit_bias": {300: 1.0}},
    ):
        with pytest.raises(ValueError, match=rf"Decode.{[*options][0]} has id 300"):
            decoding.make_request(cfg, [[3]], config.Decode(**options))
    with pytest.raises(ValueError, match="forced_bos_token_id .5. is also among"):
        config.Decode(forced_bos_token_id=5, bad_words_ids=((5,),))
    with pytest.raises(ValueError, match="forbids every id of the model"):
        decoding.make_request(cfg, [[3]], config.Decode(suppress_tokens=tuple(range(cfg.vocab))))
    forced = config.Decode(forced_bos_token_id=EOS, min_new_tokens=2)
    with pytest.raises(ValueError, match="forced_bos_token_id 1 ends a text"):
        decoding.make_request(cfg, [[3]], forced, eos=EOS)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "n": {"type": "integer"},
        "kind": {"enum": ["x", "y"]},
    },
    "required": ["name", "n", "kind"],
}
DECODES = {
    "schema": dict(json_schema=SCHEMA),
    "regex": dict(regex="[a-f]+(, [a-f]{2,4})*!"),
    "grammar": dict(grammar='root ::= "(" root* ")" | [a-f]{2}'),
    "choices": dict(choices=("yes", "no", "d'accord", "größer")),
}
EXAMPLES = ((5, 9, 33), (7,), (60, 2, 2, 8, 14, 31, 9), (40,) * 5)
DRAFTERS = {"lookup": lookup.Lookup(chain(4)), "recycling": recycling.Recycling()}


@functools.cache
def toy(kind: str):
    """A model of bytes with weights that say nothing."""
    cfg = KINDS[kind].__class__(**{**vars(KINDS[kind]), "vocab": 300})
    return cfg, decoding.prepare_params(cfg, lively(cfg))


def request_of(kind, name, **options):
    use_one_device()
    cfg, params = toy(kind)
    vocabulary = vocabularies.ByteVocabulary(0)
    decode = config.Decode(max_new_tokens=60, **DECODES[name], **options)
    constraint = constraints.find_constraint(decode, vocabulary, cfg.vocab)
    request = decoding.make_request(cfg, EXAMPLES, decode, eos=EOS, constraint=constraint)
    return cfg, params, request, decode, vocabulary


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"beams": 3}], ids=str)
@pytest.mark.parametrize("name", DECODES)
def test_every_text_is_in_the_language(name, options):
    *arguments, vocabulary = request_of("encoder_decoder", name, **options)
    for ids in generation.generate(*arguments).tokens[:, 0]:
        assert EOS in ids.tolist()
        check_text(name, vocabulary.decode(ids.tolist()))


def check_text(name: str, text: str) -> None:
    """Checks a text by a parser that is not ours."""
    if name == "schema":
        jsonschema.validate(json.loads(text), SCHEMA)
    elif name == "grammar":
        lark = pytest.importorskip("lark")
        lark.Lark('start: "(" start* ")" | /[a-f]{2}/').parse(text)
    elif name == "regex":
        assert re.fullmatch(DECODES["regex"]["regex"], text)
    else:
        assert text in DECODES["choices"]["choices"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, kind, temperature",
    mark_exhaustive(
        [
            (name, kind, temperature)
            for name, kind in (("schema", "decoder_only"), ("regex", "encoder_decoder"))
            for temperature in (0.0, 1.0)
        ],
        kept=[("schema", "decoder_only", 1.0), ("regex", "encoder_decoder", 0.0)],
    ),
)
def test_drafts_and_streams_change_no_token(name, kind, temperature):
    *arguments, _ = request_of(kind, name, temperature=temperature)
    plain = generation.generate(*arguments).tokens
    for drafter in DRAFTERS.values():
        drafted = generation.generate(*arguments, decoding.Drafting(drafter)).tokens
        np.testing.assert_array_equal(drafted, plain)
    *_, last = streaming.stream(*arguments, decoding.Drafting(DRAFTERS["lookup"]), every=3)
    np.testing.assert_array_equal(last.tokens, plain)


def test_a_table_is_kept_and_one_that_is_damaged_is_made_again(monkeypatch, tmp_path):
    monkeypatch.setattr(constraints, "FOLDER", str(tmp_path))
    vocabulary = vocabularies.ByteVocabulary(0)
    decode = config.Decode(regex="[ab]{3}")
    first = constraints.find_constraint(decode, vocabulary, 300)
    (path,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(constraints, "compile_table", None)
        again = constraints.find_constraint(decode, vocabulary, 300)
    other_arrays = io.BytesIO()
    np.savez(other_arrays, **(first._asdict() | {"classes": first.classes + 1000}))
    for content in (b"", path.read_bytes()[:100], other_arrays.getvalue()):
        path.write_bytes(content)
        after = constraints.find_constraint(decode, vocabulary, 300)
        for one, other, third in zip(first, again, after, strict=True):
            np.testing.assert_array_equal(one, other)
            np.testing.assert_array_equal(one, third)


def test_a_set_of_all_characters_takes_little_memory():
    def peak(pattern):
        expression = regex_syntax.parse_regex(pattern, "the pattern")
        tracemalloc.start()
        machine.compile_expression(expression, "the pattern")
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    # As many states, each with one or with 255 bytes after it.
    assert peak("(?s)[\\x01-\\x7f]{1000}") < 1.5 * peak("a{1000}")
