# SPDX-License-Identifier: Apache-2.0
"""Laws of stop strings: a text ends with the token that completes one, as transformers' criterion
says, with any drafter; what is shown is the text before it, and nothing more on the way."""

import itertools
import re

import numpy as np
import pytest
import torch
import transformers
from conftest import mark_exhaustive
from test_constraint_vocabularies import MAKERS, short_ids, tokenizer_json
from test_constraints import DRAFTERS, EOS, EXAMPLES, toy
from test_decoding_loop import lively, use_one_device

from t5x_lite import config, decoding
from t5x_lite.decoding import generation, streaming
from t5x_lite.decoding.steering import stop_strings
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.evaluation.streaming import stream_text
from t5x_lite.tokenizers import token_bytes, vocabularies

BYTES = vocabularies.ByteVocabulary(0)


@pytest.mark.parametrize("kind", ["sentencepiece", "llama", "metaspace", "symbols", "bytes"])
def test_a_stop_is_reached_when_the_text_has_it(kind):
    vocabulary = MAKERS[kind]()
    ids = short_ids(token_bytes.token_bytes(vocabulary))
    for stops in (("a b",), (" a", "bb"), ("b",)):
        decode = config.Decode(stop=stops)
        table = stop_strings.find_stops(decode, vocabulary, vocabulary.size)
        for sequence in itertools.product(ids[:12], repeat=3):
            state = int(table.start)
            for token in sequence:
                state = int(table.following[state, table.classes[token]])
            text = vocabulary.decode([*sequence])
            assert (state == table.last) == any(stop in text for stop in stops), (sequence, text)


def test_a_stop_is_where_transformers_stops():
    names = ("a", "b", "ab", "▁a", "▁", "b▁b")
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    vocabulary = tokenizer_json(
        {"type": "Sequence", "decoders": [replace, {"type": "Fuse"}]}, (*names, *"cdef")
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary.tokenizer)
    table = stop_strings.find_stops(config.Decode(stop=("ab", "b b")), vocabulary, vocabulary.size)
    criterion = transformers.StopStringCriteria(tokenizer, ["ab", "b b"])
    ids = [vocabulary.token(name) for name in names]
    for sequence in itertools.product(ids, repeat=3):
        states = [int(table.start)]
        for token in sequence:
            states.append(int(table.following[states[-1], table.classes[token]]))
        if states[2] != table.last:  # transformers asks whether the last token completes one
            theirs = bool(criterion(torch.tensor([sequence]), torch.zeros(1, 1)))
            assert (states[3] == table.last) == theirs, vocabulary.decode([*sequence])


def tokens_of(kind, decode, drafting=generation.PLAIN):
    use_one_device()
    cfg, params = toy(kind)
    stop = stop_strings.find_stops(decode, BYTES, cfg.vocab)
    request = decoding.make_request(cfg, EXAMPLES, decode, eos=EOS, stop=stop)
    return generation.generate(cfg, params, request, decode, drafting), (cfg, params, request)


def bytes_of(ids) -> bytes:
    """Bytes of the text of ids; special ones have none."""
    return bytes(token - 3 for token in ids if 3 <= token < 259)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", mark_exhaustive(["encoder_decoder", "decoder_only"], kept=["decoder_only"])
)
def test_drafts_and_streams_stop_where_the_plain_text_has_a_stop(kind):
    options = dict(max_new_tokens=24, temperature=1.0, top_k=4)
    free, _ = tokens_of(kind, config.Decode(**options))
    texts = [bytes_of(row[0]) for row in free.tokens]
    # Two letters that follow each other in a text, and one of another text.
    pairs = re.findall(rb"[ -~]{2}", b"\0".join(texts[:2]))
    letters = re.findall(rb"[ -~]", texts[3])
    stops = tuple(each.decode() for each in (*pairs[:1], *letters[3:4]))
    assert stops
    decode = config.Decode(**options, stop=stops)
    plain, setup = tokens_of(kind, decode)
    for row in range(len(EXAMPLES)):
        ids = free.tokens[row, 0, : free.lengths[row, 0]].tolist()
        written = [bytes_of(ids[: n + 1]) for n in range(len(ids))]
        ends = [n for n, text in enumerate(written) if any(stop.encode() in text for stop in stops)]
        expected = ids[: ends[0] + 1] if ends else ids
        assert plain.tokens[row, 0, : plain.lengths[row, 0]].tolist() == expected
    for drafter in DRAFTERS.values():
        drafted, _ = tokens_of(kind, decode, decoding.Drafting(drafter))
        np.testing.assert_array_equal(drafted.tokens, plain.tokens)
        np.testing.assert_array_equal(drafted.lengths, plain.lengths)
    cfg, params, request = setup
    drafting = decoding.Drafting(DRAFTERS["lookup"])
    *_, last = streaming.stream(cfg, params, request, decode, drafting, every=3)
    np.testing.assert_array_equal(last.tokens, plain.tokens)


@pytest.mark.slow
def test_what_is_shown_is_the_text_before_the_stop():
    use_one_device()
    cfg, _ = toy("decoder_only")
    predictor = Predictor(cfg, lively(cfg), (BYTES, BYTES))
    options = dict(max_new_tokens=24, temperature=1.0, drafter="plain")
    (free,) = predictor.predict(["abc"], config.Decode(**options))
    text = free.texts[0]
    ascii_ = [n for n in range(2, len(text) - 1) if text[n : n + 2].isascii()]
    assert ascii_
    stop = text[ascii_[0] : ascii_[0] + 2]
    decode = config.Decode(**options, stop=(stop, "never there"))
    (stopped,) = predictor.predict(["abc"], decode)
    assert stopped.texts[0] == text[: text.index(stop)]
    assert len(stopped.tokens[0]) < len(free.tokens[0])
    several = predictor.predict(["abc"], config.Decode(**options, n_best=3, stop=decode.stop))
    assert several[0].texts[0] == stopped.texts[0]
    assert all(stop not in each for each in several[0].texts)
    pieces = [piece.text for piece in stream_text(predictor, "abc", decode, every=1)]
    assert "".join(pieces) == stopped.texts[0]


def test_nothing_is_shown_that_a_stop_may_take_back():
    draw = np.random.default_rng(0)
    stops = ("aab", "ba", "bbb")
    for _ in range(300):
        text = "".join(draw.choice([*"abc"], 12))
        final = stop_strings.cut_text(text, stops)
        for size in range(len(text) + 1):
            assert final.startswith(stop_strings.settled_text(text[:size], stops))


def test_stops_that_cannot_be_followed_are_refused():
    for options, message in (
        ({"stop": ("",)}, "Decode.stop has an empty one"),
        ({"stop": ("a",), "beams": 2}, "beam search"),
        ({"stop": ("a",), "regex": "a+"}, "may cut a text that Decode.regex needs whole"),
    ):
        with pytest.raises(ValueError, match=message):
            config.Decode(**options)
