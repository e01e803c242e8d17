# SPDX-License-Identifier: Apache-2.0
"""Recycling and trigrams: tables equal to those of plain Python, and trees with the best value."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_laws import (
    EXAMPLES,
    GREEDY,
    LAWS,
    SAMPLED,
    DrafterCase,
    decode_rows,
    greedy_text_is_that_of_plain_decoding,
    plain,
    steps,
)
from test_decoding_loop import use_one_device

from t5x_lite.decoding import protocol
from t5x_lite.decoding.drafters import trees
from t5x_lite.decoding.drafters.recycling import CHANCES, Recycling, count_successors
from t5x_lite.decoding.drafters.trigram import Trigram

# The other layout is tested against dictionaries, and its texts against plain decoding, below.
ONE = ("decoder_only",)
# Texts for a first table: tokens that share a slot of 48, and more successors than are kept.
TEXTS = [[0, 5, 9, 5, 9, 5, 7], [53, 1], [5, *range(20)], [7, 5, 8, 5, 8, 5, 8, 5, 6, 5, 60]]
BEGUN = Recycling(trees.best_tree(10, CHANCES), top=6, slots=48)
CASES = {
    "recycling": DrafterCase(BEGUN, lambda kind: count_successors(TEXTS, top=6, slots=48), ONE),
    "trigram": DrafterCase(Trigram(trees.best_tree(7, (0.5, 0.2))), kinds=ONE),
}


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", CASES)
def test_laws(name, law):
    law(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bart", "m2m100"])
def test_trees_of_families_with_absolute_positions_write_their_plain_text(kind):
    greedy_text_is_that_of_plain_decoding(CASES["trigram"]._replace(kinds=(kind,)))


def fill_tree(tree, root, last, successors):
    """Drafts a tree node by node.

    Args:
      tree: its shape.
      root: id of the root.
      last: id before it.
      successors: function of two ids: the likeliest ones after them.
    """
    tokens, before = [root], [last]
    for node, parent in enumerate(tree.parents[1:], start=1):
        rank = tree.parents[:node].count(parent)
        known = successors(before[parent], tokens[parent]) if tokens[parent] >= 0 else []
        tokens.append(known[rank] if rank < len(known) else -1)
        before.append(tokens[parent])
    return tokens[1:]


class RecyclingReference:
    """One row's table, as a dictionary from slot to token and successors."""

    def __init__(self, case, *texts):
        self.drafter, self.table, seeds = case.drafter, {}, {}
        if weights := case.weights(None):
            for token, successors in zip(*weights, strict=True):
                known = [follows for follows in successors.tolist() if follows >= 0]
                self.table[token % self.drafter.slots] = token, known
        for text in texts:
            for token, follows in itertools.pairwise(text):
                seeds[token % self.drafter.slots] = token, [follows]
        for slot, (token, follows) in seeds.items():
            owner, known = self.table.get(slot, (token, []))
            self.table[slot] = token, [*follows, *known[1:]] if owner == token else follows

    def drafts(self, written):
        def successors(before, token):
            owner, known = self.table.get(token % self.drafter.slots, (-1, []))
            return known if owner == token else []

        return fill_tree(self.drafter.tree, written[-1], None, successors)

    def learn(self, before, output, row):
        path = output.path[row, : output.count[row]].tolist()
        nodes = range(len(output.block[row]))
        for node in sorted(nodes, key=lambda node: (node in path, node)):
            token = int(output.block[row, node])
            if token >= 0:
                successors = output.top[row, node].tolist()
                self.table[token % self.drafter.slots] = token, successors


class TrigramReference:
    """One row's counts, as a dictionary from slot to context and weighted successors."""

    def __init__(self, case, *texts):
        self.drafter, self.table = case.drafter, {}
        for text in texts:
            self.count(list(text), 1)

    def slot(self, before, token):
        word = 2**32
        mixed = (((before % word) * 0x9E3779B1 % word) ^ token) * 0x85EBCA6B % word
        return (mixed >> 15) % self.drafter.slots

    def count(self, text, first):
        for place in range(first, len(text)):
            if place > 1:
                self.count_one(text[place - 2], text[place - 1], text[place])
            self.count_one(-1, text[place - 1], text[place])

    def count_one(self, before, token, follows):
        context, known = self.table.get(self.slot(before, token), (None, []))
        known = known if context == (before, token) else []
        known = [(each, np.float32(weight * self.drafter.decay)) for each, weight in known]
        counts = dict(known)
        if follows not in counts and len(known) == self.drafter.successors:
            counts.pop(known[-1][0])
        counts[follows] = counts.get(follows, np.float32(0)) + np.float32(1)
        # Python's sort is stable.
        known = sorted(counts.items(), key=lambda each: -each[1])
        self.table[self.slot(before, token)] = (before, token), known

    def drafts(self, written):
        def successors(before, token):
            for context in ((before, token), (-1, token)):
                owner, known = self.table.get(self.slot(*context), (None, []))
                if owner == context:
                    return [each for each, _ in known]
            return []

        last = written[-2] if len(written) > 1 else -1
        return fill_tree(self.drafter.tree, written[-1], last, successors)

    def learn(self, before, output, row):
        old = before.tokens[row, : before.length[row] + 1].tolist()
        new = output.tokens[row, : output.count[row]].tolist()
        self.count([*old, *new], len(old))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, reference, kind, decode",
    [
        (CASES["recycling"], RecyclingReference, "decoder_only", GREEDY),
        (
            DrafterCase(Recycling(trees.best_tree(10, CHANCES))),
            RecyclingReference,
            "encoder_decoder",
            SAMPLED,
        ),
        (CASES["trigram"], TrigramReference, "decoder_only", GREEDY),
        (
            DrafterCase(Trigram(protocol.chain(5), decay=0.9, slots=16)),
            TrigramReference,
            "encoder_decoder",
            SAMPLED,
        ),
    ],
    ids=[
        "recycling decoder_only",
        "recycling encoder_decoder",
        "trigram decoder_only",
        "trigram encoder_decoder",
    ],
)
def test_drafts_are_those_of_dictionaries_in_plain_python(case, reference, kind, decode):
    rows = []
    some = 0
    for before, draft, output, _ in steps(case, kind, decode):
        written = [before.tokens[row, : n + 1].tolist() for row, n in enumerate(before.length)]
        inputs = EXAMPLES if kind == "encoder_decoder" else [()] * len(EXAMPLES)
        both = zip(inputs, written, strict=True)
        rows = rows or [reference(case, *texts) for texts in both]
        for row, table in enumerate(rows):
            if not before.done[row]:
                assert draft.tokens[row].tolist() == table.drafts(written[row])
                some += draft.tokens[row].max() >= 0
            table.learn(before, output, row)
    assert some > len(EXAMPLES)


def test_a_batch_of_one_row_is_drafted_too():
    """A batch of one, whose arrays have the shapes of arrays that all rows share."""
    use_one_device()
    drafting = CASES["recycling"].drafting("decoder_only")
    result = decode_rows("decoder_only", GREEDY, drafting, order=(4,))
    np.testing.assert_array_equal(result.tokens[0], plain("decoder_only", GREEDY).tokens[4])
    assert result.steps < 24


def test_tables_begin_with_what_most_often_follows():
    table = count_successors(TEXTS, top=6, slots=48)
    # 5 is more frequent than 53, which would share its slot; 8 follows it most often.
    assert table.token[5] == 5
    assert table.successors[5].tolist() == [8, 9, 6, 7, 0, 60]
    assert table.successors[9, :3].tolist() == [5, 10, -1]
    with pytest.raises(ValueError, match="use count_successors"):
        next(steps(DrafterCase(Recycling(), lambda kind: table), "decoder_only"))


def expected_tokens(tree, chances):
    """Computes the expected number of accepted drafts."""
    rank = trees.ranks(tree)
    value = [1.0]
    for node in range(1, tree.width):
        value.append(value[tree.parents[node]] * chances[rank[node]])
    return sum(value[1:])


@pytest.mark.parametrize("chances", [(0.9, 0.1), (0.5, 0.4, 0.3), (0.3, 0.3, 0.3, 0.3, 0.3)])
@pytest.mark.parametrize("width", [1, 2, 5, 7])
def test_no_tree_has_more_expected_tokens_than_the_best(width, chances):
    every = itertools.product(*(range(node) for node in range(1, width)))
    shapes = (protocol.Tree((-1, *parents)) for parents in every)
    possible = [tree for tree in shapes if trees.ranks(tree).max() < len(chances)]
    best = max(expected_tokens(tree, chances) for tree in possible)
    assert expected_tokens(trees.best_tree(width, chances), chances) == pytest.approx(best)


@pytest.mark.parametrize("width, chances", [(0, (0.5,)), (4, ()), (4, (0.2, 0.5)), (4, (1.0,))])
def test_chances_out_of_range_are_refused(width, chances):
    with pytest.raises(ValueError, match="No tree of"):
        trees.best_tree(width, chances)


def draft_table(width):
    """A function of the last two ids that fills a chain of `width` nodes from a table."""
    table = jnp.arange(31 * 31).reshape(31, 31) * 7 % 31

    def successors(before, tokens):
        return table[before, tokens][:, None]

    return lambda last, root: trees.fill_tree(protocol.chain(width), last, root, successors)


def test_a_program_does_not_grow_with_the_depth_of_its_tree():
    use_one_device()
    pair = jnp.int32(3), jnp.int32(5)
    sizes = [len(str(jax.make_jaxpr(draft_table(width))(*pair))) for width in (10, 90)]
    assert sizes[1] < 1.2 * sizes[0], sizes
    last, root, expected = 3, 5, []
    for _ in range(63):
        last, root = root, (31 * last + root) * 7 % 31
        expected.append(root)
    assert draft_table(64)(*pair).tolist() == expected


def test_a_tree_with_more_branches_than_successors_is_refused():
    bushy = protocol.Tree((-1, 0, 0, 0, 0))
    with pytest.raises(ValueError, match="4 children, but it knows 3"):
        Recycling(bushy, top=3)
    with pytest.raises(ValueError, match="4 children, but it knows 3"):
        Trigram(bushy)
