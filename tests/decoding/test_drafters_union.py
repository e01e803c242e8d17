# SPDX-License-Identifier: Apache-2.0
"""Unions: each drafter drafts as if it were alone, and observes the whole block."""

import itertools
from dataclasses import dataclass, field

import jax
import numpy as np
import pytest
from decoding_laws import (
    EXAMPLES,
    GREEDY,
    KINDS,
    LAWS,
    DrafterCase,
    last_plain_state,
    request_rows,
    steps,
    trained,
)
from test_decoding_loop import use_one_device
from test_drafters_models import CASES as CASES_OF_MODELS
from test_drafters_models import SMALL, Late, Uncached, draft_model_case, first_layers, small
from test_drafters_tables import RecyclingReference

from t5x_lite import decoding
from t5x_lite.decoding import generation, protocol
from t5x_lite.decoding.drafters import trees
from t5x_lite.decoding.drafters.jacobi import Jacobi
from t5x_lite.decoding.drafters.lookup import Lookup
from t5x_lite.decoding.drafters.recycling import CHANCES, Recycling
from t5x_lite.decoding.drafters.union import Union, draft_sources, union

RECYCLING = Recycling(trees.best_tree(7, CHANCES), top=4, slots=48)
THREE = union(Lookup(protocol.chain(4)), union(RECYCLING, Jacobi(protocol.chain(3), kept=4)))
CASES = {"three": DrafterCase(THREE, kinds=("decoder_only",))}


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_laws(law):
    law(CASES["three"])


def test_a_tree_of_its_own_for_each_under_one_root():
    assert THREE.tree.width == 12
    assert THREE.first_nodes == [1, 4, 10]
    assert THREE.top == 4
    assert draft_sources(THREE) == ("model", *["lookup"] * 3, *["recycling"] * 6, *["jacobi"] * 2)
    assert draft_sources(Lookup(protocol.chain(3))) == ("model", "lookup", "lookup")
    for first, drafter in zip(THREE.first_nodes, THREE.drafters, strict=True):
        for node, parent in enumerate(drafter.tree.parents[1:]):
            assert THREE.tree.parents[first + node] == (parent + first - 1 if parent else 0)


def test_a_union_of_one_drafts_as_that_one_alone():
    for lone, joined in zip(
        steps(DrafterCase(RECYCLING), "decoder_only"),
        steps(DrafterCase(Union((RECYCLING,))), "decoder_only"),
        strict=True,
    ):
        np.testing.assert_array_equal(joined.draft.tokens, lone.draft.tokens)
        np.testing.assert_array_equal(joined.after.token_node, lone.after.token_node)


def test_a_drafter_in_a_union_learns_from_all_nodes():
    """Recycling drafts as its reference, which observes the block in its own order."""
    nodes = [0, *range(4, 10)]
    order = [*nodes, *(node for node in range(12) if node not in nodes)]
    rows = []
    for before, draft, output, _ in steps(CASES["three"], "decoder_only"):
        written = [before.tokens[row, : n + 1].tolist() for row, n in enumerate(before.length)]
        rows = rows or [RecyclingReference(DrafterCase(RECYCLING), text) for text in written]
        shown = output._replace(
            block=output.block[:, order],
            top=output.top[:, order],
            path=np.argsort(order)[output.path],
        )
        for row, table in enumerate(rows):
            if not before.done[row]:
                assert draft.tokens[row, 3:9].tolist() == table.drafts(written[row])
            table.learn(before, shown, row)


@dataclass(frozen=True)
class Scripted:
    """Drafts from its weights, the token after each slot; -1 for none."""

    tree: protocol.Tree = field(default_factory=lambda: protocol.chain(4))
    top: int = 0

    def begin(self, context):
        return context.weights

    def propose(self, context, drafter_state, state):
        def take(row, start):
            return jax.lax.dynamic_slice_in_dim(row, start, self.tree.width - 1)

        return protocol.Draft(jax.vmap(take)(drafter_state, state.length)), drafter_state

    def observe(self, context, drafter_state, state, output):
        return drafter_state


def test_the_drafter_of_a_token_is_known_and_weights_find_their_drafter():
    tokens = last_plain_state("decoder_only").tokens
    script = np.full((len(tokens), 64), -1, np.int32)
    script[:, : tokens.shape[1] - 1] = tokens[:, 1:]
    even = (np.arange(len(script)) % 2 == 0)[:, None]
    both = union(Scripted(), Lookup(protocol.chain(2)), Scripted())
    assert draft_sources(both) == ("model", *["scripted"] * 3, "lookup", *["scripted"] * 3)
    weights = tuple(
        generation.shard_rows(np.where(rows, script, -1).astype(np.int32)) for rows in (even, ~even)
    )
    params = decoding.prepare_params(KINDS["decoder_only"], trained("decoder_only"))
    drafting = decoding.Drafting(both, (weights[0], None, weights[1]))
    result = decoding.generate(
        KINDS["decoder_only"], params, request_rows("decoder_only", GREEDY), GREEDY, drafting
    )
    for row, node in enumerate(result.token_node[:, 0]):
        assert node.tolist() == 6 * ([1, 2, 3, 0] if row % 2 == 0 else [5, 6, 7, 0])
    assert result.steps == 6


# Drafters that keep something of every token that was read.
MODELS = {
    "draft model": (
        draft_model_case("encoder_decoder", "deep encoder_decoder", 3),
        lambda: Uncached(SMALL["encoder_decoder"], small("encoder_decoder")),
    ),
    "early exit": (
        CASES_OF_MODELS["early exit"],
        lambda: Uncached(*first_layers("deep encoder_decoder", 1)),
    ),
    "late layers": (CASES_OF_MODELS["late layers"], lambda: Late("deep encoder_decoder", 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_a_union_reads_the_drafts_of_others(name):
    """Another drafter is right about three tokens of a step in every second row."""
    case, reference = MODELS[name]
    script = np.full((8, 64), -1, np.int32)
    tokens = last_plain_state("deep encoder_decoder").tokens
    script[::2, : tokens.shape[1] - 1] = tokens[::2, 1:]
    use_one_device()
    weights = generation.shard_rows(script), case.weights("deep encoder_decoder")
    both = DrafterCase(union(Scripted(), case.drafter), lambda kind: weights)
    reference, count = reference(), case.drafter.tree.width - 1
    for number, step in enumerate(itertools.islice(steps(both, "deep encoder_decoder"), 4)):
        for row in range(8):
            written = step.before.tokens[row, : step.before.length[row] + 1].tolist()
            if name != "late layers":
                written = written[1:]
            expected = reference.continued(EXAMPLES[row], written, count)
            if number and name == "late layers":
                # Texts of a toy repeat themselves, and drafts hide what they were computed from.
                _, added = reference.read(EXAMPLES[row], written)
                np.testing.assert_allclose(step.before.drafter_state[1][row], added, atol=1e-5)
            if number or name != "late layers":
                assert step.draft.tokens[row, 3:].tolist() == expected
    assert step.before.length[0] > step.before.length[1]


def test_a_union_of_nothing_or_with_too_few_weights_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        union()
    context = protocol.DecodeContext(None, None, None, weights=(None,))
    with pytest.raises(ValueError, match="weights for each"):
        union(Lookup(), Jacobi()).begin(context)
