# SPDX-License-Identifier: Apache-2.0
"""Laws of long prompts: read in chunks, or taken from the prefix cache, they change no bit."""

import dataclasses
import functools
import random
import threading
from collections import deque
from concurrent.futures import Future

import numpy as np
import pytest
from test_decoding_loop import lively
from test_engine import LIMITS, PLAIN, SAMPLED, predictor_of, use_one_device

from t5x_lite.decoding import chunked_prefill, pool
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.serving.completion import TextRequest
from t5x_lite.serving.engine import Engine
from t5x_lite.serving.prefix_cache import PrefixCache
from t5x_lite.tokenizers.vocabularies import ByteVocabulary

LAYOUT = "decoder_only"
CHUNKED = dataclasses.replace(LIMITS, prefill_tokens=8, prefill_budget=16)
CACHED = dataclasses.replace(CHUNKED, prefix_bytes=2**20)
# One of one chunk, others of several: with a common beginning, and of four whole ones.
PROMPTS = ["x", "ab" * 12, "ab" * 9 + "the end", "ab" * 16, "größer is the cat", "ab" * 15 + "a"]
SCORED = dataclasses.replace(SAMPLED, logprobs=2)


@functools.cache
def tokens_of(prompt: str) -> list[int]:
    """The tokens after a prompt that is read whole."""
    predictor = predictor_of(LAYOUT)
    use_one_device()
    return predictor.predict([prompt], PLAIN)[0].tokens[0]


def assert_whole(chunk, request: TextRequest) -> None:
    assert chunk.tokens == tokens_of(request.prompt)


def write_each(engine: Engine, requests) -> list:
    completions = [engine.submit(request) for request in requests]
    return [completion.result() for completion in completions]


def test_chunks_company_and_the_prefix_cache_change_no_bit():
    """Tokens, texts and log-probabilities: alone, in company, in any order, with and without the
    prefix cache; and the tokens are those of a prompt that is read whole."""
    predictor = predictor_of(LAYOUT)
    requests = [TextRequest(prompt, each) for each in (PLAIN, SCORED) for prompt in PROMPTS]
    without = Engine(predictor, CHUNKED)
    alone = [without.submit(request).result() for request in requests]
    order = [*range(len(requests))]
    random.Random(0).shuffle(order)
    for place, chunk in zip(order, write_each(without, [requests[i] for i in order]), strict=True):
        assert chunk == alone[place]
    without.close()
    assert without.gauges().cached_tokens == without.gauges().prefix_bytes == 0
    cached = Engine(predictor, CACHED)
    for _ in range(2):
        assert write_each(cached, requests[::-1]) == alone[::-1]
    cached.close()
    # At least what each long prompt of the second round begins with.
    assert cached.gauges().cached_tokens >= 2 * (24 + 24 + 32 + 16)
    for request, chunk in zip(requests, alone, strict=True):
        if request.decode.logprobs is None:
            assert_whole(chunk, request)


def test_rows_write_a_block_between_two_chunks_of_a_prompt(monkeypatch):
    """While a row writes, a block follows every chunk; without one, the prompt is read on."""
    events = []

    def record(module, name, event):
        function = getattr(module, name)

        def recorded(*arguments):
            if threading.current_thread().name == "engine":
                events.append(event)
            return function(*arguments)

        monkeypatch.setattr(module, name, recorded)

    record(chunked_prefill, "read_chunk", "chunk")
    record(pool, "advance_pool", "block")
    engine = Engine(predictor_of(LAYOUT), CHUNKED)
    long, short = TextRequest(PROMPTS[3], PLAIN), TextRequest("x", PLAIN)
    submitted: Future = Future()

    def submit_long(chunk):
        if not submitted.done():
            submitted.set_result(engine.submit(long))

    # Compiled before, or the short one has ended when the long one begins.
    assert_whole(engine.submit(long).result(), long)
    events.clear()
    engine.submit(short, submit_long)
    assert_whole(submitted.result().result(), long)
    engine.close()
    assert events.count("chunk") == 5
    assert " ".join(["block chunk"] * 5) in " ".join(events)
    events.clear()
    engine = Engine(predictor_of(LAYOUT), CHUNKED)
    assert_whole(engine.submit(long).result(), long)
    engine.close()
    assert events[:6] == ["chunk"] * 5 + ["block"]


def test_a_prompt_that_ends_early_leaves_no_trace(monkeypatch):
    """Cancelled or failed between two chunks: its row is free, and the others are what they are."""
    read, ends = chunked_prefill.read_chunk, deque()

    def disturbed(*arguments):
        if ends and threading.current_thread().name == "engine":
            ends.popleft()()
        return read(*arguments)

    monkeypatch.setattr(chunked_prefill, "read_chunk", disturbed)
    engine = Engine(predictor_of(LAYOUT), dataclasses.replace(CACHED, rows=1))
    requests = [TextRequest(prompt, PLAIN) for prompt in PROMPTS]

    def fail():
        raise RuntimeError("RESOURCE_EXHAUSTED")

    gone = engine.submit(requests[3])
    ends += [lambda: None, gone.cancel]
    assert gone.result().tokens == []
    failed = engine.submit(requests[1])
    ends.append(fail)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        failed.result()
    for request, chunk in zip(requests, write_each(engine, requests), strict=True):
        assert_whole(chunk, request)
    engine.close()
    assert engine.gauges().rows_used == 0 and engine.reading is None


def test_clients_do_not_share_the_prefix_cache():
    engine = Engine(predictor_of(LAYOUT), CACHED)
    cached = []
    for client in ("a", "b", "a", "b"):
        completion = engine.submit(TextRequest(PROMPTS[3], PLAIN, client=client))
        completion.result()
        cached.append(completion.usage.cached_tokens)
    engine.close()
    assert cached == [0, 0, 32, 32]


class ReferenceCache:
    """The prefix cache by the definition: a list of whole beginnings, the last used ones last."""

    def __init__(self, most: int):
        self.most, self.beginnings = most, []

    def use(self, owner, ids) -> int:
        """Reads a prompt of one id to a chunk; returns how many chunks were there."""
        chains = [(owner, *ids[: end + 1]) for end in range(len(ids))]
        count = next((n for n, each in enumerate(chains) if each not in self.beginnings), len(ids))
        for place in range(count, len(ids) + 1):
            used = [each for each in chains[:place] if each in self.beginnings]
            used += [chains[place - 1]] * (place > count and chains[place - 1] not in used)
            rest = [each for each in self.beginnings if each not in used]
            self.beginnings = (rest + used[::-1])[-self.most :]
        return count


@pytest.mark.parametrize("most", [0, 1, 3, 8])
def test_the_least_recently_used_beginning_goes(most):
    draw, entry = random.Random(most), np.zeros(4, np.int8)
    cache, reference = PrefixCache(most * entry.nbytes), ReferenceCache(most)
    counts = []
    for _ in range(300):
        owner, ids = draw.randrange(2), [draw.randrange(2) for _ in range(draw.randrange(1, 5))]
        chunks = [np.array([each], np.int32) for each in ids]
        read = cache.find(owner, chunks)
        counts.append(len(read))
        for chunk in chunks[len(read) :] if most else []:
            read.append(cache.add(owner, read, chunk, entry))
            assert cache.used_bytes <= cache.most_bytes
        assert counts[-1] == (reference.use(owner, ids) if most else 0)
        assert cache.used_bytes == len(cache.chunks) * entry.nbytes
    assert any(counts) == (most > 0)


@pytest.mark.slow
def test_bfloat16_changes_no_bit_in_company():
    """Computed in bfloat16 on a CPU: whole prompts and chunks, greedy and sampled."""
    use_one_device()
    cfg = dataclasses.replace(predictor_of(LAYOUT).cfg, dtype="bfloat16")
    pair = (ByteVocabulary(0),) * 2
    predictor = Predictor(cfg, lively(cfg), pair, ended=False)
    decodes = [dataclasses.replace(each, compute="bfloat16") for each in (PLAIN, SCORED)]
    requests = [TextRequest(prompt, each) for each in decodes for prompt in PROMPTS[:4]]
    engine = Engine(predictor, CACHED)
    alone = [engine.submit(request).result() for request in requests]
    assert write_each(engine, requests[::-1]) == alone[::-1]
    engine.close()
    assert predictor.for_compute("bfloat16").params["embedding"].dtype == "bfloat16"
