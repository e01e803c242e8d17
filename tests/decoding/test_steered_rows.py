# SPDX-License-Identifier: Apache-2.0
"""Laws of what each row has for itself: spans of its input, a healed prompt, the beginning of its
target; and of words that no text contains."""

import dataclasses
import functools
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mark_exhaustive
from test_constraint_vocabularies import MAKERS, short_ids
from test_constraints import DRAFTERS, EOS, toy
from test_decoding_loop import lively, use_one_device

from t5x_lite import config, decoding
from t5x_lite.decoding import generation
from t5x_lite.decoding.protocol import chain
from t5x_lite.decoding.steering import constraints, patterns, processor, spans
from t5x_lite.evaluation import predict, streaming
from t5x_lite.evaluation.steered_rows import SteeredRows
from t5x_lite.tokenizers import token_bytes, vocabularies
from t5x_lite.tokenizers.symbols import SymbolVocabulary


def allowed_after(rules, prefix: tuple[int, ...], split: int, vocab: int) -> set[int]:
    """Ids that a processor of one row allows after some tokens and the rest as drafts.

    Args:
      rules: the processor.
      prefix: the tokens.
      split: how many of them are text; the others are drafts.
      vocab: number of ids.
    """
    with jax.set_mesh(None):
        one = np.ones(1, np.int32)
        text = processor.Text(np.zeros((1, 9), np.int32), one, one)
        state = rules.begin(text, vocab)
        if split:
            state = rules.observe(state, jnp.array([prefix[:split]]), one * split)
        drafts = prefix[split:]
        tree = chain(1 + len(drafts))
        paths = processor.draft_paths(tree.paths, tree.depth, jnp.array([[0, *drafts]]))
        logits = rules.process(state, text, paths, jnp.zeros((1, tree.width, vocab)))
        return set(np.flatnonzero(np.isfinite(logits[0, -1])).tolist())


def check_allowed(rules, language: set[tuple[int, ...]], longest: int, vocab: int) -> None:
    """Checks the tokens after every beginning of a language, as text and as drafts.

    Args:
      rules: the processor.
      language: sequences of ids.
      longest: most ids of a sequence.
      vocab: number of ids.
    """
    for length in range(longest):
        prefixes = sorted({ids[:length] for ids in language if len(ids) > length})
        for prefix in prefixes[:12]:
            expected = {
                ids[length] for ids in language if ids[:length] == prefix and len(ids) > length
            }
            for split in {0, length}:
                assert allowed_after(rules, prefix, split, vocab) == expected, prefix


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sentencepiece", "llama", "byte level", "symbols", "suffix"])
def test_spans_are_the_parts_of_the_input_that_tokens_write(kind):
    vocabulary = MAKERS[kind]()
    spelled, content, budget = token_bytes.token_bytes(vocabulary), "ab a  ba", 3
    few = short_ids(spelled)
    few = {*few[:: max(len(few) // 8, 1)], *few[:3]}
    spelled = spelled._replace(
        by_id={token: text for token, text in spelled.by_id.items() if token in few}
    )
    (stop,) = vocabulary.stops
    language = {
        (*ids, stop)
        for length in range(1, budget)
        for ids in itertools.product(sorted(few), repeat=length)
        if (text := vocabulary.decode([*ids])) in content and (text or spelled.drops_again)
    }
    language = {ids for ids in language if vocabulary.decode([*ids])}
    rows = spans.list_row_spans([content], spelled, vocabulary.size, budget)
    rules = spans.InputSpans(spans.stack_spans(rows), np.array([budget]), np.array([stop]))
    check_allowed(rules, language, budget, vocabulary.size)


def test_characters_of_a_span_are_whole_within_the_limit():
    vocabulary = vocabularies.ByteVocabulary(0)
    spelled = token_bytes.token_bytes(vocabulary)
    rows = spans.list_row_spans(["aé€"], spelled, vocabulary.size, 4)
    rules = spans.InputSpans(spans.stack_spans(rows), np.array([4]), np.array([EOS]))
    texts = ("a", "é", "€", "aé")
    language = {(*vocabulary.encode(text), EOS) for text in texts}
    check_allowed(rules, language, 4, vocabulary.size)
    with pytest.raises(ValueError, match="No part of input 1 can be written within .* [(]3[)]"):
        spans.list_row_spans(["a", "€"], spelled, vocabulary.size, 3)
    with pytest.raises(ValueError, match="No part of input 0"):
        spans.list_row_spans([""], spelled, vocabulary.size, 3)


@pytest.mark.parametrize("kind", ["sentencepiece", "llama", "byte level"])
def test_a_healed_token_is_written_again_by_tokens_of_its_text(kind):
    """After it any token may follow; before, those that write its bytes and no others."""
    vocabulary = MAKERS[kind]()
    spelled = token_bytes.token_bytes(vocabulary)
    ids = short_ids(spelled)
    cut = max(ids, key=lambda token: len(spelled.by_id[token]))
    text = spelled.by_id[cut]
    table, start = constraints.compile_healing([cut, None], vocabulary, vocabulary.size)
    size = vocabulary.size
    rules = constraints.make_automaton(table, np.array([5]), start[:1])
    free = constraints.make_automaton(table, np.array([1]), start[1:])
    assert allowed_after(free, (), 0, size) == {*range(size)}

    def fits(token, left):
        written = spelled.by_id.get(token, b"")
        return bool(written) and (written.startswith(left) or left.startswith(written))

    prefixes = [(), *((token,) for token in ids), *itertools.product(ids[:6], repeat=2)]
    for prefix in prefixes:
        left, allowed = text, True
        for token in prefix:
            allowed = allowed and (not left or fits(token, left))
            left = left[len(spelled.by_id[token]) :]
        if allowed:
            expected = {token for token in range(size) if not left or fits(token, left)}
            assert allowed_after(rules, prefix, len(prefix) // 2, size) == expected


@pytest.mark.parametrize("kind", MAKERS)
def test_bad_words_are_in_no_text_whatever_its_tokens(kind):
    vocabulary = MAKERS[kind]()
    spelled = token_bytes.token_bytes(vocabulary)
    ids = short_ids(spelled)[:12]
    words = ("ab", " b")
    table = constraints.compile_table(
        patterns.Constraint(bad_words=words), spelled, vocabulary.stops, vocabulary.size
    )
    assert table.shortest == 1
    for sequence in itertools.product(ids, repeat=3):
        state, good = int(table.start), True
        for token in sequence:
            state = int(table.following[state, table.classes[token]]) if state >= 0 else -1
        text = vocabulary.decode([*sequence])
        good = not any(word in text for word in words)
        assert (state >= 0) == good, (sequence, text)


def test_tokens_that_write_nothing_may_stand_beside_bad_words():
    vocabulary = vocabularies.ByteVocabulary(0)
    table = constraints.find_constraint(config.Decode(bad_words=("ab",)), vocabulary, 300)
    rules = constraints.make_automaton(table, np.array([3]))
    a, b = vocabulary.encode("ab")
    assert allowed_after(rules, (), 0, 300) == {*range(300)}
    assert allowed_after(rules, (a,), 1, 300) == {*range(300)} - {b}
    assert allowed_after(rules, (a, 299), 1, 300) == {*range(300)} - {b}


INPUTS = ["the cat sat", "größer", "ab" * 20, "x"]


@functools.cache
def predictor_of(kind: str) -> predict.Predictor:
    use_one_device()
    return make_predictor(kind, vocabularies.ByteVocabulary(0))


def make_predictor(kind: str, vocabulary) -> predict.Predictor:
    cfg, _ = toy(kind)
    both = vocabulary, vocabulary
    return predict.Predictor(cfg, lively(cfg), both, ended=False, batch_size=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "n_best": 2}, {"beams": 3}], ids=["best", "drawn", "beams"]
)
@pytest.mark.parametrize(
    "kind", mark_exhaustive(["encoder_decoder", "decoder_only"], kept=["encoder_decoder"])
)
def test_every_text_is_a_span_of_its_input(kind, options):
    use_one_device()
    decode = config.Decode(max_new_tokens=9, span_of_input=True, drafter="plain", **options)
    for content, each in zip(INPUTS, predictor_of(kind).predict(INPUTS, decode), strict=True):
        assert each.texts
        for text in each.texts:
            assert text and text in content


OPTIONS = {
    "span": {"span_of_input": True, "temperature": 1.0},
    "healing": {"token_healing": True, "temperature": 1.0},
    "grammar": {"grammar": 'root ::= "(" root ")" | [a-f]+', "bad_words": ("ab",)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_drafts_and_other_rows_change_no_token(name):
    use_one_device()
    predictor = predictor_of("decoder_only")
    decode = config.Decode(max_new_tokens=24, **OPTIONS[name])
    ids = predictor.encode_inputs(INPUTS)
    steered = SteeredRows(predictor.cfg, (predictor.inputs, predictor.targets), ids, decode)
    request = steered.request(range(len(ids)), len(ids))
    arguments = predictor.cfg, predictor.params, request, decode
    plain = generation.generate(*arguments).tokens
    drafted = generation.generate(*arguments, decoding.Drafting(DRAFTERS["recycling"])).tokens
    np.testing.assert_array_equal(drafted, plain)
    alone = steered.request([1], 1, rows=[1])
    alone = generation.generate(predictor.cfg, predictor.params, alone, decode).tokens
    np.testing.assert_array_equal(alone[0], plain[1])


def test_a_healed_text_goes_on_from_the_whole_prompt():
    """Symbols "a", "b", "ab": the prompt "xa" ends with what "ab" begins with."""
    use_one_device()
    vocabulary = SymbolVocabulary(["a", "b", "ab", "abb", "x", "ba"])
    predictor = make_predictor("decoder_only", vocabulary)
    decode = config.Decode(max_new_tokens=6, temperature=1.0, n_best=8, token_healing=True)
    (ids,) = predictor.encode_inputs(["xa"])
    first = set()
    for seed in range(4):
        (each,) = predictor.predict_ids([ids], dataclasses.replace(decode, seed=seed))
        for text, tokens in zip(each.texts, each.tokens, strict=True):
            first.add(vocabulary.decode(tokens[:1]))
            assert vocabulary.decode(tokens) == "a" + text
    assert first == {"a", "ab", "abb"}


@pytest.mark.slow
def test_targets_begin_with_their_prefixes():
    """A text that begins as the model's own goes on as it does, whatever the other rows have."""
    use_one_device()
    predictor = predictor_of("encoder_decoder")
    letters = {*predictor.targets.encode("abcdefghijklmnopqrstuvwxyz"), EOS}
    decode = config.Decode(
        max_new_tokens=12, drafter="plain", suppress_tokens=tuple({*range(300)} - letters)
    )
    whole = predictor.predict(INPUTS, decode)
    prefixes = *(each.texts[0][:3] for each in whole[:-1]), ""
    assert prefixes[0] and len({*prefixes}) > 2
    decode = dataclasses.replace(decode, target_prefix=prefixes)
    for text, prefix, each in zip(
        [each.texts[0] for each in whole], prefixes, predictor.predict(INPUTS, decode), strict=True
    ):
        assert each.texts[0].startswith(prefix) and each.texts[0].startswith(text)
        assert predictor.targets.decode(each.tokens[0]) == each.texts[0][len(prefix) :]
    one = config.Decode(max_new_tokens=9, target_prefix=("Hé",), drafter="lookup", draft_length=4)
    for each in predictor.predict(INPUTS, one):
        assert each.texts[0].startswith("Hé")
    pieces = [*streaming.stream_text(predictor, INPUTS[0], one)]
    assert "".join(piece.text for piece in pieces) == predictor.predict(INPUTS[:1], one)[0].texts[0]


def test_what_cannot_hold_for_a_row_is_refused():
    use_one_device()
    both = {kind: predictor_of(kind) for kind in ("encoder_decoder", "decoder_only")}

    def refused(message, kind="encoder_decoder", texts=INPUTS, **options):
        with pytest.raises(ValueError, match=message):
            both[kind].predict(texts, config.Decode(**options))

    refused("write it at the end of a decoder-only", "decoder_only", target_prefix=("a",))
    refused("has 2 texts for 4 inputs: write one for all", target_prefix=("a", "b"))
    refused("heals the end of a prompt", token_healing=True)
    refused("No part of input 1 can be", texts=["a", "é"], span_of_input=True, max_new_tokens=2)
    refused("shortest text .* has 4 tokens", grammar='root ::= "aaa"', max_new_tokens=3)
    refused("Decode.grammar line 1", grammar="root ::= (")
    refused("with Decode.bad_words allows no text at all", regex="a+", bad_words=("a",))
    refused("bad_words has an empty one", bad_words=("",))
    refused("stop has an empty one", stop=("",))
    refused("Decode.span_of_input goes with no other rule", span_of_input=True, bad_words=("a",))
    refused("Decode.regex and Decode.span_of_input, not both", span_of_input=True, regex="a")
    refused(
        "may forbid every text that Decode.token_healing", token_healing=True, suppress_tokens=(5,)
    )
    refused("cut a text that Decode.token_healing", token_healing=True, stop=("a",))  # fmt: skip


@pytest.mark.slow
def test_the_sampled_law_is_the_renormalized_one_of_the_model():
    """Frequencies of 600 draws against the model's own probabilities, by all continuations."""
    use_one_device()
    predictor = predictor_of("encoder_decoder")
    grammar = 'root ::= "a" [bc] | "b" root? | "c"'
    decode = config.Decode(
        max_new_tokens=4, temperature=1.0, n_best=600, grammar=grammar, nesting=2, logprobs=300
    )
    (each,) = predictor.predict(INPUTS[:1], decode)
    spell = predictor.targets.encode
    texts = ("ab", "ac", "b", "bab", "bac", "bb", "bbb", "bbc", "bc", "c")
    language = {(*spell(text), EOS) for text in texts}
    model = {
        tuple(tokens[:place]): {token: np.exp(value) for token, _, value in details[place].top}
        for tokens, details in zip(each.tokens, each.details, strict=True)
        for place in range(len(tokens))
    }
    counts = Counter(map(tuple, each.tokens))
    assert {*counts} <= language and len(counts) > 5
    distance = 0.0
    for ids in counts:
        expected = float(len(each.tokens))
        for place, token in enumerate(ids):
            allowed = {other[place] for other in language if other[:place] == ids[:place]}
            law = model[ids[:place]]
            expected *= law[token] / sum(law[each] for each in allowed)
        distance += (counts[ids] - expected) ** 2 / expected
    assert distance < 27.9  # of chi-squared with 9 degrees of freedom: once in 1,000
