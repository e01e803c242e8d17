# SPDX-License-Identifier: Apache-2.0
"""Laws of the choice of width: the text stays, guesses that pay are verified, others are not."""

import dataclasses
import json
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_laws import KINDS, LAWS, Drafted, greedy_text_is_that_of_plain_decoding, trained
from test_decoding_acceptance import NEVER, table_target
from test_decoding_loop import EXAMPLES, GREEDY, use_one_device

from t5x_lite import decoding
from t5x_lite.decoding import acceptance, costs, generation, protocol, streaming, widths
from t5x_lite.decoding.drafters import lookup, trigram
from t5x_lite.decoding.drafters.draft_model import DraftModel
from t5x_lite.decoding.drafters.early_exit import EarlyExit
from t5x_lite.decoding.drafters.recycling import CHANCES, Recycling
from t5x_lite.decoding.drafters.trees import likeliest
from t5x_lite.decoding.protocol import chain

CHEAP = (1.0, 1.3, 1.6)
LENGTH = 60


def priced(seconds=CHEAP, drafter=None, blind=False, plain=None):
    plain = np.float32(seconds[0] if plain is None else plain)
    return widths.Priced(np.array(seconds, np.float32), plain, np.bool_(blind), drafter)


def adaptive(floor):
    return widths.Adaptive(lookup.Lookup(chain(8)), (1, 3, 8), floor, 0.25 if floor > 1 else 0.6)


CASES = {
    "each": Drafted(adaptive(1), lambda kind: priced(), ("pair",)),
    "ahead": Drafted(adaptive(8), lambda kind: priced(), ("joined",)),
    "resting": Drafted(adaptive(8), lambda kind: priced((1.9, 2.0, 2.1), plain=1.0), ("pair",)),
}
JOINED = KINDS["joined"]
# Drafters of other kinds: with the model's own cache, one of their own, a tree.
OTHERS = {
    "early": Drafted(
        widths.Adaptive(EarlyExit(1, chain(4)), (1, 4)),
        lambda kind: priced((1, 1.2)),
        ("deep joined",),
    ),
    "draft": Drafted(
        widths.Adaptive(DraftModel(JOINED, JOINED, chain(4)), (1, 4), floor=2),
        lambda kind: priced((1, 1.2), decoding.prepare(JOINED, trained("joined"))),
        ("joined",),
    ),
    "recycling": Drafted(
        widths.Adaptive(Recycling(likeliest(8, CHANCES)), (1, 8), floor=8),
        lambda kind: priced((1, 1.2)),
        ("joined",),
    ),
}
# Rows share the width of a call: what each writes depends on no other row, when it does may.
SHARED = {"a_row_depends_on_no_other_row_nor_on_its_place", "the_cache_is_that_of_a_fresh_prefill"}


WHOLE = [law for law in LAWS if law.__name__ not in SHARED]
# Of the other order, what could differ: every law compiles a program of three models.
SOME = [law for law in WHOLE if law.__name__.startswith(("greedy", "sampled", "limits"))]


@pytest.mark.parametrize(
    "name, law",
    [*(("ahead", law) for law in WHOLE), *((n, law) for n in ("each", "resting") for law in SOME)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_laws(name, law):
    law(CASES[name])


@pytest.mark.parametrize("name", OTHERS)
def test_any_drafter_may_be_adaptive(name):
    greedy_text_is_that_of_plain_decoding(OTHERS[name])


@pytest.mark.parametrize("floor", [1, 3])
def test_a_stream_with_a_choice_of_widths_ends_with_the_same_text(floor):
    use_one_device()
    drafter = widths.Adaptive(lookup.Lookup(chain(3)), (1, 3), floor)
    drafting = decoding.Drafting(drafter, priced((1, 1.2)))
    params = decoding.prepare(JOINED, trained("joined"))
    request = decoding.request(JOINED, EXAMPLES, GREEDY, eos=NEVER)
    plain = decoding.generate(JOINED, params, request, GREEDY)
    *earlier, last = streaming.stream(JOINED, params, request, GREEDY, drafting, every=3)
    np.testing.assert_array_equal(last.tokens, plain.tokens)
    assert [part.calls for part in earlier] == [3 * (i + 1) for i in range(len(earlier))]
    for part in earlier:
        for row, length in enumerate(part.lengths[:, 0]):
            assert part.tokens[row, 0, :length].tolist() == plain.tokens[row, 0, :length].tolist()


@dataclass(frozen=True)
class Truth:
    """Guesses what the table writes next, or something else in the rows and places of a script:
    weights [b T] is 1 where the guess of a slot's token is right."""

    tree: protocol.Tree = chain(8)
    top: int = 0

    def begin(self, setting):
        return setting.weights

    def propose(self, setting, memory, state):
        begin = state.length[:, None] + 1 + np.arange(self.tree.width - 1)
        right = jax.vmap(lambda row, at: row[at])(memory, begin)
        # The table below writes the position itself, modulo 5.
        return protocol.Draft(jnp.where(right > 0, begin % 5, (begin + 1) % 5)), memory

    def observe(self, setting, memory, state, verdict):
        return memory


def counting():
    """The model that writes its position modulo 5."""
    table = np.zeros((LENGTH + 20, 5, 5), np.float32)
    for position in range(len(table)):
        table[position, :, (position + 1) % 5] = 9
    return table_target(table)


def chosen(right, seconds=CHEAP, floor=8, limit=LENGTH, blind=False, plain=None):
    """The width of every call, while rows are written with guesses that are right where told; 0
    where nothing was guessed."""
    use_one_device()
    made = widths.Adaptive(Truth(), (1, 3, 8), floor, 0.25 if floor == 8 else 0.6)
    rows = len(right)
    script = np.zeros((rows, LENGTH + 30), np.int32)
    script[:, : right.shape[1]] = right
    prompts = protocol.Prompts(np.zeros((rows, 1), np.int32), np.ones(rows, np.int32))
    limits = np.broadcast_to(np.array(limit, np.int32), (rows,)) + 1
    given = generation.place((prompts, limits, script))
    price = priced(seconds, None, blind, plain)

    def setting(given):
        prompts, limits, script = given
        rules = protocol.Rules(NEVER, limits, None)
        own = price._replace(drafter=script)
        return protocol.Setting(counting(), rules, prompts, weights=own)

    def opened(given):
        asked = setting(given)
        state = generation.started(asked, None, LENGTH + 20, made.begin(asked))
        return widths.decided(asked, made, state)

    def one(number, given, state):
        if number == widths.RESTING:
            state = widths.plain_call(setting(given), made, acceptance.Exact(), state)
            return widths.awake(setting(given), made, state)
        return widths.one_call(setting(given), made, acceptance.Exact(), number, state)

    numbers = range(widths.RESTING, 3)
    calls = {n: jax.jit(lambda given, state, n=n: one(n, given, state)) for n in numbers}
    state, found = jax.jit(opened)(given), []
    while not bool(state.done.all()):
        number = int(state.memory.width)
        found.append(0 if number == widths.RESTING else made.widths[number])
        state = calls[number](given, state)
    for row, written in enumerate(np.asarray(state.tokens)):
        length = int(limits[row])
        np.testing.assert_array_equal(written[:length], np.arange(length) % 5)
    return found


@pytest.mark.parametrize("seconds", [CHEAP, (1.0, 1.05, 1.1), (1.0, 2.0, 4.0)])
@pytest.mark.parametrize("floor", [1, 8])
def test_whatever_the_guesses_are_worth_they_cost_5_percent_at_most(floor, seconds):
    price = dict(zip((1, 3, 8), seconds, strict=True))
    random = np.random.default_rng(3)
    for right in (0.0, 0.15, 0.3):
        found = chosen(random.random((1, LENGTH + 30)) < right, seconds, floor)
        assert sum(price[width] for width in found) <= 1.05 * LENGTH


@pytest.mark.parametrize("floor", [1, 8])
def test_guesses_that_always_hold_are_verified_at_full_width(floor):
    found = chosen(np.ones((1, LENGTH)), floor=floor)
    assert found.count(8) >= 6
    assert len(found) <= 12


@pytest.mark.parametrize("right", [0.0, 0.3, 1.0])
def test_where_guessing_itself_is_dear_the_drafter_rests(right):
    price = {0: 1.0, 1: 1.3, 3: 1.5, 8: 1.8}
    script = np.random.default_rng(5).random((1, LENGTH + 30)) < right
    found = chosen(script, (1.3, 1.5, 1.8), plain=1.0)
    if right == 1:
        assert found.count(8) >= 6 and len(found) <= 12
        return
    assert found.count(0) > LENGTH / 2 and len(found) - found.count(0) >= 4
    assert sum(price[width] for width in found) <= 1.05 * LENGTH


def test_what_costs_too_much_is_not_verified():
    assert set(chosen(np.ones((1, LENGTH)), seconds=(1, 9, 9))) == {1}
    assert 3 not in chosen(np.ones((1, LENGTH)), seconds=(1, 5, 2))


def test_prices_of_infinity_force_a_width_and_blind_guesses_hold_nowhere():
    forced = chosen(np.ones((1, LENGTH)), seconds=(np.inf, 1, np.inf), blind=True)
    assert forced == [3] * LENGTH


def test_a_drafter_that_goes_wrong_is_left_and_one_that_comes_right_is_taken_up():
    right = np.zeros((1, LENGTH))
    right[:, :24] = 1
    found = chosen(right)
    assert max(found[:6]) == 8
    assert found[-20:].count(1) >= 17
    found = chosen(1 - right)
    assert found[:20].count(1) >= 18
    assert max(found[-5:]) > 1


def test_a_row_that_is_done_has_no_say():
    right = np.stack([np.zeros(LENGTH), np.ones(LENGTH)])
    both = chosen(right, limit=(3, LENGTH))
    assert max(both) == 8
    alone = chosen(right, limit=(LENGTH, 3))
    assert alone[6:].count(1) >= len(alone) - 10


def test_a_row_that_is_ahead_is_not_paid_for():
    """Two tries; then the last row decides, whose guesses are wrong."""
    found = chosen(np.stack([np.ones(LENGTH + 30), np.zeros(LENGTH + 30)]))
    assert len(found) == LENGTH and set(found[2:]) == {1}


def test_no_wider_than_there_is_room():
    assert max(chosen(np.ones((1, LENGTH)), limit=1)) == 1
    assert chosen(np.ones((1, LENGTH)), limit=20)[-1] <= 8


@pytest.mark.parametrize("seed", range(4))
def test_what_became_of_guesses_is_counted_as_in_python(seed):
    use_one_device()
    random = np.random.default_rng(seed)
    width = int(random.integers(2, 9))
    tree = protocol.Tree((-1, *(int(random.integers(0, node)) for node in range(1, width))))
    guesses = random.integers(-1, 3, (6, width - 1)).astype(np.int32)
    written = random.integers(0, 3, (6, 4)).astype(np.int32)
    count = random.integers(0, 5, 6).astype(np.int32)
    nothing = jnp.zeros((6, 2))
    tracked = widths.Tracked(
        None, None, nothing, nothing, jnp.int32(0), jnp.float32(0), jnp.int32(0)
    )
    verdict = protocol.Verdict(*[None] * 4, None, jnp.array(written), None, jnp.array(count))
    found = widths.counted(tracked, tree, protocol.Draft(jnp.array(guesses)), verdict)
    for row in range(6):
        holds, right, judged = [True], set(), set()
        for node, parent in enumerate(tree.parents[1:], start=1):
            depth, guess = int(tree.depth[node]), int(guesses[row, node - 1])
            there = depth <= count[row]
            asked = holds[parent] and guess >= 0 and there
            true = holds[parent] and there and guess == written[row, depth - 1]
            holds.append(true)
            judged |= {depth} if asked else set()
            right |= {depth} if true else set()
        tally = lambda levels: [float(1 in levels), float(len(levels - {1}))]
        np.testing.assert_allclose(found.right[row], tally(right))
        np.testing.assert_allclose(found.judged[row], tally(judged))


@pytest.mark.parametrize("given", [(2, 8), (1, 4), (1, 8, 4), (1, 8, 8), ()])
def test_widths_that_cannot_be_are_refused(given):
    with pytest.raises(ValueError, match="must rise from 1"):
        widths.Adaptive(lookup.Lookup(chain(8)), given)


def test_prices_are_measured_once_and_kept(monkeypatch, tmp_path):
    use_one_device()
    monkeypatch.setenv(costs.VARIABLE, str(tmp_path / "kept" / "costs.json"))
    cfg, params = JOINED, decoding.prepare(JOINED, trained("joined"))
    request = decoding.request(cfg, EXAMPLES, GREEDY, eos=[NEVER, 3])
    drafter = widths.Adaptive(lookup.Lookup(chain(3)), (1, 3), 3)
    given = (cfg, params, request, GREEDY, decoding.Drafting(drafter))
    first = costs.priced(*given)
    seconds = first.weights.seconds
    assert seconds.shape == (2,) and 0 < seconds[0] <= seconds[1] < 60
    monkeypatch.setattr(costs, "measured", lambda *given: pytest.fail("measured again"))
    again = costs.priced(*given)
    np.testing.assert_array_equal(again.weights.seconds, seconds)
    plain = decoding.generate(cfg, params, request, GREEDY)
    found = decoding.generate(cfg, params, request, GREEDY, again)
    np.testing.assert_array_equal(found.tokens, plain.tokens)


@pytest.mark.parametrize("opening, call", [(0.0, 1.0), (0.3, 0.002), (5.0, 0.1)])
def test_prices_are_those_of_calls_and_not_of_the_noise_of_what_comes_before(
    monkeypatch, opening, call
):
    """An opening that takes up to a tenth more, as those of small models do on busy machines."""
    use_one_device()
    length, drafter = 200, widths.Adaptive(lookup.Lookup(chain(4)), (1, 4), 4)
    prices, draw, clock = np.array([2 * call, 5 * call]), np.random.default_rng(0), [0.0]

    def generate(cfg, params, rows, decode, drafting):
        width = int(np.argmin(drafting.weights.seconds))
        clock[0] += opening * draw.uniform(1, 1.1) + prices[width] * (max(rows.limit) - 1)

    def silent(shape, rows, weights):
        guesses = shape.drafter is not generation.PLAIN.drafter
        clock[0] += call * (draw.uniform(1, 1.1) + guesses * np.max(rows.limit))

    monkeypatch.setattr(costs.generation, "generate", generate)
    monkeypatch.setattr(costs, "silent", silent)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: clock[0])
    greedy = dataclasses.replace(GREEDY, length=length)
    request = decoding.request(JOINED, EXAMPLES, greedy)
    plain, *found = costs.measured(JOINED, None, request, greedy, decoding.Drafting(drafter))
    np.testing.assert_allclose(found, prices, rtol=0.15)
    np.testing.assert_allclose(found[0] - plain, call, rtol=0.15)


@pytest.mark.parametrize(
    "drafter, kind",
    [(lookup.Lookup(chain(8)), "pair"), (Recycling(likeliest(8, CHANCES)), "joined")],
)
def test_guesses_for_a_model_that_does_nothing_are_all_made_and_none_holds(drafter, kind):
    use_one_device()
    drafting = decoding.Drafting(widths.Adaptive(drafter, (1, 8), 8))
    request = decoding.request(KINDS[kind], EXAMPLES, GREEDY)
    rows = generation.place(request._replace(eos=None))
    for number in (widths.RESTING, 0, 1):
        weights = costs.with_prices(drafting, costs.only(number, 2), blind=True).weights
        shape = generation.Shape(None, GREEDY.length, 1, 1, drafting.drafter, acceptance.Exact())
        calls = costs.silent(shape, rows, weights)
        assert calls == np.max(request.limit)
    assert 0 <= costs.guessing(request, GREEDY, drafting) < 1


def test_another_batch_or_drafter_has_other_prices():
    use_one_device()
    cfg = JOINED
    asked = lambda count: decoding.request(cfg, EXAMPLES[:count], GREEDY)
    drafting = decoding.Drafting(adaptive(8))
    names = {costs.key(cfg, None, asked(count), GREEDY, drafting) for count in (1, 2, 2)}
    assert len(names) == 2
    assert costs.key(cfg, None, asked(1), GREEDY, decoding.Drafting(adaptive(1))) not in names
    trees = [drafter(chain(8)) for drafter in (lookup.Lookup, trigram.Trigram)]
    each = [decoding.Drafting(widths.Adaptive(drafter, (1, 8))) for drafter in trees]
    assert len({costs.key(cfg, None, asked(1), GREEDY, drafting) for drafting in each}) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": "b"}', '{"a": [1, "x"]}', "null"])
def test_a_table_that_is_broken_is_measured_anew(tmp_path, content):
    path = tmp_path / "costs.json"
    path.write_text(content)
    assert costs.read(path) == {}
    costs.remembered(path, "b", [0.5, 0.75])
    assert json.loads(path.read_text()) == {"b": [0.5, 0.75]}


def test_prices_are_known_where_they_cannot_be_kept(tmp_path):
    (tmp_path / "file").write_text("")
    assert costs.remembered(tmp_path / "file" / "costs.json", "a", [1.0]) == {"a": [1.0]}
