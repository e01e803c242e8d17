# SPDX-License-Identifier: Apache-2.0
"""Laws of tiered decoding: plain steps first, blocks when they repay, and always the same text."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from decoding_laws import GREEDY, KINDS, SAMPLED, DrafterCase, plain, prepared_params, request_rows
from test_decoding_loop import use_one_device
from test_decoding_widths import OTHERS, adaptive

from t5x_lite import decoding
from t5x_lite.decoding import streaming
from t5x_lite.decoding.adaptive import latency, tiers
from t5x_lite.decoding.adaptive.drafter import Adaptive
from t5x_lite.decoding.drafters.lookup import Lookup
from t5x_lite.decoding.loop import Plain
from t5x_lite.decoding.protocol import chain
from t5x_lite.utils import latency_table

CASES = OTHERS | {
    "each": DrafterCase(adaptive(1), kinds=("encoder_decoder",)),
    "ahead": DrafterCase(adaptive(8), kinds=("decoder_only",)),
    "ahead of an encoder-decoder": DrafterCase(adaptive(8), kinds=("encoder_decoder",)),
}


@pytest.fixture(autouse=True)
def table(monkeypatch, tmp_path):
    """The table of prices, empty."""
    monkeypatch.setenv(latency_table.VARIABLE, str(tmp_path / "kept" / "costs.json"))
    return tmp_path / "kept" / "costs.json"


@pytest.fixture
def second_by_second(monkeypatch):
    """A clock on which every program takes a second, whatever it does."""
    clock = itertools.count()
    monkeypatch.setattr(tiers, "time", SimpleNamespace(perf_counter=lambda: next(clock)))


def decoder_of(kind, reports):
    use_one_device()
    return tiers.TieredDecoder(KINDS[kind], reports.append)


def write(decoder, case, kind, decode=GREEDY, every=2):
    """Returns all results of a stream.

    Args:
      decoder: a TieredDecoder.
      case: the drafter and its weights.
      kind: kind of the model.
      decode: its settings.
      every: tokens between results.
    """
    params = prepared_params(kind, jax.sharding.get_mesh())
    weights = case.weights(kind)
    # The cases of other tests have prices already.
    weights = getattr(weights, "drafter_weights", weights)
    drafting = decoding.Drafting(case.drafter, weights)
    return list(decoder.stream(params, request_rows(kind, decode), decode, drafting, every))


def assert_text(results, kind, decode=GREEDY):
    """Every one of results is a beginning of the text that plain decoding by `decode` writes with a
    kind of model, and the last one is all of it."""
    expected = plain(kind, decode)
    np.testing.assert_array_equal(results[-1].tokens, expected.tokens)
    np.testing.assert_allclose(results[-1].scores, expected.scores, atol=1e-3)
    for result in results:
        for row, length in enumerate(result.lengths[:, 0]):
            written = result.tokens[row, 0, :length]
            np.testing.assert_array_equal(written, expected.tokens[row, 0, :length])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_text_that_changes_from_plain_steps_to_blocks_is_that_of_plain_decoding(
    name, second_by_second
):
    case, reports = CASES[name], []
    kind = case.kinds[0]
    decoder = decoder_of(kind, reports)
    results = write(decoder, case, kind)
    assert_text(results, kind)
    assert len(reports) == 1 and reports[0].startswith("compiling blocks of")
    # A second for each width and for plain steps beside a drafter that drafts ahead.
    paid = len(case.drafter.widths) + case.drafter.drafts_ahead
    assert not np.any(results[paid - 1].token_node)
    # From now on the program is there: blocks from the first step.
    again = write(decoder, case, kind)
    assert_text(again, kind)
    assert len(reports) == 1


@pytest.mark.slow
def test_a_sampled_text_is_that_of_plain_decoding(second_by_second):
    decoder = decoder_of("decoder_only", [])
    assert_text(write(decoder, CASES["ahead"], "decoder_only", SAMPLED), "decoder_only", SAMPLED)


def test_nothing_is_compiled_for_a_text_that_ends_before_it_would_pay():
    reports = []
    decoder = decoder_of("decoder_only", reports)
    results = write(decoder, CASES["ahead"], "decoder_only")
    assert_text(results, "decoder_only")
    assert reports == [] and not np.any(results[-1].token_node)
    (tier,) = decoder.tiers.values()
    assert tier.setup_seconds > 0 and not tier.compiled


def test_texts_pay_for_blocks_together(second_by_second):
    """Four seconds of plain steps pay for blocks: two texts of two pauses."""
    reports = []
    decoder = decoder_of("decoder_only", reports)
    for _ in range(3):
        assert len(reports) == 0
        results = write(decoder, CASES["ahead"], "decoder_only", every=12)
        assert_text(results, "decoder_only")
    assert len(reports) == 1 and np.any(results[-1].token_node)


def test_at_once_drafts_from_the_first_step_on():
    reports = []
    decoder = decoder_of("decoder_only", reports)
    decoder.at_once = True
    results = write(decoder, CASES["ahead"], "decoder_only", every=1)
    assert_text(results, "decoder_only")
    assert len(reports) == 1 and "about" not in reports[0]
    # Within a measurement of every width.
    assert np.any(results[3 * latency.ROUNDS].token_node)


def test_prices_are_measured_while_texts_are_written_and_kept(monkeypatch, table):
    case, kind = CASES["ahead"], "decoder_only"
    decoder = decoder_of(kind, [])
    decoder.at_once = True
    while not decoder.prices:
        assert_text(write(decoder, case, kind, every=3), kind)
    (seconds,) = decoder.prices.values()
    assert len(seconds) == 1 + len(case.drafter.widths)
    assert 0 < seconds[0] <= seconds[1] <= seconds[2] <= seconds[3] < 60
    assert list(json.loads(table.read_text()).values()) == [seconds]
    monkeypatch.setattr(latency, "StepTimer", lambda count: pytest.fail("measured again"))
    later = decoder_of(kind, [])
    later.at_once = True
    assert_text(write(later, case, kind), kind)
    assert later.prices == decoder.prices


@pytest.mark.slow
@pytest.mark.parametrize("floor", [1, 3])
def test_one_program_goes_on_after_every_pause(floor):
    """A state of another structure after the first pause would compile all widths twice."""
    use_one_device()
    kind = "decoder_only"
    drafting = decoding.Drafting(Adaptive(Lookup(chain(3)), (1, 3), floor))
    text = streaming.DecodeStream(
        KINDS[kind],
        prepared_params(kind, jax.sharding.get_mesh()),
        request_rows(kind, GREEDY),
        GREEDY,
        latency.measuring_costs(drafting, 1),
    )
    text.start()

    def shapes():
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), text.state)

    before = shapes()
    for _ in range(2):
        text.advance(2)
        assert shapes() == before


@dataclasses.dataclass(frozen=True)
class Witness(Plain):
    """A drafter whose first state is what it sees as the prompt."""

    def begin(self, context):
        return context.prompts


def test_the_text_so_far_is_the_prompt_of_a_drafter_that_comes_later():
    use_one_device()
    kind = "decoder_only"
    params = prepared_params(kind, jax.sharding.get_mesh())
    request = request_rows(kind, GREEDY)
    text = streaming.DecodeStream(KINDS[kind], params, request, GREEDY)
    result, _ = text.advance(5)
    text.change_drafter(decoding.Drafting(Witness()))
    tokens, lengths = jax.device_get(text.state.drafter_state)
    np.testing.assert_array_equal(lengths, request.prompts_length + 5)
    for row, length in enumerate(request.prompts_length):
        prompt, written = request.prompts[row, :length], result.tokens[row, 0, :5]
        np.testing.assert_array_equal(tokens[row, : length + 5], [*prompt, *written])
