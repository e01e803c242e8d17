# SPDX-License-Identifier: Apache-2.0
"""Jacobi and lookahead: the model's choices after drafts, as lists in plain Python."""

import numpy as np
import pytest
from decoding_laws import EXAMPLES, GREEDY, LAWS, SAMPLED, DrafterCase, steps

from t5x_lite.decoding import protocol
from t5x_lite.decoding.drafters.jacobi import Jacobi
from t5x_lite.decoding.drafters.lookahead import Lookahead, lookahead_tree

# The other layout is tested against lists, and its texts against plain decoding, below.
ONE = ("decoder_only",)
CASES = {
    "jacobi": DrafterCase(Jacobi(), kinds=ONE),
    "lookahead": DrafterCase(Lookahead(window=3, ngram=3, candidates=2, slots=32), kinds=ONE),
}


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", CASES)
def test_laws(name, law):
    law(CASES[name])


class JacobiReference:
    """Jacobi drafts of one row."""

    def __init__(self, drafter, inputs, prompt):
        self.drafter = drafter
        source = list(inputs or prompt)
        self.ahead = [source[i % len(source)] for i in range(drafter.kept)]

    def drafts(self, root):
        return self.ahead[: self.drafter.tree.width - 1]

    def learn(self, output, row):
        chosen = output.chosen[row].tolist()
        later = [*chosen, *self.ahead[len(chosen) :]][int(output.count[row]) :]
        later += [([*chosen, *self.ahead[len(chosen) :]])[-1]] * self.drafter.kept
        self.ahead = later[: self.drafter.kept]


class LookaheadReference:
    """One row's window, as a list of columns, and its n-grams by first token."""

    def __init__(self, drafter, inputs, prompt):
        self.drafter, self.pool = drafter, {}
        source = list(inputs or prompt)
        self.columns = [
            [source[(place + level) % len(source)] for level in range(drafter.ngram - 1)]
            for place in range(drafter.window)
        ]
        for text in (inputs, prompt):
            for place in range(len(text) - drafter.ngram + 1):
                self.keep(list(text[place : place + drafter.ngram]))

    def keep(self, ngram):
        slot = ngram[0] % self.drafter.slots
        owner, ngrams, written = self.pool.get(slot, (None, {}, 0))
        if owner != ngram[0]:
            ngrams, written = {}, 0
        if ngram[1:] not in ngrams.values():
            ngrams = ngrams | {written % self.drafter.candidates: ngram[1:]}
            self.pool[slot] = ngram[0], ngrams, written + 1

    def drafts(self, root):
        levels = self.drafter.ngram - 1
        window = [column[level] for level in range(levels) for column in self.columns]
        owner, ngrams, _ = self.pool.get(root % self.drafter.slots, (None, {}, 0))
        known = ngrams if owner == root else {}
        each = [known.get(place, [-1] * levels) for place in range(self.drafter.candidates)]
        return [*window, *(token for ngram in each for token in ngram)]

    def learn(self, output, row):
        size, levels = self.drafter.window, self.drafter.ngram - 1
        for place, column in enumerate(self.columns):
            column.append(int(output.chosen[row, 1 + (levels - 1) * size + place]))
            self.keep(list(column))
        onward = max(int(output.count[row]) - 1, 0)
        self.columns = [self.columns[(i + onward) % size][1:] for i in range(size)]


@pytest.mark.parametrize(
    "drafter, reference, kind, decode",
    [
        (CASES["jacobi"].drafter, JacobiReference, "decoder_only", GREEDY),
        (Jacobi(protocol.chain(4), kept=3), JacobiReference, "encoder_decoder", SAMPLED),
        (CASES["lookahead"].drafter, LookaheadReference, "decoder_only", GREEDY),
        (
            Lookahead(window=4, ngram=4, candidates=3, slots=7),
            LookaheadReference,
            "encoder_decoder",
            SAMPLED,
        ),
    ],
    ids=[
        "jacobi decoder_only",
        "jacobi encoder_decoder",
        "lookahead decoder_only",
        "lookahead encoder_decoder",
    ],
)
def test_drafts_are_those_of_lists_in_plain_python(drafter, reference, kind, decode):
    rows = []
    for before, draft, output, _ in steps(DrafterCase(drafter), kind, decode):
        written = [before.tokens[row, : n + 1].tolist() for row, n in enumerate(before.length)]
        source = EXAMPLES if kind == "encoder_decoder" else [()] * len(EXAMPLES)
        rows = rows or [reference(drafter, *texts) for texts in zip(source, written, strict=True)]
        for row, reference_row in enumerate(rows):
            if not before.done[row]:
                assert draft.tokens[row].tolist() == reference_row.drafts(written[row][-1])
            reference_row.learn(output, row)


def test_the_mask_of_lookahead_is_that_of_its_paper():
    window, levels, candidates = 4, 3, 2
    tree = lookahead_tree(window, levels, candidates)
    assert tree.width == 1 + window * levels + candidates * levels

    def node(level, place):
        return 1 + level * window + place

    for level in range(levels):
        for place in range(window):
            ancestors = {0, *(node(0, i) for i in range(place + 1))}
            ancestors |= {node(i, place) for i in range(level + 1)}
            assert set(np.flatnonzero(tree.ancestors[node(level, place)])) == ancestors
            assert tree.depth[node(level, place)] == 1 + place + level
    assert tree.ancestors[-1].sum() == 1 + levels


def test_sizes_out_of_range_are_refused():
    with pytest.raises(ValueError, match="at most kept"):
        Jacobi(protocol.chain(8), kept=6)
    with pytest.raises(ValueError, match="at most kept"):
        Jacobi(protocol.Tree((-1, 0, 0)))
    with pytest.raises(ValueError, match="ngram of at least 2"):
        Lookahead(ngram=1)
