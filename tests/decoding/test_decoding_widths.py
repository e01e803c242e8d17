# SPDX-License-Identifier: Apache-2.0
"""Laws of adaptive draft lengths: the text stays, drafts that pay are verified, others are not."""

import dataclasses
import functools
import json
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mark_exhaustive
from decoding_laws import KINDS, LAWS, DrafterCase, greedy_text_is_that_of_plain_decoding, trained
from test_decoding_acceptance import NEVER, table_target
from test_decoding_loop import EXAMPLES, GREEDY, use_one_device

from t5x_lite import decoding
from t5x_lite.decoding import generation, protocol, streaming
from t5x_lite.decoding.acceptance import exact
from t5x_lite.decoding.adaptive import adaptive_loop, draft_lengths, latency
from t5x_lite.decoding.adaptive.drafter import ANY_WIDTH, Adaptive, AdaptiveState, CostModel
from t5x_lite.decoding.drafters import lookup, trigram
from t5x_lite.decoding.drafters.draft_model import DraftModel
from t5x_lite.decoding.drafters.early_exit import EarlyExit
from t5x_lite.decoding.drafters.recycling import CHANCES, Recycling
from t5x_lite.decoding.drafters.trees import best_tree
from t5x_lite.decoding.protocol import chain
from t5x_lite.utils import latency_table

CHEAP = (1.0, 1.3, 1.6)
LENGTH = 60


def cost_model(seconds=CHEAP, drafter=None, fixed=ANY_WIDTH, plain=None):
    plain = np.float32(seconds[0] if plain is None else plain)
    return CostModel(np.array(seconds, np.float32), plain, np.int32(fixed), drafter)


def adaptive(floor):
    return Adaptive(lookup.Lookup(chain(8)), (1, 3, 8), floor, 0.25 if floor > 1 else 0.6)


CASES = {
    "each": DrafterCase(adaptive(1), lambda kind: cost_model(), ("encoder_decoder",)),
    "ahead": DrafterCase(adaptive(8), lambda kind: cost_model(), ("decoder_only",)),
    "resting": DrafterCase(
        adaptive(8), lambda kind: cost_model((1.9, 2.0, 2.1), plain=1.0), ("encoder_decoder",)
    ),
}
JOINED = KINDS["decoder_only"]
# Drafters of other kinds: with the model's own cache, one of their own, a tree.
OTHERS = {
    "early": DrafterCase(
        Adaptive(EarlyExit(1, chain(4)), (1, 4)),
        lambda kind: cost_model((1, 1.2)),
        ("deep decoder_only",),
    ),
    "draft": DrafterCase(
        Adaptive(DraftModel(JOINED, JOINED, chain(4)), (1, 4), floor=2),
        lambda kind: cost_model((1, 1.2), decoding.prepare_params(JOINED, trained("decoder_only"))),
        ("decoder_only",),
    ),
    "recycling": DrafterCase(
        Adaptive(Recycling(best_tree(8, CHANCES)), (1, 8), floor=8),
        lambda kind: cost_model((1, 1.2)),
        ("decoder_only",),
    ),
}
# Rows share the width of a step: the text of a row depends on no other row, its steps may.
SHARED = {"a_row_depends_on_no_other_row_nor_on_its_place"}


WHOLE = [law for law in LAWS if law.__name__ not in SHARED]
# The laws that could differ for other floors: every law compiles a program of three models.
SOME = [law for law in WHOLE if law.__name__.startswith(("greedy", "sampled", "limits"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, law",
    [
        *(("ahead", law) for law in WHOLE),
        *mark_exhaustive(
            [(name, law) for name in ("each", "resting") for law in SOME],
            kept=[("each", SOME[1]), ("resting", SOME[0])],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_laws(name, law):
    law(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", mark_exhaustive(OTHERS, kept=["draft", "recycling"]))
def test_any_drafter_may_be_adaptive(name):
    greedy_text_is_that_of_plain_decoding(OTHERS[name])


@pytest.mark.slow
@pytest.mark.parametrize("floor", mark_exhaustive([1, 3], kept=[3]))
def test_an_adaptive_stream_ends_with_the_same_text(floor):
    use_one_device()
    drafter = Adaptive(lookup.Lookup(chain(3)), (1, 3), floor)
    drafting = decoding.Drafting(drafter, cost_model((1, 1.2)))
    params = decoding.prepare_params(JOINED, trained("decoder_only"))
    request = decoding.make_request(JOINED, EXAMPLES, GREEDY, eos=NEVER)
    plain = decoding.generate(JOINED, params, request, GREEDY)
    *earlier, last = streaming.stream(JOINED, params, request, GREEDY, drafting, every=3)
    np.testing.assert_array_equal(last.tokens, plain.tokens)
    assert [part.steps for part in earlier] == [3 * (i + 1) for i in range(len(earlier))]
    for part in earlier:
        for row, length in enumerate(part.lengths[:, 0]):
            assert part.tokens[row, 0, :length].tolist() == plain.tokens[row, 0, :length].tolist()


@dataclass(frozen=True)
class Truth:
    """Drafts the next tokens of the table, or others: weights [b T] are 1 at the slots whose drafts
    are right."""

    tree: protocol.Tree = chain(8)
    top: int = 0

    def begin(self, context):
        return context.weights

    def propose(self, context, drafter_state, state):
        begin = state.length[:, None] + 1 + np.arange(self.tree.width - 1)
        right = jax.vmap(lambda row, at: row[at])(drafter_state, begin)
        # The next token of the table below is the position itself, modulo 5.
        return protocol.Draft(jnp.where(right > 0, begin % 5, (begin + 1) % 5)), drafter_state

    def observe(self, context, drafter_state, state, output):
        return drafter_state


def counting():
    """Returns a model whose tokens are their positions modulo 5."""
    table = np.zeros((LENGTH + 20, 5, 5), np.float32)
    for position in range(len(table)):
        table[position, :, (position + 1) % 5] = 9
    return table_target(table)


def chosen_widths(right, seconds=CHEAP, floor=8, limit=LENGTH, fixed=ANY_WIDTH, plain=None):
    """Returns the width of every step, 0 for a step without drafting.

    Args:
      right: [b T] script of right drafts.
      seconds: latency of each width.
      floor: steps of plain decoding before drafting is tried again.
      limit: most new tokens, of all rows or of each.
      fixed: a width that is always used, or ANY_WIDTH.
      plain: latency of a plain step; None for that of width 1.
    """
    use_one_device()
    drafter = Adaptive(Truth(), (1, 3, 8), floor, 0.25 if floor == 8 else 0.6)
    rows = len(right)
    script = np.zeros((rows, LENGTH + 30), np.int32)
    script[:, : right.shape[1]] = right
    prompts = protocol.Prompts(np.zeros((rows, 1), np.int32), np.ones(rows, np.int32))
    limits = np.broadcast_to(np.array(limit, np.int32), (rows,)) + 1
    arrays = generation.shard_rows((prompts, limits, script))
    costs = cost_model(seconds, None, fixed, plain)

    def make_context(arrays):
        prompts, limits, script = arrays
        stopping = protocol.StoppingCriteria(NEVER, limits)
        weights = costs._replace(drafter_weights=script)
        return protocol.DecodeContext(counting(), stopping, prompts, weights=weights)

    def begin(arrays):
        context = make_context(arrays)
        state = generation.initial_state(context, None, LENGTH + 20, drafter.begin(context))
        return adaptive_loop.choose_next_width(context, drafter, state)

    def run_step(number, arrays, state):
        context = make_context(arrays)
        if number == draft_lengths.DISABLED:
            state = adaptive_loop.plain_step(context, drafter, exact.Exact(), state)
            return adaptive_loop.resume_drafting(context, drafter, state)
        return adaptive_loop.adaptive_step(context, drafter, exact.Exact(), number, state)

    numbers = range(draft_lengths.DISABLED, 3)
    steps = {number: jax.jit(functools.partial(run_step, number)) for number in numbers}
    state, widths = jax.jit(begin)(arrays), []
    while not bool(state.done.all()):
        number = int(state.drafter_state.width_index)
        widths.append(0 if number == draft_lengths.DISABLED else drafter.widths[number])
        state = steps[number](arrays, state)
    for row, written in enumerate(np.asarray(state.tokens)):
        length = int(limits[row])
        np.testing.assert_array_equal(written[:length], np.arange(length) % 5)
    return widths


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [CHEAP, (1.0, 1.05, 1.1), (1.0, 2.0, 4.0)])
@pytest.mark.parametrize("floor", mark_exhaustive([1, 8], kept=[8]))
def test_whatever_the_drafts_are_worth_they_cost_5_percent_at_most(floor, seconds):
    cost = dict(zip((1, 3, 8), seconds, strict=True))
    random = np.random.default_rng(3)
    for right in (0.0, 0.15, 0.3):
        widths = chosen_widths(random.random((1, LENGTH + 30)) < right, seconds, floor)
        assert sum(cost[width] for width in widths) <= 1.05 * LENGTH


@pytest.mark.parametrize("floor", [1, 8])
def test_drafts_that_are_always_accepted_are_verified_at_full_width(floor):
    widths = chosen_widths(np.ones((1, LENGTH)), floor=floor)
    assert widths.count(8) >= 6
    assert len(widths) <= 12


@pytest.mark.parametrize("right", [0.0, 0.3, 1.0])
def test_where_drafting_itself_is_expensive_it_is_disabled(right):
    cost = {0: 1.0, 1: 1.3, 3: 1.5, 8: 1.8}
    script = np.random.default_rng(5).random((1, LENGTH + 30)) < right
    widths = chosen_widths(script, (1.3, 1.5, 1.8), plain=1.0)
    if right == 1:
        assert widths.count(8) >= 6 and len(widths) <= 12
        return
    assert widths.count(0) > LENGTH / 2 and len(widths) - widths.count(0) >= 4
    assert sum(cost[width] for width in widths) <= 1.05 * LENGTH


def test_what_costs_too_much_is_not_verified():
    assert set(chosen_widths(np.ones((1, LENGTH)), seconds=(1, 9, 9))) == {1}
    assert 3 not in chosen_widths(np.ones((1, LENGTH)), seconds=(1, 5, 2))


@pytest.mark.parametrize("floor", [1, 8])
@pytest.mark.parametrize("number, width", [(0, 1), (1, 3), (2, 8)])
def test_a_fixed_width_is_that_of_every_step_whatever_it_costs(floor, number, width):
    script = np.random.default_rng(1).random((1, LENGTH + 30)) < 0.3
    widths = chosen_widths(script, (1, 50, 90), floor, fixed=number)
    assert set(widths) == {width}


def test_a_drafter_that_gets_worse_is_given_up_and_one_that_gets_better_is_used():
    right = np.zeros((1, LENGTH))
    right[:, :24] = 1
    widths = chosen_widths(right)
    assert max(widths[:6]) == 8
    assert widths[-20:].count(1) >= 17
    widths = chosen_widths(1 - right)
    assert widths[:20].count(1) >= 18
    assert max(widths[-5:]) > 1


def test_a_row_that_is_done_does_not_count():
    right = np.stack([np.zeros(LENGTH), np.ones(LENGTH)])
    both = chosen_widths(right, limit=(3, LENGTH))
    assert max(both) == 8
    alone = chosen_widths(right, limit=(LENGTH, 3))
    assert alone[6:].count(1) >= len(alone) - 10


def test_the_slowest_row_decides():
    """After two tries, the last row decides, whose drafts are wrong."""
    widths = chosen_widths(np.stack([np.ones(LENGTH + 30), np.zeros(LENGTH + 30)]))
    assert len(widths) == LENGTH and set(widths[2:]) == {1}


def test_no_wider_than_there_is_room():
    assert max(chosen_widths(np.ones((1, LENGTH)), limit=1)) == 1
    assert chosen_widths(np.ones((1, LENGTH)), limit=20)[-1] <= 8


@pytest.mark.parametrize("seed", range(4))
def test_accepted_drafts_are_counted_as_in_python(seed):
    use_one_device()
    random = np.random.default_rng(seed)
    width = int(random.integers(2, 9))
    tree = protocol.Tree((-1, *(int(random.integers(0, node)) for node in range(1, width))))
    drafts = random.integers(-1, 3, (6, width - 1)).astype(np.int32)
    text = random.integers(0, 3, (6, 4)).astype(np.int32)
    count = random.integers(0, 5, 6).astype(np.int32)
    zeros = jnp.zeros((6, 2))
    before = AdaptiveState(None, None, zeros, zeros, jnp.int32(0), jnp.float32(0), jnp.int32(0))
    output = protocol.VerifyOutput(*[None] * 4, None, jnp.array(text), None, jnp.array(count))
    after = draft_lengths.count_accepted(before, tree, protocol.Draft(jnp.array(drafts)), output)

    def by_level(levels):
        return [float(1 in levels), float(len(levels - {1}))]

    for row in range(6):
        path, accepted, drafted = [True], set(), set()
        for node, parent in enumerate(tree.parents[1:], start=1):
            depth, draft = int(tree.depth[node]), int(drafts[row, node - 1])
            exists = depth <= count[row]
            equal = path[parent] and exists and draft == text[row, depth - 1]
            path.append(equal)
            drafted |= {depth} if path[parent] and draft >= 0 and exists else set()
            accepted |= {depth} if equal else set()
        np.testing.assert_allclose(after.accepted[row], by_level(accepted))
        np.testing.assert_allclose(after.drafted[row], by_level(drafted))


@pytest.mark.parametrize("widths", [(2, 8), (1, 4), (1, 8, 4), (1, 8, 8), ()])
def test_widths_that_do_not_rise_from_1_to_the_whole_tree_are_refused(widths):
    with pytest.raises(ValueError, match="must rise from 1"):
        Adaptive(lookup.Lookup(chain(8)), widths)


def test_the_shortest_of_a_few_measurements_counts_and_wider_blocks_are_never_cheaper():
    timer = latency.StepTimer(3)
    measured = []
    while (number := timer.next_width()) is not None:
        measured.append(number)
        timer.record(number, 1.0, 0)  # every row had ended: no measurement
        timer.record(number, (8.0, 4.0, 16.0)[number] * len(measured), 4)
    assert measured == [0, 1, 2] * latency.ROUNDS
    assert timer.seconds(0.5) == [1.5, 2.0, 2.0, 12.0]
    assert timer.seconds(9.0)[0] == 0.5  # an overhead cannot be more than most of a step


@pytest.mark.slow
@pytest.mark.parametrize(
    "drafter, kind",
    [
        (lookup.Lookup(chain(8)), "encoder_decoder"),
        (Recycling(best_tree(8, CHANCES)), "decoder_only"),
    ],
)
def test_the_noop_model_takes_a_step_per_token_at_width_1(drafter, kind):
    use_one_device()
    drafting = decoding.Drafting(Adaptive(drafter, (1, 8), 8))
    request = decoding.make_request(KINDS[kind], EXAMPLES, GREEDY)
    rows = generation.shard_rows(request._replace(eos=None))
    for number in (0, 1):
        weights = latency.measuring_costs(drafting, number).weights
        program = generation.DecodeProgram(
            None, GREEDY.max_new_tokens, 1, 1, drafting.drafter, exact.Exact()
        )
        steps = latency.run_noop_model(program, rows, weights)
        assert 0 < steps <= np.max(request.limit)
        assert number or steps == np.max(request.limit)
    assert 0 <= latency.measure_draft_overhead(request, GREEDY, drafting) < 1


def test_another_batch_or_drafter_has_another_key():
    use_one_device()
    cfg = JOINED

    def rows(count):
        return decoding.make_request(cfg, EXAMPLES[:count], GREEDY)

    drafting = decoding.Drafting(adaptive(8))
    names = {latency.price_key(cfg, None, rows(count), GREEDY, drafting) for count in (1, 2, 2)}
    assert len(names) == 2
    assert (
        latency.price_key(cfg, None, rows(1), GREEDY, decoding.Drafting(adaptive(1))) not in names
    )
    long = dataclasses.replace(GREEDY, max_new_tokens=300)
    near = dataclasses.replace(GREEDY, max_new_tokens=GREEDY.max_new_tokens - 9)
    assert latency.price_key(cfg, None, rows(1), near, drafting) in names
    assert latency.price_key(cfg, None, rows(1), long, drafting) not in names
    trees = [drafter(chain(8)) for drafter in (lookup.Lookup, trigram.Trigram)]
    each = [decoding.Drafting(Adaptive(drafter, (1, 8))) for drafter in trees]
    assert len({latency.price_key(cfg, None, rows(1), GREEDY, drafting) for drafting in each}) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": "b"}', '{"a": [1, "x"]}', "null"])
def test_a_damaged_table_is_replaced(tmp_path, content):
    path = tmp_path / "costs.json"
    path.write_text(content)
    assert latency_table.read_table(path) == {}
    latency_table.save_row(path, "b", [0.5, 0.75])
    assert json.loads(path.read_text()) == {"b": [0.5, 0.75]}


def test_latencies_are_returned_where_they_cannot_be_kept(tmp_path):
    (tmp_path / "file").write_text("")
    assert latency_table.save_row(tmp_path / "file" / "costs.json", "a", [1.0]) == {"a": [1.0]}
