# SPDX-License-Identifier: Apache-2.0
"""Laws that every drafter obeys, for any test file to hold its own drafters to.

  CASES = {"lookup": Drafted(lookup.Lookup())}

  @pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
  @pytest.mark.parametrize("name", CASES)
  def test_laws(name, law):
      law(CASES[name])

`steps` runs the loop call by call, so that guesses can be compared with a reference in Python. It
is the law of plain decoding's text, too, for those who go on to its end.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from conftest import toy_model
from test_decoding_loop import KINDS as DEEP
from test_decoding_loop import NEVER, lively, use_one_device

from t5x_lite import config, decoding, model, sharding
from t5x_lite.decoding import acceptance, generation, loop, protocol, target

# Most drafters know of no layers: one is compiled in two thirds of the time of two.
KINDS = {
    "pair": toy_model("pair", positions="relative", layers=1),
    "joined": toy_model("joined", positions="rotary", kv_heads=2, layers=1),
    "prefix": toy_model("joined", prefix_lm=True, positions="relative", layers=1),
    "deep pair": DEEP["pair"],
    "deep joined": DEEP["joined"],
}
# Rows of unequal lengths, as many as meshes split; three of them have something to repeat.
EXAMPLES = (
    (5, 9, 33),
    (7,),
    (60, 2, 2, 8, 14, 31, 9),
    (12, 13, 12, 13, 12),
    (40,) * 5,
    (3, 4, 5, 6, 7, 8, 9, 10, 11, 3, 4),
    (2, 63),
    (9, 33, 5, 9),
)
EVERY = tuple(range(len(EXAMPLES)))
LENGTH = 24
GREEDY = config.Decode(length=LENGTH)
SAMPLED = config.Decode(length=LENGTH, temperature=0.9, top_k=20, top_p=0.95, seed=3)


class Drafted(NamedTuple):
    """A drafter under test; weights(kind) are its own for the target of that kind in KINDS.

    kinds are the targets it is tried with: each costs compilations, so leave out what adds nothing.
    Sampling is tried with the first of them, caches and meshes with the last but prefix-LMs, whose
    prefill sees both ways.
    """

    drafter: protocol.Drafter
    weights: Callable[[str], Any] = lambda kind: None
    kinds: tuple[str, ...] = ("pair", "joined")

    @property
    def causal(self) -> str:
        return [kind for kind in self.kinds if kind != "prefix"][-1]

    def drafting(self, kind: str) -> decoding.Drafting:
        return decoding.Drafting(self.drafter, self.weights(kind))


@functools.cache
def trained(kind: str) -> Any:
    """The weights of the target, as numpy: the same for every law."""
    return lively(KINDS[kind])


@functools.cache
def prepared(kind: str, mesh: Any) -> Any:
    """The target's weights as decoding reads them, on the mesh in force."""
    return decoding.prepare(KINDS[kind], trained(kind))


def request(
    kind: str, decode: config.Decode, order=EVERY, eos: int = NEVER, limit=None
) -> decoding.Request:
    """To continue the rows `order` of EXAMPLES, with a limit for each if given."""
    examples = [EXAMPLES[row] for row in order]
    made = decoding.request(KINDS[kind], examples, decode, rows=list(order), eos=eos)
    return made if limit is None else made._replace(limit=np.array(limit, np.int32))


def write(
    kind: str, decode: config.Decode, drafting: decoding.Drafting = generation.PLAIN, **given: Any
) -> decoding.Result:
    """What the rows of EXAMPLES become; given is what `request` takes."""
    params = prepared(kind, jax.sharding.get_mesh())
    return decoding.generate(KINDS[kind], params, request(kind, decode, **given), decode, drafting)


@functools.cache
def plain(kind: str, decode: config.Decode, eos: int = NEVER, limit=None) -> decoding.Result:
    """What plain decoding writes on one device; limit is a tuple."""
    use_one_device()
    return write(kind, decode, eos=eos, limit=limit)


def same(found: decoding.Result, plain: decoding.Result) -> None:
    """The ids are the same, and they took no more calls."""
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_array_equal(found.lengths, plain.lengths)
    np.testing.assert_allclose(found.log_probability, plain.log_probability, atol=1e-3)
    assert found.calls <= plain.calls


def greedy_text_is_that_of_plain_decoding(drafted: Drafted) -> None:
    use_one_device()
    for kind in drafted.kinds:
        same(write(kind, GREEDY, drafted.drafting(kind)), plain(kind, GREEDY))


def sampled_text_is_that_of_plain_decoding(drafted: Drafted) -> None:
    use_one_device()
    kind = drafted.kinds[0]
    same(write(kind, SAMPLED, drafted.drafting(kind)), plain(kind, SAMPLED))


def eos_inside_a_block_ends_a_text_there(drafted: Drafted) -> None:
    use_one_device()
    for kind in drafted.kinds:
        free = plain(kind, GREEDY).tokens[:, 0]
        for eos in sorted(set(free[:, LENGTH // 2].tolist()))[:4]:
            same(write(kind, GREEDY, drafted.drafting(kind), eos=eos), plain(kind, GREEDY, eos))


def limits_inside_a_block_end_a_text_there(drafted: Drafted) -> None:
    use_one_device()
    limit = (3, 0, LENGTH, 1, 14, 23, 2, 7)
    for kind in drafted.kinds:
        found = write(kind, GREEDY, drafted.drafting(kind), limit=limit)
        assert found.lengths[:, 0].tolist() == list(limit)
        same(found, plain(kind, GREEDY, limit=limit))


def a_row_depends_on_no_other_row_nor_on_its_place(drafted: Drafted) -> None:
    """Not only its text: which call wrote what, and by whose guess, is a row's own affair."""
    use_one_device()
    order = (4, 2, 2, 0, 7, 5, 3, 2)
    for kind in drafted.kinds:
        together = write(kind, GREEDY, drafted.drafting(kind))
        mixed = write(kind, GREEDY, drafted.drafting(kind), order=order)
        for place, row in enumerate(order):
            np.testing.assert_array_equal(mixed.tokens[place], together.tokens[row])
            np.testing.assert_array_equal(mixed.call[place], together.call[row])
            np.testing.assert_array_equal(mixed.node[place], together.node[row])


def a_mesh_changes_no_token_and_no_guess(drafted: Drafted) -> None:
    kind = drafted.causal
    use_one_device()
    alone = write(kind, GREEDY, drafted.drafting(kind))
    sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    split = write(kind, GREEDY, drafted.drafting(kind))
    np.testing.assert_array_equal(split.tokens, alone.tokens)
    np.testing.assert_array_equal(split.node, alone.node)
    assert split.calls == alone.calls


def the_cache_is_that_of_plain_decoding(drafted: Drafted) -> None:
    """Which is that of a fresh prefill (test_decoding_loop); what is in it is not written again."""
    *_, drafts = steps(drafted, drafted.causal)
    found, plain = drafts.after, plainly(drafted.causal)
    np.testing.assert_array_equal(found.length, plain.length)
    for ours, theirs in zip(*map(jax.tree.leaves, (found.cache, plain.cache)), strict=True):
        for row, filled in enumerate(plain.length):
            np.testing.assert_allclose(ours[row, :, :filled], theirs[row, :, :filled], atol=2e-5)


LAWS = (
    greedy_text_is_that_of_plain_decoding,
    sampled_text_is_that_of_plain_decoding,
    eos_inside_a_block_ends_a_text_there,
    limits_inside_a_block_end_a_text_there,
    a_row_depends_on_no_other_row_nor_on_its_place,
    a_mesh_changes_no_token_and_no_guess,
    the_cache_is_that_of_plain_decoding,
)


class Step(NamedTuple):
    """One call: the state before it, the guesses, what the model said, the state after it."""

    before: protocol.State
    draft: protocol.Draft
    verdict: protocol.Verdict
    after: protocol.State


@functools.cache
def plainly(kind: str) -> protocol.State:
    """The last state of plain decoding."""
    *_, last = steps(Drafted(loop.Plain()), kind)
    return last.after


class Asked(NamedTuple):
    """The arguments of a program: weights, the request on the mesh, and how rows draw (or None)."""

    params: Any
    request: decoding.Request
    draws: Any
    weights: Any


@functools.cache
def programs(drafter: protocol.Drafter, kind: str, slots: int) -> tuple[Callable, Callable]:
    """begin(asked) -> (read, the first state), and call(asked, read, state) -> draft, verdict and
    the next state: jitted, once for all tests of a file."""
    cfg = KINDS[kind]

    def opened(asked, read):
        params, given, draws, weights = asked
        rules = protocol.Rules(NEVER, given.prompts_length + given.limit, draws)
        inputs = (given.inputs, given.inputs_length)
        prompts = protocol.Prompts(given.prompts, given.prompts_length)
        own = target.of(cfg, params, read)
        return protocol.Setting(own, rules, prompts, *inputs, weights, slots)

    @jax.jit
    def begin(asked):
        read, given = model.Read(), asked.request
        if given.inputs is not None:
            read = target.read(cfg, asked.params, given.inputs, given.inputs_length)
        setting = opened(asked, read)
        cache = target.prefill(cfg, asked.params, read, setting.prompts, slots)
        return read, generation.started(setting, cache, slots, drafter.begin(setting))

    @jax.jit
    def call(asked, read, state):
        setting = opened(asked, read)
        draft, memory = drafter.propose(setting, state.memory, state)
        verdict, cache = loop.verify(setting, drafter, acceptance.Exact(), state, draft)
        after = loop.commit(state._replace(cache=cache), drafter.tree, verdict, setting.rules)
        memory = drafter.observe(setting, memory, after, verdict)
        return draft, verdict, after._replace(memory=memory)

    return begin, call


def steps(drafted: Drafted, kind: str, decode: config.Decode = GREEDY) -> Iterator[Step]:
    """The loop's calls for EXAMPLES one by one, as numpy, on one device."""
    use_one_device()
    asked = request(kind, decode)
    draws = generation.place(generation.draw(asked, decode)) if decode.temperature else None
    asked = generation.place(asked._replace(eos=None))
    slots = asked.prompts.shape[1] + LENGTH + drafted.drafter.tree.width
    begin, call = programs(drafted.drafter, kind, slots)
    params = prepared(kind, jax.sharding.get_mesh())
    given = Asked(params, asked, draws, drafted.weights(kind))
    read, state = begin(given)
    while not np.all(state.done):
        draft, verdict, after = call(given, read, state)
        yield jax.device_get(Step(state, draft, verdict, after))
        state = after
    for row, text in enumerate(plain(kind, decode).tokens[:, 0]):
        first = int(asked.prompts_length[row])
        np.testing.assert_array_equal(state.tokens[row, first : first + LENGTH], text)
