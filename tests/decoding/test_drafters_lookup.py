# SPDX-License-Identifier: Apache-2.0
"""Lookup: the copies of a search in plain Python, and the laws of drafters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_laws import (
    EXAMPLES,
    GREEDY,
    LAWS,
    SAMPLED,
    DrafterCase,
    greedy_text_is_that_of_plain_decoding,
    steps,
)
from test_decoding_loop import use_one_device

from t5x_lite.decoding import generation, loop, protocol
from t5x_lite.decoding.acceptance import exact
from t5x_lite.decoding.drafters.lookup import Lookup

CASES = {
    "lookup": DrafterCase(Lookup()),
}


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", CASES)
def test_laws(name, law):
    law(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bart", "m2m100"])
def test_families_with_absolute_positions_write_their_plain_text(kind):
    greedy_text_is_that_of_plain_decoding(CASES["lookup"]._replace(kinds=(kind,)))


def count_matched(source, place, written, most):
    """Counts the tokens, `most` at most, up to source[place] that equal the last of written."""
    length = 0
    while length < min(most, place + 1, len(written)):
        if source[place - length] != written[-1 - length]:
            break
        length += 1
    return length


def search_copy(drafter, written, inputs, place, misses):
    """Returns the drafts, and their place in the inputs (`place` for drafts of the text).

    Args:
      drafter: settings of the lookup.
      written: the text so far.
      inputs: ids of the encoder.
      place: where in the inputs the last copy goes on.
      misses: rejected copies in a row.
    """
    longer = 2 if inputs and misses < drafter.patience else 0
    matches = [(longer, 1, 0, place)] if inputs else []
    for at in range(len(written) - 1):
        order = -at if drafter.earliest else at
        matches.append((count_matched(written, at, written, drafter.max_ngram), 0, order, at + 1))
    for at in range(len(inputs) - 1):
        length, distance = (
            count_matched(inputs, at, written, drafter.max_ngram),
            abs(at + 1 - place),
        )
        if length:
            matches.append((length + longer * (distance <= 2), 1, -distance, at + 1))
    length, of_input, _, start = max(matches, default=(0, 0, 0, 0))
    ahead = range(drafter.tree.width - 1)
    if of_input:
        return [inputs[start + i] if start + i < len(inputs) else -1 for i in ahead], start
    period = len(written) - start
    return [written[start + i % period] if length else -1 for i in ahead], place


@pytest.mark.slow
@pytest.mark.parametrize(
    "drafter, kind, decode",
    [
        (Lookup(), "decoder_only", GREEDY),
        (Lookup(protocol.chain(4), max_ngram=1), "encoder_decoder", SAMPLED),
        (Lookup(max_ngram=2, earliest=True), "encoder_decoder", GREEDY),
        (Lookup(patience=0), "encoder_decoder", GREEDY),
    ],
    ids=str,
)
def test_drafts_are_those_of_a_search_in_plain_python(drafter, kind, decode):
    place, misses = [0] * len(EXAMPLES), [0] * len(EXAMPLES)
    some = 0
    for before, draft, output, _ in steps(DrafterCase(drafter), kind, decode):
        for row, example in enumerate(EXAMPLES):
            written = before.tokens[row, : before.length[row] + 1].tolist()
            inputs = example if kind == "encoder_decoder" else ()
            drafts, start = search_copy(drafter, written, inputs, place[row], misses[row])
            place[row] = start + int(output.count[row])
            misses[row] = 0 if output.count[row] > 1 else misses[row] + 1
            if not before.done[row]:
                assert draft.tokens[row].tolist() == drafts
                some += drafts[0] >= 0
    assert some


def count_steps(inputs, text):
    """Counts the steps for a model that always predicts the next token of `text`."""
    slots = 1 + len(text) + 8
    script = np.zeros(slots, np.int32)
    script[: len(text)] = text
    script = jnp.array(script)

    def forward(tokens, index, cache, tree=None):
        return index[:, None] + jnp.arange(tokens.shape[1]), cache

    def logits(places):
        return jax.nn.one_hot(script[jnp.minimum(places, slots - 1)], 200)

    length = jnp.array([len(inputs)])
    prompts = protocol.Prompts(jnp.zeros((1, 1), jnp.int32), jnp.array([1]))
    stopping = protocol.StoppingCriteria(-1, jnp.array([1 + len(text)]))
    target = protocol.Target(forward, logits)
    context = protocol.DecodeContext(target, stopping, prompts, jnp.array([inputs]), length)
    with jax.set_mesh(None):  # The script of the target is not placed on any.
        state = generation.initial_state(context, (), slots, Lookup().begin(context))
        state = loop.run_loop(context, Lookup(), exact.Exact(), state)
    assert state.tokens[0, 1 : 1 + len(text)].tolist() == text
    return int(state.steps)


def test_a_copy_goes_on_after_a_replaced_a_lost_or_an_inserted_token():
    use_one_device()
    inputs = np.random.default_rng(0).permutation(np.arange(1, 65)).tolist()
    assert count_steps(inputs, inputs) == 64 // 8
    # A new token ends one step; after a lost or inserted one, the next step finds the place again.
    assert count_steps(inputs, [*inputs[:20], 150, *inputs[21:]]) <= 64 // 8 + 1
    assert count_steps(inputs, [*inputs[:20], *inputs[21:]]) <= 64 // 8 + 2
    assert count_steps(inputs, [*inputs[:20], 150, *inputs[20:]]) <= 65 // 8 + 2
