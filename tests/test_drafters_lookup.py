# SPDX-License-Identifier: Apache-2.0
"""Lookup: it copies what a search in plain Python would, and obeys the laws of drafters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_laws import EXAMPLES, GREEDY, LAWS, SAMPLED, Drafted, steps
from test_decoding_loop import use_one_device

from t5x_lite.decoding import acceptance, generation, loop, protocol
from t5x_lite.decoding.drafters.lookup import Lookup

CASES = {
    "lookup": Drafted(Lookup()),
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", CASES)
def test_laws(name, law):
    law(CASES[name])


def matched(source, place, written, longest):
    """How many tokens up to source[place] are the last ones of what is written."""
    length = 0
    while length < min(longest, place + 1, len(written)):
        if source[place - length] != written[-1 - length]:
            break
        length += 1
    return length


def searched(drafter, written, inputs, place, misses):
    """The guesses, and where in inputs they start (place where they do not)."""
    longer = 2 if inputs and misses < drafter.patience else 0
    found = [(longer, 1, 0, place)] if inputs else []
    for at in range(len(written) - 1):
        order = -at if drafter.earliest else at
        found.append((matched(written, at, written, drafter.longest), 0, order, at + 1))
    for at in range(len(inputs) - 1):
        length, distance = matched(inputs, at, written, drafter.longest), abs(at + 1 - place)
        if length:
            found.append((length + longer * (distance <= 2), 1, -distance, at + 1))
    length, of_input, _, start = max(found, default=(0, 0, 0, 0))
    ahead = range(drafter.tree.width - 1)
    if of_input:
        return [inputs[start + i] if start + i < len(inputs) else -1 for i in ahead], start
    period = len(written) - start
    return [written[start + i % period] if length else -1 for i in ahead], place


@pytest.mark.parametrize(
    "drafter, kind, decode",
    [
        (Lookup(), "joined", GREEDY),
        (Lookup(protocol.chain(4), longest=1), "pair", SAMPLED),
        (Lookup(longest=2, earliest=True), "pair", GREEDY),
        (Lookup(patience=0), "pair", GREEDY),
    ],
    ids=str,
)
def test_guesses_are_those_of_a_search_in_plain_python(drafter, kind, decode):
    place, misses = [0] * len(EXAMPLES), [0] * len(EXAMPLES)
    some = 0
    for before, draft, verdict, _ in steps(Drafted(drafter), kind, decode):
        for row, example in enumerate(EXAMPLES):
            written = before.tokens[row, : before.length[row] + 1].tolist()
            inputs = example if kind == "pair" else ()
            guesses, start = searched(drafter, written, inputs, place[row], misses[row])
            place[row] = start + int(verdict.count[row])
            misses[row] = 0 if verdict.count[row] > 1 else misses[row] + 1
            if not before.done[row]:
                assert draft.tokens[row].tolist() == guesses
                some += guesses[0] >= 0
    assert some


def copied(inputs, text):
    """How many calls it takes to write text, whatever a model would say."""
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
    rules = protocol.Rules(-1, jnp.array([1 + len(text)]), None)
    target = protocol.Target(forward, logits)
    setting = protocol.Setting(target, rules, prompts, jnp.array([inputs]), length)
    state = generation.started(setting, (), slots, Lookup().begin(setting))
    state = loop.run(setting, Lookup(), acceptance.Exact(), state)
    assert state.tokens[0, 1 : 1 + len(text)].tolist() == text
    return int(state.calls)


def test_a_copy_goes_on_behind_what_was_replaced_lost_or_inserted():
    use_one_device()
    inputs = np.random.default_rng(0).permutation(np.arange(1, 65)).tolist()
    assert copied(inputs, inputs) == 64 // 8
    # What is new ends one call; where a token was lost or inserted, the next finds the place again.
    assert copied(inputs, [*inputs[:20], 150, *inputs[21:]]) <= 64 // 8 + 1
    assert copied(inputs, [*inputs[:20], *inputs[21:]]) <= 64 // 8 + 2
    assert copied(inputs, [*inputs[:20], 150, *inputs[20:]]) <= 65 // 8 + 2
