# SPDX-License-Identifier: Apache-2.0
"""Recycling and tri-grams: tables equal to those of plain Python, and trees that promise most."""

import itertools

import numpy as np
import pytest
from decoding_laws import EXAMPLES, GREEDY, LAWS, SAMPLED, Drafted, plain, steps, write
from test_decoding_loop import use_one_device

from t5x_lite.decoding import protocol
from t5x_lite.decoding.drafters import trees
from t5x_lite.decoding.drafters.recycling import CHANCES, Recycling, expected
from t5x_lite.decoding.drafters.trigram import Trigram

# Guesses for the other layout are compared with dictionaries, and their texts with plain decoding.
ONE = ("joined",)
# What a table may begin with: tokens that share a slot of 48, and more successors than are kept.
TEXTS = [[0, 5, 9, 5, 9, 5, 7], [53, 1], [5, *range(20)], [7, 5, 8, 5, 8, 5, 8, 5, 6, 5, 60]]
BEGUN = Recycling(trees.likeliest(10, CHANCES), top=6, slots=48)
CASES = {
    "recycling": Drafted(BEGUN, lambda kind: expected(TEXTS, top=6, slots=48), ONE),
    "trigram": Drafted(Trigram(trees.likeliest(7, (0.5, 0.2))), kinds=ONE),
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", CASES)
def test_laws(name, law):
    law(CASES[name])


def filled(tree, root, last, successors):
    """The guesses of a tree, node by node."""
    tokens, before = [root], [last]
    for node, parent in enumerate(tree.parents[1:], start=1):
        rank = tree.parents[:node].count(parent)
        found = successors(before[parent], tokens[parent]) if tokens[parent] >= 0 else []
        tokens.append(found[rank] if rank < len(found) else -1)
        before.append(tokens[parent])
    return tokens[1:]


class Recycled:
    """One row's table, as a dictionary from slot to token and successors."""

    def __init__(self, drafted, *texts):
        self.drafter, self.table, seeds = drafted.drafter, {}, {}
        if begun := drafted.weights(None):
            for token, successors in zip(*begun, strict=True):
                known = [follows for follows in successors.tolist() if follows >= 0]
                self.table[token % self.drafter.slots] = token, known
        for text in texts:
            for token, follows in itertools.pairwise(text):
                seeds[token % self.drafter.slots] = token, [follows]
        for slot, (token, follows) in seeds.items():
            owner, known = self.table.get(slot, (token, []))
            self.table[slot] = token, [*follows, *known[1:]] if owner == token else follows

    def guesses(self, written):
        def successors(before, token):
            owner, found = self.table.get(token % self.drafter.slots, (-1, []))
            return found if owner == token else []

        return filled(self.drafter.tree, written[-1], None, successors)

    def learn(self, before, verdict, row):
        path = verdict.path[row, : verdict.count[row]].tolist()
        nodes = range(len(verdict.block[row]))
        for node in sorted(nodes, key=lambda node: (node in path, node)):
            token = int(verdict.block[row, node])
            if token >= 0:
                successors = verdict.top[row, node].tolist()
                self.table[token % self.drafter.slots] = token, successors


class Counted:
    """One row's counts, as a dictionary from slot to context and weighted successors."""

    def __init__(self, drafted, *texts):
        self.drafter, self.table = drafted.drafter, {}
        for text in texts:
            self.count(list(text), 1)

    def slot(self, before, token):
        word = 2**32
        mixed = (((before % word) * 0x9E3779B1 % word) ^ token) * 0x85EBCA6B % word
        return (mixed >> 15) % self.drafter.slots

    def count(self, text, first):
        for place in range(first, len(text)):
            if place > 1:
                self.met(text[place - 2], text[place - 1], text[place])
            self.met(-1, text[place - 1], text[place])

    def met(self, before, token, follows):
        context, found = self.table.get(self.slot(before, token), (None, []))
        found = found if context == (before, token) else []
        found = [(known, np.float32(weight * self.drafter.decay)) for known, weight in found]
        weights = dict(found)
        if follows not in weights and len(found) == self.drafter.successors:
            weights.pop(found[-1][0])
        weights[follows] = weights.get(follows, np.float32(0)) + np.float32(1)
        # Python's sort leaves equal ones as they are.
        found = sorted(weights.items(), key=lambda each: -each[1])
        self.table[self.slot(before, token)] = (before, token), found

    def guesses(self, written):
        def successors(before, token):
            for context in ((before, token), (-1, token)):
                owner, found = self.table.get(self.slot(*context), (None, []))
                if owner == context:
                    return [known for known, _ in found]
            return []

        last = written[-2] if len(written) > 1 else -1
        return filled(self.drafter.tree, written[-1], last, successors)

    def learn(self, before, verdict, row):
        old = before.tokens[row, : before.length[row] + 1].tolist()
        new = verdict.tokens[row, : verdict.count[row]].tolist()
        self.count([*old, *new], len(old))


@pytest.mark.parametrize(
    "drafted, reference, kind, decode",
    [
        (CASES["recycling"], Recycled, "joined", GREEDY),
        (Drafted(Recycling(trees.likeliest(10, CHANCES))), Recycled, "pair", SAMPLED),
        (CASES["trigram"], Counted, "joined", GREEDY),
        (Drafted(Trigram(protocol.chain(5), decay=0.9, slots=16)), Counted, "pair", SAMPLED),
    ],
    ids=["recycling joined", "recycling pair", "trigram joined", "trigram pair"],
)
def test_guesses_are_those_of_dictionaries_in_plain_python(drafted, reference, kind, decode):
    rows = []
    some = 0
    for before, draft, verdict, _ in steps(drafted, kind, decode):
        written = [before.tokens[row, : n + 1].tolist() for row, n in enumerate(before.length)]
        given = EXAMPLES if kind == "pair" else [()] * len(EXAMPLES)
        both = zip(given, written, strict=True)
        rows = rows or [reference(drafted, *texts) for texts in both]
        for row, table in enumerate(rows):
            if not before.done[row]:
                assert draft.tokens[row].tolist() == table.guesses(written[row])
                some += draft.tokens[row].max() >= 0
            table.learn(before, verdict, row)
    assert some > len(EXAMPLES)


def test_a_row_all_by_itself_is_drafted_for_too():
    """A batch of one, whose arrays have the shapes of what all rows share."""
    use_one_device()
    drafting = CASES["recycling"].drafting("joined")
    found = write("joined", GREEDY, drafting, order=(4,))
    np.testing.assert_array_equal(found.tokens[0], plain("joined", GREEDY).tokens[4])
    assert found.calls < 24


def test_tables_begin_with_what_most_often_follows():
    table = expected(TEXTS, top=6, slots=48)
    # 5 is met more often than 53, which would share its slot; of what follows it 8 comes first.
    assert table.token[5] == 5
    assert table.successors[5].tolist() == [8, 9, 6, 7, 0, 60]
    assert table.successors[9, :3].tolist() == [5, 10, -1]
    with pytest.raises(ValueError, match="make it by expected"):
        next(steps(Drafted(Recycling(), lambda kind: table), "joined"))


def worth(tree, chances):
    """The expected number of accepted guesses."""
    rank = trees.ranks(tree)
    value = [1.0]
    for node in range(1, tree.width):
        value.append(value[tree.parents[node]] * chances[rank[node]])
    return sum(value[1:])


@pytest.mark.parametrize("chances", [(0.9, 0.1), (0.5, 0.4, 0.3), (0.3, 0.3, 0.3, 0.3, 0.3)])
@pytest.mark.parametrize("width", [1, 2, 5, 7])
def test_no_tree_promises_more_than_the_likeliest(width, chances):
    every = itertools.product(*(range(node) for node in range(1, width)))
    made = (protocol.Tree((-1, *parents)) for parents in every)
    possible = [tree for tree in made if trees.ranks(tree).max() < len(chances)]
    best = max(worth(tree, chances) for tree in possible)
    assert worth(trees.likeliest(width, chances), chances) == pytest.approx(best)


@pytest.mark.parametrize("width, chances", [(0, (0.5,)), (4, ()), (4, (0.2, 0.5)), (4, (1.0,))])
def test_chances_that_are_none_are_refused(width, chances):
    with pytest.raises(ValueError, match="No tree of"):
        trees.likeliest(width, chances)


def test_a_tree_with_more_branches_than_successors_is_refused():
    bushy = protocol.Tree((-1, 0, 0, 0, 0))
    with pytest.raises(ValueError, match="4 children, but it knows 3"):
        Recycling(bushy, top=3)
    with pytest.raises(ValueError, match="4 children, but it knows 3"):
        Trigram(bushy)
