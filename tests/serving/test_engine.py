# SPDX-License-Identifier: Apache-2.0
"""Laws of the engine: a text is that of the request alone, and what ends leaves no trace."""

import functools

import pytest
from conftest import toy_model
from test_decoding_loop import lively, use_one_device

from t5x_lite import config
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.serving.completion import TextRequest
from t5x_lite.serving.engine import Engine, EngineLimits
from t5x_lite.tokenizers.vocabularies import ByteVocabulary

LIMITS = EngineLimits(rows=4, max_inputs=32, max_new_tokens=32)
DECODE = config.Decode(max_new_tokens=24, drafter="plain")
PROMPTS = ["the cat sat", "größer", "ab" * 12, "x"]


@functools.cache
def predictor_of(layout: str) -> Predictor:
    use_one_device()
    cfg = toy_model(layout, positions="relative", layers=1, vocab=300)
    vocabulary = ByteVocabulary(0)
    return Predictor(cfg, lively(cfg), (vocabulary, vocabulary), ended=False, batch_size=4)


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
def test_a_text_is_that_of_the_request_alone(layout):
    predictor = predictor_of(layout)
    engine = Engine(predictor, LIMITS)
    completions = [engine.submit(TextRequest(prompt, DECODE)) for prompt in PROMPTS]
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        chunk = completion.result()
        (alone,) = predictor.predict([prompt], DECODE)
        assert chunk.tokens == alone.tokens[0]
        assert chunk.text == alone.texts[0]
        assert chunk.finish_reason in ("stop", "length")
    engine.close()
