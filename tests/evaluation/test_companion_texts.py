# SPDX-License-Identifier: Apache-2.0
"""Companions by name: what they read, what is reported, and what does not fit."""

import dataclasses
import functools

import pytest
from conftest import toy_model
from test_constraints import toy
from test_decoding_loop import lively, use_one_device

from t5x_lite import config, decoding
from t5x_lite.config.companions import parse_combination
from t5x_lite.decoding.acceptance.stats import AcceptanceStats
from t5x_lite.decoding.companions import rules
from t5x_lite.decoding.companions.companion import Companion
from t5x_lite.decoding.companions.rows import (
    attach_companion,
    check_companion,
)
from t5x_lite.decoding.request import prompt_rows
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.evaluation.streaming import stream_text
from t5x_lite.model import computation
from t5x_lite.tokenizers import vocabularies

BYTES = vocabularies.ByteVocabulary(0)


@functools.cache
def byte_predictor():
    """A model of bytes that reads texts."""
    use_one_device()
    cfg, _ = toy("deep decoder_only")
    return Predictor(cfg, lively(cfg), (BYTES, BYTES), ended=False)


def predicted(companion, combine, **options):
    decode = config.Decode(max_new_tokens=8, companion=companion, combine=combine, **options)
    return [each.tokens[0] for each in byte_predictor().predict(["abc", "de"], decode)]


@pytest.mark.slow
def test_a_predictor_reads_what_is_named():
    """Prompts with the input in them; rules that change nothing; streams, and ids without texts."""
    predictor = byte_predictor()
    use_one_device()
    decode = config.Decode(max_new_tokens=8)
    written = predicted("prompt:say {input} twice", "guidance:3")
    for text, tokens in zip(("abc", "de"), written, strict=True):
        request = decoding.make_request(
            predictor.cfg, predictor.encode_inputs([text]), decode, eos=BYTES.stops
        )
        others = predictor.encode_inputs([f"say {text} twice"])
        rule = rules.make_rule(parse_combination("guidance:3", "unconditional"))
        cfg = computation.with_dtype_of(predictor.cfg, predictor.params)
        companion = Companion(rule, predictor.params, cfg=cfg)
        request = attach_companion(request, companion, prompt_rows(cfg, others))
        result = decoding.generate(predictor.cfg, predictor.params, request, decode)
        assert result.tokens[0, 0, : result.lengths[0, 0]].tolist() == tokens
    # The model against itself, and weights of 1 and 0, change nothing.
    plain = [each.tokens[0] for each in predictor.predict(["abc", "de"], decode)]
    assert predicted("prompt:{input}", "guidance:3") == plain
    assert predicted("prompt:other", "guidance:1") == plain
    assert written != plain
    named = dataclasses.replace(decode, companion="prompt:say {input} twice", combine="guidance:3")
    pieces = stream_text(predictor, "abc", named, every=3)
    assert "".join(piece.text for piece in pieces) == BYTES.decode(written[0])
    ids = predictor.encode_inputs(["abc", "de"])
    assert [each.tokens[0] for each in predictor.predict_ids(ids, named)] == written


@pytest.mark.slow
def test_the_share_that_the_model_decides_is_reported():
    predictor = byte_predictor()
    use_one_device()
    predictor.drafters.models["small"] = predictor.cfg, predictor.params
    predictor.tally = AcceptanceStats()
    predicted("model:small", "switch:100")
    assert predictor.tally.report()["model_tokens"] == 0
    assert "tokens that the model decided, not its companion: 0%" in str(predictor.tally)
    predicted("model:small", "switch:1e-9")
    assert predictor.tally.report()["model_tokens"] == predictor.tally.tokens / 2
    # Drafts that are not accepted count for nobody.
    predictor.tally = AcceptanceStats()
    predicted("model:small", "switch:1e-9", drafter="lookup", draft_length=4)
    assert predictor.tally.report()["model_tokens"] == predictor.tally.tokens > 0


def test_companions_that_do_not_fit_the_model_are_refused():
    predictor = byte_predictor()
    use_one_device()
    for layers in ("layers:9", "layers:0"):
        with pytest.raises(ValueError, match="the decoder has 2 layers, so . must be in 1..1"):
            predicted(layers, "")
    with pytest.raises(ValueError, match="one layer only"):
        check_companion(toy_model("decoder_only", layers=1), config.Decode(companion="layers:high"))
    other = dataclasses.replace(predictor.cfg, decoder_start_token_id=9)
    predictor.drafters.models["other"] = other, predictor.params
    with pytest.raises(ValueError, match="Model.decoder_start_token_id differs"):
        predicted("model:other", "")
    with pytest.raises(ValueError, match="not a checkpoint|no such|does not exist|nowhere"):
        predicted("model:./nowhere", "")
