# SPDX-License-Identifier: Apache-2.0
"""Laws of rehearsals: the engine's thread compiles nothing, and rows go on while programs are."""

import dataclasses
import logging
import threading

import jax
import pytest
from test_engine import LIMITS, MIXED, PLAIN, PROMPTS, SAMPLED, predictor_of
from test_prompts import CACHED, write_each

from t5x_lite.serving import rehearsal
from t5x_lite.serving.completion import TextRequest
from t5x_lite.serving.engine import Engine


@pytest.fixture
def compiled(caplog):
    """Returns the programs that were compiled so far, each after the name of its thread."""
    caplog.set_level(logging.WARNING, logger="jax")
    jax.config.update("jax_log_compiles", True)
    yield lambda: [
        f"{record.threadName}: {record.getMessage()}"
        for record in caplog.records
        if record.getMessage().startswith("Finished XLA compilation")
    ]
    jax.config.update("jax_log_compiles", False)


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
def test_the_engine_compiles_no_program(layout, compiled):
    """Any width, way of choosing and rule; long prompts and those of the prefix cache."""
    # A size of their own: no other test has compiled these programs.
    engine = Engine(predictor_of(layout), dataclasses.replace(CACHED, rows=3))
    requests = [TextRequest(prompt, each) for each in MIXED[1:3] for prompt in PROMPTS[1:4]]
    requests.append(TextRequest("x", dataclasses.replace(PLAIN, repetition_penalty=1.3)))
    for _ in range(2):
        write_each(engine, requests)
    engine.close()
    assert not [each for each in compiled() if each.startswith("engine")]
    assert any(each.startswith("rehearsals") for each in compiled())


def test_rows_go_on_while_a_program_is_compiled(monkeypatch):
    """One that waits for its programs may be cancelled meanwhile; one that fails says why."""
    rehearse, gate, begun = rehearsal.rehearse, threading.Event(), threading.Event()

    def slow(lane, text):
        if text.decode.temperature > 0:
            begun.set()
            gate.wait()
        rehearse(lane, text)

    monkeypatch.setattr(rehearsal, "rehearse", slow)
    engine = Engine(predictor_of("encoder_decoder"), LIMITS)
    plain = TextRequest(PROMPTS[1], PLAIN)
    expected = engine.submit(plain).result()
    waiting = [engine.submit(TextRequest(PROMPTS[1], SAMPLED)) for _ in range(2)]
    begun.wait()
    assert engine.submit(plain).result() == expected
    waiting[0].cancel()
    assert waiting[0].result().finish_reason == "cancelled"
    gate.set()
    assert waiting[1].result().finish_reason in ("stop", "length")
    engine.close()


def test_a_program_that_cannot_be_compiled_fails_its_texts(monkeypatch):
    def broken(lane, text):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(rehearsal, "rehearse", broken)
    engine = Engine(predictor_of("encoder_decoder"), LIMITS)
    # The engine tries it itself, with the rows that it has.
    assert engine.submit(TextRequest(PROMPTS[1], PLAIN)).result().finish_reason
    engine.close()
