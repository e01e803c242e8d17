# SPDX-License-Identifier: Apache-2.0
"""Laws of the engine: a text is that of the request alone, and what ends leaves no trace."""

import dataclasses
import functools
import itertools
import random
import threading
import time

import jax
import numpy as np
import pytest
from conftest import toy_model
from test_decoding_loop import lively, use_one_device

from t5x_lite import config, sharding
from t5x_lite.decoding import pool
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.evaluation.streaming import stream_text
from t5x_lite.serving.completion import (
    Completion,
    CompletionChunk,
    EngineClosedError,
    QueueFullError,
    TextRequest,
)
from t5x_lite.serving.engine import Engine
from t5x_lite.serving.limits import EngineLimits
from t5x_lite.tokenizers.vocabularies import ByteVocabulary

LIMITS = EngineLimits(rows=4, max_inputs=32, max_new_tokens=32, block=3)
LONGEST = 24
PROMPTS = ["", "the cat sat", "größer", "ab" * 12, "x", "one more", "zz top", "ab" * 16]
PLAIN = config.Decode(max_new_tokens=LONGEST, drafter="plain")
SAMPLED = dataclasses.replace(PLAIN, temperature=0.8, seed=3)
# Settings that share rows: what is an array by row.
MIXED = (
    PLAIN,
    dataclasses.replace(PLAIN, max_new_tokens=1),
    SAMPLED,
    dataclasses.replace(SAMPLED, seed=4, top_k=9, max_new_tokens=9),
    dataclasses.replace(SAMPLED, top_p=0.7, temperature=1.3),
    dataclasses.replace(SAMPLED, min_p=0.05, eta_cutoff=1e-3, dynatemp_range=0.3),
)
# Settings with rows of their own.
APART = {
    "rules": dict(
        logprobs=2,
        repetition_penalty=1.4,
        frequency_penalty=0.5,
        logit_bias={70: 3.0},
        suppress_tokens=(5, 6),
        min_new_tokens=5,
        no_repeat_ngram_size=2,
    ),
    "constraint": dict(regex="[a-f]{2,9}", temperature=1.0, typical_p=0.6),
    "quantized cache": dict(kv_cache="int8:int4", temperature=0.8, seed=3),
}
# Those that take less, in time to compile, come first.
DRAFTERS = ("lookup", "lookup+recycling", "jacobi", "lookahead", "recycling")


def predictor_of(layout: str) -> Predictor:
    """The predictor of a layout, on one device, whatever mesh another test has left."""
    use_one_device()
    return make_predictor(layout)


@functools.cache
def make_predictor(layout: str) -> Predictor:
    cfg = toy_model(layout, positions="relative", layers=1, vocab=300)
    vocabulary = ByteVocabulary(0)
    return Predictor(cfg, lively(cfg), (vocabulary, vocabulary), ended=False, batch_size=4)


@functools.cache
def texts_alone(layout: str, decode: config.Decode) -> dict:
    """The text of each prompt without an engine; each is the first row for sampling."""
    predictor, prompts = predictor_of(layout), PROMPTS[layout == "encoder_decoder" :]
    use_one_device()
    return dict(
        zip(prompts, predictor.predict(prompts, decode, rows=[0] * len(prompts)), strict=True)
    )


def write_all(predictor: Predictor, requests, limits=LIMITS) -> list[CompletionChunk]:
    """The whole text of each request, all of them in one engine.

    Args:
      predictor: the model.
      requests: the requests.
      limits: sizes of the engine.
    """
    serving = Engine(predictor, limits)
    try:
        completions = [serving.submit(request) for request in requests]
        return [completion.result() for completion in completions]
    finally:
        serving.close()
        assert serving.gauges().rows_used == serving.gauges().queued == 0


def assert_alone(chunk: CompletionChunk, layout: str, request: TextRequest) -> None:
    """Checks a text against the first tokens of the same request of LONGEST tokens.

    Args:
      chunk: the whole text.
      layout: of the model.
      request: the request.
    """
    size, targets = request.decode.max_new_tokens, make_predictor(layout).targets
    longer = dataclasses.replace(request.decode, max_new_tokens=LONGEST)
    expected = texts_alone(layout, longer)[request.prompt].tokens[0][:size]
    assert chunk.tokens == expected
    assert chunk.text == targets.decode(expected)
    assert chunk.finish_reason == ("stop" if expected[-1] in targets.stops else "length")


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
def test_a_text_is_that_of_the_request_alone(layout):
    """Other prompts, lengths and settings, in any order: more texts than rows."""
    pairs = itertools.product(texts_alone(layout, PLAIN), MIXED)
    requests = [TextRequest(*pair) for pair in pairs]
    random.Random(0).shuffle(requests)
    chunks = write_all(predictor_of(layout), requests)
    again = write_all(predictor_of(layout), requests[::-1])[::-1]
    for request, chunk, other in zip(requests, chunks, again, strict=True):
        assert_alone(chunk, layout, request)
        assert chunk == other


@pytest.mark.parametrize("name", APART)
def test_rules_and_scores_are_those_of_the_request_alone(name):
    layout = "decoder_only"
    decode = dataclasses.replace(PLAIN, **APART[name])
    shorter = dataclasses.replace(decode, max_new_tokens=12)
    limits = (decode,) if name == "constraint" else (decode, shorter)
    requests = [TextRequest(*pair) for pair in itertools.product(PROMPTS[1:4], limits)]
    requests.append(TextRequest("x", PLAIN))
    chunks = write_all(predictor_of(layout), requests)
    for request, chunk in zip(requests, chunks, strict=True):
        assert_alone(chunk, layout, request)
    # The very bits, whatever the company: every program has one shape.
    (single,) = write_all(predictor_of(layout), requests[2:3])
    assert single == chunks[2]
    if name == "logprobs":
        expected = texts_alone(layout, decode)[requests[0].prompt].details[0]
        for ours, theirs in zip(chunks[0].scores, expected, strict=True):
            assert ours.token == theirs.token and len(ours.top) == 2
            assert ours.log_probability == pytest.approx(theirs.log_probability, abs=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        DRAFTERS[0],
        pytest.param(DRAFTERS[1], marks=pytest.mark.slow),
        # 8 s each, and the same mechanism.
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in DRAFTERS[2:]),
    ],
)
def test_a_drafter_changes_no_token(name):
    layout = "encoder_decoder"
    decodes = [dataclasses.replace(decode, drafter=name) for decode in (PLAIN, SAMPLED)]
    requests = [TextRequest(*pair) for pair in itertools.product(PROMPTS[1:5], decodes)]
    for request, chunk in zip(requests, write_all(predictor_of(layout), requests), strict=True):
        expected = texts_alone(layout, dataclasses.replace(request.decode, drafter="plain"))
        assert chunk.tokens == expected[request.prompt].tokens[0]


def test_a_stop_string_ends_a_text_with_its_token():
    layout = "encoder_decoder"
    predictor, requests = predictor_of(layout), []
    for prompt, alone in [*texts_alone(layout, PLAIN).items()][:3]:
        pieces = [predictor.targets.decode([token]) for token in alone.tokens[0]]
        shown = [number for number, piece in enumerate(pieces) if " " < piece < "~"]
        stops = [pieces[number] + pieces[number + 1] for number in shown if number + 1 in shown]
        stops = *stops[:1], *(pieces[number] for number in shown[-1:])
        chosen = [*stops[:1], stops] if stops else []
        requests += [TextRequest(prompt, dataclasses.replace(PLAIN, stop=stop)) for stop in chosen]
    chunks = write_all(predictor, requests)
    assert any(len(stop) > 1 for request in requests for stop in request.decode.stop)
    for request, chunk in zip(requests, chunks, strict=True):
        expected = predictor.predict([request.prompt], request.decode)[0]
        assert (chunk.tokens, chunk.text) == (expected.tokens[0], expected.texts[0])
        assert chunk.finish_reason == "stop"


def test_chunks_are_those_of_a_stream():
    """Joined they are the text; each is there as soon as it is settled."""
    layout = "encoder_decoder"
    predictor = predictor_of(layout)
    engine = Engine(predictor, LIMITS)
    received = []
    completion = engine.submit(TextRequest(PROMPTS[1], SAMPLED), received.append)
    streamed = [*engine.submit(TextRequest(PROMPTS[1], SAMPLED))]
    (whole,) = engine.submit(TextRequest(PROMPTS[1], SAMPLED, streamed=False))
    engine.close()
    assert received == streamed and len(streamed) > 3
    assert [chunk.finish_reason for chunk in streamed[:-1]] == [None] * (len(streamed) - 1)
    assert whole.tokens == [token for chunk in streamed for token in chunk.tokens]
    pieces = [*stream_text(predictor, PROMPTS[1], SAMPLED, LIMITS.block)]
    assert whole.text == "".join(piece.text for piece in pieces)
    assert completion.usage.tokens == len(whole.tokens)
    assert completion.usage.prompt_tokens == len(predictor.encode_inputs([PROMPTS[1]])[0])


def poison_row(engine: Engine, completion: Completion) -> None:
    """Makes every number of a text's row NaN, and cancels it."""
    (lane,) = engine.lanes.values()
    row = [text and text.completion for text in lane.texts].index(completion)

    def spoil(x):
        if not x.ndim or x.dtype != np.float32:
            return x
        numbers = np.array(x)
        numbers[row] = np.nan
        return jax.device_put(numbers, x.sharding)

    lane.pool = jax.tree.map(spoil, lane.pool)
    completion.cancel()


def expire(engine: Engine, completion: Completion) -> None:
    completion.request = completion.request._replace(deadline=0.0)


def lose_client(engine: Engine, completion: Completion) -> None:
    raise RuntimeError("the client is gone")


def cancel(engine: Engine, completion: Completion) -> None:
    completion.cancel()


def test_what_ends_early_leaves_no_trace():
    """Cancelled, expired and failed texts, rows of NaN: the others, those that take their rows too,
    have the text that they have alone."""
    layout = "encoder_decoder"
    engine = Engine(predictor_of(layout), LIMITS)
    requests = [TextRequest(prompt, SAMPLED) for prompt in PROMPTS[1:]]
    disturbed, whole = {}, []

    def disturb(number, end):
        def on_chunk(chunk):
            if chunk.finish_reason is None:
                end(engine, disturbed[number])

        disturbed[number] = engine.submit(requests[1], on_chunk)

    for number, end in enumerate((poison_row, cancel, expire, lose_client) * 2):
        disturb(number, end)
        whole.append(engine.submit(requests[number % 3]))
    late = engine.submit(requests[0]._replace(deadline=time.monotonic() - 1))
    gone = engine.submit(requests[0])
    gone.cancel()
    whole += map(engine.submit, requests)
    for completion in whole:
        assert_alone(completion.result(), layout, completion.request)
    assert late.result().finish_reason == "expired"
    assert gone.result().tokens == []
    engine.close()
    ended = engine.gauges().finished
    assert (ended["cancelled"], ended["expired"], ended["error"]) == (5, 3, 2)
    assert sum(ended.values()) == len(whole) + len(disturbed) + 2
    assert isinstance(disturbed[3].error, RuntimeError)


def test_a_program_that_fails_ends_its_texts_and_no_others(monkeypatch):
    layout, advance = "encoder_decoder", pool.advance_pool
    calls: list[int] = []

    def broken(*arguments):
        calls.append(len(calls))
        if calls[-1:] == [2]:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return advance(*arguments)

    engine = Engine(predictor_of(layout), dataclasses.replace(LIMITS, rows=2))
    requests = [TextRequest(prompt, PLAIN) for prompt in PROMPTS[1:5]]
    # Rehearsed before, and submitted at once: the first two share the rows that fail.
    for request in requests:
        engine.submit(request).result()
    monkeypatch.setattr(pool, "advance_pool", broken)
    completions = engine.call(lambda: [*map(engine.submit, requests)]).result()
    for completion in completions[:2]:
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            completion.result()
    for request, completion in zip(requests[2:], completions[2:], strict=True):
        assert_alone(completion.result(), layout, request)
    engine.close()


def test_the_queue_has_an_end_and_a_closing_engine_finishes_what_it_has():
    layout = "encoder_decoder"
    predictor = predictor_of(layout)
    engine = Engine(predictor, dataclasses.replace(LIMITS, rows=1, queue=2))
    release, begun = threading.Event(), threading.Event()
    waiting = engine.call(lambda: (begun.set(), release.wait()))
    begun.wait()
    request = TextRequest(PROMPTS[1], PLAIN)
    completions = [engine.submit(request) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests wait"):
        engine.submit(request)
    assert engine.gauges().queued == 2
    release.set()
    closing = threading.Thread(target=engine.close)
    closing.start()
    for completion in completions:
        assert_alone(completion.result(), layout, request)
    closing.join()
    assert waiting.result() == (None, True)
    with pytest.raises(EngineClosedError, match="closing"):
        engine.submit(request)
    with pytest.raises(EngineClosedError, match="closing"):
        engine.call(int)


def test_an_engine_that_is_closed_at_once_cancels():
    engine = Engine(predictor_of("encoder_decoder"), LIMITS)
    completions = [engine.submit(TextRequest(prompt, PLAIN)) for prompt in PROMPTS[1:] * 9]
    engine.close(drain=False)
    reasons = {completion.result().finish_reason for completion in completions}
    assert "cancelled" in reasons and reasons <= {"cancelled", "stop", "length"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(prompt="a" * 40), "40 tokens, and the engine's limit is 32"),
        (dict(decode=config.Decode(max_new_tokens=33)), "33 is above the engine's limit, 32"),
        (dict(decode=config.Decode(max_new_tokens=9, beams=2)), "Decode.beams is not served"),
        (dict(decode=config.Decode(max_new_tokens=9, drafter="lockup")), "Unknown drafter"),
        (dict(adapter="nobody"), "no adapter 'nobody'"),
        (dict(prompt=[400]), "outside of the model's vocabulary"),
        (dict(prompt=""), "is empty"),
    ],
    ids=["long", "many", "beams", "drafter", "adapter", "ids", "empty"],
)
def test_a_request_that_is_not_served_says_why(changes, message):
    engine = Engine(predictor_of("encoder_decoder"), LIMITS)
    request = TextRequest("abc", config.Decode(max_new_tokens=9, drafter="plain"))
    with pytest.raises(ValueError, match=message):
        engine.submit(request._replace(**changes))
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
def test_rows_are_split_over_a_mesh(layout):
    """Prompts of a decoder are read in chunks there too, and taken from the prefix cache."""
    requests = [TextRequest(*pair) for pair in itertools.product(PROMPTS[1:], MIXED[1:3])]
    for decode in MIXED[1:3]:
        texts_alone(layout, dataclasses.replace(decode, max_new_tokens=LONGEST))
    cfg, vocabulary = predictor_of(layout).cfg, ByteVocabulary(0)
    sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    split = Predictor(cfg, lively(cfg), (vocabulary, vocabulary), ended=False)
    chunked = dataclasses.replace(LIMITS, prefill_tokens=8, prefix_bytes=2**20)
    for limits in (LIMITS, chunked):
        for request, chunk in zip(requests, write_all(split, requests, limits), strict=True):
            assert_alone(chunk, layout, request)
        if layout == "encoder_decoder":
            break
    with pytest.raises(ValueError, match="cannot be split over 4 parts"):
        Engine(split, dataclasses.replace(LIMITS, rows=6))
    use_one_device()
