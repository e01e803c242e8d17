# SPDX-License-Identifier: Apache-2.0
"""Jacobi and lookahead: the model's choices after its own guesses, as lists in plain Python."""

import numpy as np
import pytest
from decoding_laws import EXAMPLES, GREEDY, LAWS, SAMPLED, Drafted, steps

from t5x_lite.decoding import protocol
from t5x_lite.decoding.drafters.jacobi import Jacobi
from t5x_lite.decoding.drafters.lookahead import Lookahead, block

# Guesses for the other layout are compared with lists, and their texts with plain decoding.
ONE = ("joined",)
CASES = {
    "jacobi": Drafted(Jacobi(), kinds=ONE),
    "lookahead": Drafted(Lookahead(window=3, ngram=3, guesses=2, slots=32), kinds=ONE),
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", CASES)
def test_laws(name, law):
    law(CASES[name])


class Iterated:
    """One row's Jacobi guesses."""

    def __init__(self, drafter, inputs, prompt):
        self.drafter = drafter
        given = list(inputs or prompt)
        self.ahead = [given[i % len(given)] for i in range(drafter.kept)]

    def guesses(self, root):
        return self.ahead[: self.drafter.tree.width - 1]

    def learn(self, verdict, row):
        chosen = verdict.chosen[row].tolist()
        later = [*chosen, *self.ahead[len(chosen) :]][int(verdict.count[row]) :]
        later += [([*chosen, *self.ahead[len(chosen) :]])[-1]] * self.drafter.kept
        self.ahead = later[: self.drafter.kept]


class Ahead:
    """One row's window, as a list of columns, and its n-grams by first token."""

    def __init__(self, drafter, inputs, prompt):
        self.drafter, self.pool = drafter, {}
        given = list(inputs or prompt)
        self.columns = [
            [given[(place + level) % len(given)] for level in range(drafter.ngram - 1)]
            for place in range(drafter.window)
        ]
        for text in (inputs, prompt):
            for place in range(len(text) - drafter.ngram + 1):
                self.keep(list(text[place : place + drafter.ngram]))

    def keep(self, gram):
        slot = gram[0] % self.drafter.slots
        owner, grams, written = self.pool.get(slot, (None, {}, 0))
        if owner != gram[0]:
            grams, written = {}, 0
        if gram[1:] not in grams.values():
            grams = grams | {written % self.drafter.guesses: gram[1:]}
            self.pool[slot] = gram[0], grams, written + 1

    def guesses(self, root):
        levels = self.drafter.ngram - 1
        window = [column[level] for level in range(levels) for column in self.columns]
        owner, grams, _ = self.pool.get(root % self.drafter.slots, (None, {}, 0))
        known = grams if owner == root else {}
        each = [known.get(place, [-1] * levels) for place in range(self.drafter.guesses)]
        return [*window, *(token for gram in each for token in gram)]

    def learn(self, verdict, row):
        size, levels = self.drafter.window, self.drafter.ngram - 1
        for place, column in enumerate(self.columns):
            column.append(int(verdict.chosen[row, 1 + (levels - 1) * size + place]))
            self.keep(list(column))
        onward = max(int(verdict.count[row]) - 1, 0)
        self.columns = [self.columns[(i + onward) % size][1:] for i in range(size)]


@pytest.mark.parametrize(
    "drafter, reference, kind, decode",
    [
        (CASES["jacobi"].drafter, Iterated, "joined", GREEDY),
        (Jacobi(protocol.chain(4), kept=3), Iterated, "pair", SAMPLED),
        (CASES["lookahead"].drafter, Ahead, "joined", GREEDY),
        (Lookahead(window=4, ngram=4, guesses=3, slots=7), Ahead, "pair", SAMPLED),
    ],
    ids=["jacobi joined", "jacobi pair", "lookahead joined", "lookahead pair"],
)
def test_guesses_are_those_of_lists_in_plain_python(drafter, reference, kind, decode):
    rows = []
    for before, draft, verdict, _ in steps(Drafted(drafter), kind, decode):
        written = [before.tokens[row, : n + 1].tolist() for row, n in enumerate(before.length)]
        given = EXAMPLES if kind == "pair" else [()] * len(EXAMPLES)
        rows = rows or [reference(drafter, *texts) for texts in zip(given, written, strict=True)]
        for row, memory in enumerate(rows):
            if not before.done[row]:
                assert draft.tokens[row].tolist() == memory.guesses(written[row][-1])
            memory.learn(verdict, row)


def test_the_tree_of_lookahead_sees_what_its_paper_says():
    window, levels, guesses = 4, 3, 2
    tree = block(window, levels, guesses)
    assert tree.width == 1 + window * levels + guesses * levels
    node = lambda level, place: 1 + level * window + place
    for level in range(levels):
        for place in range(window):
            seen = {0, *(node(0, i) for i in range(place + 1))}
            seen |= {node(i, place) for i in range(level + 1)}
            assert set(np.flatnonzero(tree.ancestors[node(level, place)])) == seen
            assert tree.depth[node(level, place)] == 1 + place + level
    assert tree.ancestors[-1].sum() == 1 + levels


def test_sizes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="at most kept"):
        Jacobi(protocol.chain(8), kept=6)
    with pytest.raises(ValueError, match="at most kept"):
        Jacobi(protocol.Tree((-1, 0, 0)))
    with pytest.raises(ValueError, match="ngram of at least 2"):
        Lookahead(ngram=1)
