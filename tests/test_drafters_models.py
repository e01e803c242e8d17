# SPDX-License-Identifier: Apache-2.0
"""Drafters that are models: another one, the first layers of the model itself, or its last."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_model
from decoding_laws import (
    EXAMPLES,
    GREEDY,
    KINDS,
    LAWS,
    LENGTH,
    SAMPLED,
    Drafted,
    plain,
    same,
    steps,
    trained,
    write,
)
from test_decoding_loop import drawn, lively, nucleus, use_one_device

from t5x_lite import decoding, model, sharding
from t5x_lite.decoding import generation, target
from t5x_lite.decoding.drafters.draft_model import DraftModel
from t5x_lite.decoding.drafters.early_exit import EarlyExit
from t5x_lite.decoding.drafters.late_layers import LateLayers
from t5x_lite.decoding.protocol import chain

# Draft models, narrower than their targets; one has fewer words, one a table padded further.
SMALL = {
    "pair": dataclasses.replace(toy_model("pair", layers=1, embed=8), vocab=56),
    "joined": dataclasses.replace(toy_model("joined", layers=1, positions="rotary"), vocab=72),
    "prefix": toy_model("joined", prefix_lm=True, layers=1),
    "bare": dataclasses.replace(toy_model("joined", layers=1), starts_prompts=False, start=3),
}
# What costs many compilations, and differs little from what is tried without it.
SLOW = (pytest.mark.slow,)
# Which draft model is tried with which target.
COUPLES = [
    ("pair", "pair"),
    pytest.param("joined", "joined", marks=SLOW),
    ("joined", "pair"),
    ("pair", "joined"),
    ("bare", "pair"),
    pytest.param("bare", "joined", marks=SLOW),
    ("prefix", "prefix"),
]


@functools.cache
def small(name: str):
    return lively(SMALL[name], seed=5)


def drafted(name: str, kind: str, width: int = 4) -> Drafted:
    """The draft model of that name, for a target of that kind."""
    drafter = DraftModel(SMALL[name], KINDS[kind], chain(width))
    return Drafted(drafter, lambda kind: decoding.prepare(SMALL[name], small(name)), (kind,))


CASES = {
    "pair": drafted("pair", "pair"),
    "joined": drafted("joined", "joined"),
    "early exit": Drafted(EarlyExit(1, chain(4)), kinds=("deep joined",)),
    "late layers": Drafted(LateLayers(1, chain(3)), kinds=("deep pair",)),
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW * (name == "joined")) for name in CASES]
)
def test_laws(name, law):
    law(CASES[name])


class Uncached:
    """What a model says after a text, read as one block on an empty cache."""

    def __init__(self, cfg, params):
        self.cfg, self.params = cfg, decoding.prepare(cfg, params)
        self.apply = jax.jit(self.block)

    def block(self, params, ids, prefix, inputs, length):
        read = model.Read()
        if self.cfg.encoder:
            read = target.read(self.cfg, params, inputs, length)
        cache = model.empty_cache(self.cfg, *ids.shape, scan=False)
        block = model.Block(ids, 0 * prefix, prefix=prefix)
        transformer = model.Transformer(self.cfg, scan=False)
        hidden, _ = transformer.apply({"params": params}, block, cache, read, method="decode")
        return transformer.apply({"params": params}, hidden, method="logits")

    def logits(self, example, written):
        """[64] after the example and what is written, in this model's own way of being prompted."""
        known = lambda tokens: [min(int(token), self.cfg.vocab - 1) for token in tokens]
        start = [self.cfg.start] if self.cfg.encoder or self.cfg.starts_prompts else []
        prompt = start if self.cfg.encoder else start + known(example)
        ids, length = decoding.pad([prompt + known(written)], 64)
        inputs, inputs_length = decoding.pad([known(example)], 16)
        rows = (ids, np.array([len(prompt)], np.int32), inputs, inputs_length)
        given = generation.place(rows)
        return np.asarray(self.apply(self.params, *given))[0, length[0] - 1, :64]

    def continued(self, example, written, count, pick=lambda logits, position: np.argmax(logits)):
        """`count` more tokens; position counts from the first that was written."""
        written = list(written)
        for _ in range(count):
            written.append(int(pick(self.logits(example, written), len(written))))
        return written[-count:]


def new_tokens(step, row, kind):
    """What a row has written before the call, the root last, and the length of its prompt."""
    prompt = 1 if KINDS[kind].encoder else 1 + len(EXAMPLES[row])
    return step.before.tokens[row, prompt : step.before.length[row] + 1], prompt


def guesses_follow(case: Drafted, kind: str, reference: Uncached, decode=GREEDY):
    """The guesses of the first calls are what the reference writes after the text of some rows,
    the longest and the shortest among them."""
    count = case.drafter.tree.width - 1
    for step in itertools.islice(steps(case, kind, decode), 5):
        for row in (0, 1, 4, 5):
            example = EXAMPLES[row]
            written, prompt = new_tokens(step, row, kind)
            how = {}
            if decode.temperature:
                choose = drawn(decode, row)
                how["pick"] = lambda logits, place, choose=choose, p=prompt: choose(
                    logits, p + place
                )
            expected = reference.continued(example, written, count, **how)
            assert step.draft.tokens[row].tolist() == expected


@pytest.mark.parametrize("name, kind", COUPLES)
def test_guesses_are_what_the_draft_model_writes_itself(name, kind):
    use_one_device()
    guesses_follow(drafted(name, kind), kind, Uncached(SMALL[name], small(name)))


def test_sampled_guesses_are_what_the_draft_model_draws_with_the_same_noise():
    use_one_device()
    guesses_follow(drafted("pair", "pair"), "pair", Uncached(SMALL["pair"], small("pair")), SAMPLED)


def law_of(logits, decode):
    """The probabilities [64] that are drawn from, by sorting."""
    logits = logits / decode.temperature
    left = nucleus(logits, decode)
    law = np.zeros(64)
    law[left] = np.exp(logits[left] - logits.max())
    return law / law.sum()


def test_guesses_that_are_drawn_freely_carry_the_law_they_were_drawn_from():
    use_one_device()
    case = drafted("pair", "pair")
    case = case._replace(drafter=dataclasses.replace(case.drafter, drawn=True))
    reference = Uncached(SMALL["pair"], small("pair"))
    for step in itertools.islice(steps(case, "pair", SAMPLED), 3):
        for row, example in enumerate(EXAMPLES):
            written = list(new_tokens(step, row, "pair")[0])
            for token, law in zip(*(part[row] for part in step.draft[:2]), strict=True):
                expected = law_of(reference.logits(example, written), SAMPLED)
                np.testing.assert_allclose(np.exp(law), expected, atol=1e-5)
                assert expected[token] > 0
                written.append(int(token))


@pytest.mark.parametrize("name, kind", [("bare", "pair"), ("prefix", "prefix")])
def test_the_rarer_draft_models_change_no_token(name, kind):
    use_one_device()
    case = drafted(name, kind)
    same(write(kind, GREEDY, case.drafting(kind)), plain(kind, GREEDY))


@pytest.mark.parametrize("kind, decode", [("pair", SAMPLED), ("joined", GREEDY)])
def test_a_draft_model_that_is_the_target_is_always_right(kind, decode):
    use_one_device()
    cfg = KINDS[kind]
    params = decoding.prepare(cfg, trained(kind))
    drafting = decoding.Drafting(DraftModel(cfg, cfg, chain(4)), params)
    found = write(kind, decode, drafting)
    same(found, plain(kind, decode))
    assert found.calls == LENGTH / 4


def first_layers(kind: str, count: int):
    """The target of that kind with its first layers alone: config and weights."""
    cfg, params = KINDS[kind], trained(kind)
    first = jax.tree.map(lambda stacked: stacked[:count], params["decoder"]["layers"])
    params = params | {"decoder": params["decoder"] | {"layers": first}}
    return dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, layers=count)), params


@pytest.mark.parametrize("kind", ["deep joined", "deep pair"])
def test_an_early_exit_guesses_what_the_first_layers_alone_write(kind):
    use_one_device()
    guesses_follow(CASES["early exit"], kind, Uncached(*first_layers(kind, 1)))


class Late:
    """The states between the layers of a T5-like toy, over whole texts on empty caches."""

    def __init__(self, kind, middle):
        self.cfg, self.middle = KINDS[kind], middle
        self.params = decoding.prepare(self.cfg, trained(kind))
        self.early, self.late = jax.jit(self.first), jax.jit(self.second)

    def part(self, first, last, params, inputs, length):
        read = target.read(self.cfg, params, inputs, length)
        return target.part_of(self.cfg, params, read, first, last)

    def over(self, part, x):
        index = 0 * x[:, 0, 0].astype(jnp.int32)
        return part.through(x, index, part.of(model.empty_cache(self.cfg, 1, x.shape[1], False)))[0]

    def first(self, params, tokens, inputs, length):
        part = self.part(0, self.middle, params, inputs, length)
        return self.over(part, part.begin(tokens, length * 0))

    def second(self, params, x, inputs, length):
        layers = self.cfg.decoder.layers
        part = self.part(self.middle, layers, params, inputs, length)
        hidden = part.finish(self.over(part, x))
        transformer = model.Transformer(self.cfg, scan=False)
        return transformer.apply({"params": params}, hidden, method="logits")

    def read(self, example, tokens):
        """The early layers' states of tokens, and what they added to the one before the root."""
        inputs = generation.place(decoding.pad([example], 16))
        ids, _ = decoding.pad([tokens], 64)
        states = np.array(self.early(self.params, generation.place(ids), *inputs))[0]
        last = len(tokens) - 2
        return states, states[last] - np.asarray(self.params["embedding"])[tokens[last]]

    def continued(self, example, tokens, count):
        """Guesses after tokens, start and root included, of which all but the root were read."""
        table = np.asarray(self.params["embedding"])
        inputs = generation.place(decoding.pad([example], 16))
        states, added = self.read(example, tokens)
        read = len(tokens) - 1
        guesses = [tokens[-1]]
        for place in range(read, read + count):
            states[place] = table[guesses[-1]] + added
            x = jax.device_put(states[None], sharding.named("batch length width"))
            logits = np.asarray(self.late(self.params, x, *inputs))
            guesses.append(int(np.argmax(logits[0, place])))
        return guesses[1:]


def test_late_layers_guess_from_the_last_state_before_them():
    use_one_device()
    reference, count = Late("deep pair", 1), CASES["late layers"].drafter.tree.width - 1
    first, *later = itertools.islice(steps(CASES["late layers"], "deep pair"), 5)
    assert np.all(first.draft.tokens == -1)
    for step in later:
        for row, example in enumerate(EXAMPLES):
            tokens = step.before.tokens[row, : step.before.length[row] + 1].tolist()
            expected = reference.continued(example, tokens, count)
            assert step.draft.tokens[row].tolist() == expected


def test_drafters_that_do_not_fit_are_refused():
    cfg = KINDS["pair"]
    with pytest.raises(ValueError, match="draft model is an encoder alone"):
        DraftModel(toy_model("aligned"), cfg)
    with pytest.raises(ValueError, match="one node wide"):
        DraftModel(cfg, cfg, chain(1))
    use_one_device()
    for drafter in (EarlyExit(2), EarlyExit(0), LateLayers(2)):
        with pytest.raises(ValueError, match=r"must be in 1\.\.1"):
            write("deep pair", GREEDY, decoding.Drafting(drafter))
