# SPDX-License-Identifier: Apache-2.0
"""Unions: every drafter in one goes on as if it were alone, and sees what the others brought."""

import itertools
from dataclasses import dataclass, field

import jax
import numpy as np
import pytest
from decoding_laws import EXAMPLES, GREEDY, KINDS, LAWS, Drafted, plainly, request, steps, trained
from test_decoding_loop import use_one_device
from test_drafters_models import CASES as CASES_OF_MODELS
from test_drafters_models import SMALL, Late, Uncached, drafted, first_layers, small
from test_drafters_tables import Recycled

from t5x_lite import decoding
from t5x_lite.decoding import generation, protocol
from t5x_lite.decoding.drafters import trees
from t5x_lite.decoding.drafters.jacobi import Jacobi
from t5x_lite.decoding.drafters.lookup import Lookup
from t5x_lite.decoding.drafters.recycling import CHANCES, Recycling
from t5x_lite.decoding.drafters.union import Union, sources, union

RECYCLING = Recycling(trees.likeliest(7, CHANCES), top=4, slots=48)
THREE = union(Lookup(protocol.chain(4)), union(RECYCLING, Jacobi(protocol.chain(3), kept=4)))
CASES = {"three": Drafted(THREE, kinds=("joined",))}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_laws(law):
    law(CASES["three"])


def test_a_tree_of_its_own_for_each_under_one_root():
    assert THREE.tree.width == 12
    assert THREE.firsts == [1, 4, 10]
    assert THREE.top == 4
    assert sources(THREE) == ("model", *["lookup"] * 3, *["recycling"] * 6, *["jacobi"] * 2)
    assert sources(Lookup(protocol.chain(3))) == ("model", "lookup", "lookup")
    for first, drafter in zip(THREE.firsts, THREE.drafters, strict=True):
        for node, parent in enumerate(drafter.tree.parents[1:]):
            assert THREE.tree.parents[first + node] == (parent + first - 1 if parent else 0)


def test_a_union_of_one_drafts_as_that_one_alone():
    for lone, joined in zip(
        steps(Drafted(RECYCLING), "joined"),
        steps(Drafted(Union((RECYCLING,))), "joined"),
        strict=True,
    ):
        np.testing.assert_array_equal(joined.draft.tokens, lone.draft.tokens)
        np.testing.assert_array_equal(joined.after.node, lone.after.node)


def test_a_drafter_in_a_union_learns_from_all_nodes():
    """Recycling's guesses are those of its reference, shown the block in its own order."""
    own = [0, *range(4, 10)]
    order = [*own, *(node for node in range(12) if node not in own)]
    rows = []
    for before, draft, verdict, _ in steps(CASES["three"], "joined"):
        written = [before.tokens[row, : n + 1].tolist() for row, n in enumerate(before.length)]
        rows = rows or [Recycled(Drafted(RECYCLING), text) for text in written]
        shown = verdict._replace(
            block=verdict.block[:, order],
            top=verdict.top[:, order],
            path=np.argsort(order)[verdict.path],
        )
        for row, table in enumerate(rows):
            if not before.done[row]:
                assert draft.tokens[row, 3:9].tolist() == table.guesses(written[row])
            table.learn(before, shown, row)


@dataclass(frozen=True)
class Told:
    """Guesses right for the rows of one parity, from its weights: what follows each slot."""

    tree: protocol.Tree = field(default_factory=lambda: protocol.chain(4))
    top: int = 0

    def begin(self, setting):
        return setting.weights

    def propose(self, setting, memory, state):
        take = lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, self.tree.width - 1)
        return protocol.Draft(jax.vmap(take)(memory, state.length)), memory

    def observe(self, setting, memory, state, verdict):
        return memory


def test_who_guessed_a_token_can_be_told_and_weights_find_their_drafter():
    tokens = plainly("joined").tokens
    told = np.full((len(tokens), 64), -1, np.int32)
    told[:, : tokens.shape[1] - 1] = tokens[:, 1:]
    even = (np.arange(len(told)) % 2 == 0)[:, None]
    both = union(Told(), Lookup(protocol.chain(2)), Told())
    assert sources(both) == ("model", *["told"] * 3, "lookup", *["told"] * 3)
    weights = tuple(
        generation.place(np.where(which, told, -1).astype(np.int32)) for which in (even, ~even)
    )
    params = decoding.prepare(KINDS["joined"], trained("joined"))
    drafting = decoding.Drafting(both, (weights[0], None, weights[1]))
    found = decoding.generate(KINDS["joined"], params, request("joined", GREEDY), GREEDY, drafting)
    for row, node in enumerate(found.node[:, 0]):
        assert node.tolist() == 6 * ([1, 2, 3, 0] if row % 2 == 0 else [5, 6, 7, 0])
    assert found.calls == 6


# Drafters that keep something of every token that was read, in a union or not.
MODELS = {
    "draft model": (
        drafted("pair", "deep pair", 3),
        lambda: Uncached(SMALL["pair"], small("pair")),
    ),
    "early exit": (CASES_OF_MODELS["early exit"], lambda: Uncached(*first_layers("deep pair", 1))),
    "late layers": (CASES_OF_MODELS["late layers"], lambda: Late("deep pair", 1)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_a_union_has_read_what_others_guessed(name):
    """Another drafter is right about three tokens of a call in every second row."""
    case, reference = MODELS[name]
    told = np.full((8, 64), -1, np.int32)
    tokens = plainly("deep pair").tokens
    told[::2, : tokens.shape[1] - 1] = tokens[::2, 1:]
    use_one_device()
    weights = generation.place(told), case.weights("deep pair")
    both = Drafted(union(Told(), case.drafter), lambda kind: weights)
    reference, count = reference(), case.drafter.tree.width - 1
    for number, step in enumerate(itertools.islice(steps(both, "deep pair"), 4)):
        for row in range(8):
            written = step.before.tokens[row, : step.before.length[row] + 1].tolist()
            if name != "late layers":
                written = written[1:]
            expected = reference.continued(EXAMPLES[row], written, count)
            if number and name == "late layers":
                # Texts of a toy repeat themselves, and guesses hide what they were made of.
                _, added = reference.read(EXAMPLES[row], written)
                np.testing.assert_allclose(step.before.memory[1][row], added, atol=1e-5)
            if number or name != "late layers":
                assert step.draft.tokens[row, 3:].tolist() == expected
    assert step.before.length[0] > step.before.length[1]


def test_what_is_no_union_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        union()
    setting = protocol.Setting(None, None, None, weights=(None,))
    with pytest.raises(ValueError, match="weights for each"):
        union(Lookup(), Jacobi()).begin(setting)
