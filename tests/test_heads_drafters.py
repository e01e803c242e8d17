# SPDX-License-Identifier: Apache-2.0
"""Laws of drafters that read the model's own heads, whose guesses theirs are."""

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
    SAMPLED,
    Drafted,
    same,
    steps,
    trained,
    write,
)
from test_decoding_loop import use_one_device

from t5x_lite import config, decoding, model, sharding
from t5x_lite.decoding import protocol
from t5x_lite.decoding import widths as adaptive
from t5x_lite.decoding.drafters import blockwise, medusa, merged, refined
from t5x_lite.training import bigrams

# The laws know models by name: these have heads.
PAIR = dict(layers=1, positions="relative")
JOINED = dict(layers=1, positions="rotary", kv_heads=2)
KINDS |= {
    "pair of heads": toy_model("pair", blockwise=config.Heads(4, "block_diagonal"), **PAIR),
    "joined of heads": toy_model("joined", blockwise=config.Heads(4, "stern"), **JOINED),
    "pair of hydra": toy_model("pair", blockwise=config.Heads(4, "hydra"), **PAIR),
    "joined of medusa": toy_model("joined", blockwise=config.Heads(4, "medusa"), **JOINED),
}
HEADS = ("pair of heads", "joined of heads")
DRAW = np.random.default_rng(0)
BIGRAMS = refined.Bigrams(
    DRAW.normal(size=(64, 4)).astype(np.float32), DRAW.normal(size=(4, 64)).astype(np.float32)
)
CASES = {
    "blockwise": Drafted(blockwise.Blockwise(protocol.chain(4)), kinds=HEADS),
    "merged": Drafted(merged.Merged(protocol.chain(3)), kinds=("joined of medusa",)),
    "medusa": Drafted(medusa.Medusa(medusa.cartesian((3, 2, 1))), kinds=("joined of medusa",)),
    "medusa of hydra": Drafted(
        medusa.Medusa(protocol.Tree((-1, 0, 0, 1, 2, 1, 3))), kinds=("pair of hydra",)
    ),
    "refined": Drafted(
        refined.Refined(protocol.chain(4), candidates=3, share=0.4, from_input=True),
        weights=lambda kind: BIGRAMS,
        kinds=HEADS[:1],
    ),
    "hydra": Drafted(blockwise.Blockwise(protocol.chain(3)), kinds=("pair of hydra",)),
}


# Heads that see guesses differ from others in what they guess: for them two laws say it all.
SEEING = ("hydra", "medusa of hydra")
HELD = [(name, law) for name in CASES for law in (LAWS[::5] if name in SEEING else LAWS)]


@pytest.mark.parametrize("name, law", HELD, ids=[f"{n}, {law.__name__}" for n, law in HELD])
def test_laws(name, law):
    law(CASES[name])


class Whole:
    """The model and its heads in one teacher-forced pass over all that is there, cached by text."""

    def __init__(self, kind: str):
        use_one_device()
        self.cfg, self.params = KINDS[kind], decoding.prepare(KINDS[kind], trained(kind))

    @functools.cached_property
    def apply(self):
        transformer = model.Transformer(self.cfg, scan=False)

        @jax.jit
        def run(params, tokens, inputs, since):
            apply = functools.partial(transformer.apply, {"params": params})
            read = model.Read()
            if self.cfg.encoder:
                ones = jnp.ones_like(inputs)
                where = jnp.arange(inputs.shape[1])[None]
                encoded = apply(inputs, ones, where, method="encode")
                read = model.Read(apply(encoded, method="crossed"), ones > 0)
            cache = model.empty_cache(self.cfg, 1, tokens.shape[1], scan=False)
            block = model.Block(tokens, jnp.zeros((1,), jnp.int32))
            hidden, _ = apply(block, cache, read, method="decode")
            said = []
            for head in range(self.cfg.blockwise.count):
                told = apply(hidden, slice(head, head + 1), since[:, :, : head + 1], method="guess")
                said.append(apply(told[:, :, 0], method="logits"))
            return jnp.stack(said, axis=2)

        return run

    def logits(self, example, tokens, length, guesses) -> np.ndarray:
        """[g v] of what the heads say where the root tokens[length] is read from."""
        padded = np.zeros((1, 48), np.int32)
        padded[0, : length + 1] = tokens[: length + 1]
        since = np.broadcast_to(np.array([tokens[length], *guesses]), (1, 48, 4)).astype(np.int32)
        inputs = np.array([example], np.int32)
        said = self.apply(self.params, padded, inputs, np.maximum(since, 0))
        return np.asarray(said)[0, length - 1]


def expected_of_chain(drafter, said, step, row, example):
    """What each head finds most probable."""
    return said.argmax(axis=1)[: drafter.tree.width - 1].tolist()


def expected_of_tree(drafter, said, step, row, example):
    """At depth i the likeliest tokens of head i, by rank among the siblings."""
    tree, tokens = drafter.tree, []
    for node, parent in list(enumerate(tree.parents))[1:]:
        rank = tree.parents[:node].count(parent)
        order = np.argsort(-said[tree.depth[node] - 1], kind="stable")
        tokens.append(int(order[rank]))
    return tokens


def expected_of_search(drafter, said, step, row, example):
    """The best of all chains through the lattice, each scored by itself."""
    tokens = step.before.tokens[row, : int(step.before.length[row]) + 1].tolist()
    pairs = list(itertools.pairwise(tokens))
    pairs += itertools.pairwise(example)
    log_probability = said - np.log(np.exp(said).sum(axis=1, keepdims=True))
    likeliest = np.argsort(-said, axis=1, kind="stable")[:, : drafter.candidates]

    def score(chain):
        total = 0.0
        for head, (before, after) in enumerate(itertools.pairwise([tokens[-1], *chain])):
            probability = np.exp(log_probability[head, after])
            seen = [pair for pair in pairs if pair[0] == before]
            if seen:
                share = seen.count((before, after)) / len(seen)
                probability = (1 - drafter.share) * probability + drafter.share * share
            logits = BIGRAMS.before[before] @ BIGRAMS.after
            own = logits[after] - np.log(np.exp(logits).sum())
            total += np.log(probability) + drafter.strength * own
        return total

    return list(map(int, max(itertools.product(*likeliest), key=score)))


EXPECTED = {
    "blockwise": expected_of_chain,
    "hydra": expected_of_chain,
    "merged": expected_of_chain,
    "medusa": expected_of_tree,
    "refined": expected_of_search,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_guesses_are_what_the_heads_say_in_a_pass_over_the_whole_text(name):
    drafted, right = CASES[name], 0
    for kind in drafted.kinds:
        whole = Whole(kind)
        for number, step in enumerate(itertools.islice(steps(drafted, kind), 6)):
            if number == 0:
                assert (step.draft.tokens == -1).all()
                continue
            for row in (0, 3):
                guesses = step.draft.tokens[row].tolist()
                # Heads that are told the guesses were told these.
                told = [*guesses, 0, 0, 0][:3]
                length = int(step.before.length[row])
                said = whole.logits(EXAMPLES[row], step.before.tokens[row], length, told)
                inputs = EXAMPLES[row] if whole.cfg.encoder else ()
                assert guesses == EXPECTED[name](drafted.drafter, said, step, row, inputs)
            right += (step.verdict.count > 1).sum()
    assert right > 0


def test_a_tree_of_heads_that_see_guesses_has_what_each_says_on_its_way():
    drafted = CASES["medusa of hydra"]
    tree, whole = drafted.drafter.tree, Whole("pair of hydra")
    *_, step = itertools.islice(steps(drafted, "pair of hydra"), 3)
    for row in (0, 3):
        block = step.verdict.block[row]
        for node, parent in list(enumerate(tree.parents))[1:]:
            way = [int(block[each]) for each in np.flatnonzero(tree.ancestors[parent])]
            told = [*way[1:], 0, 0, 0][:3]
            length = int(step.before.length[row])
            said = whole.logits(EXAMPLES[row], step.before.tokens[row], length, told)
            order = np.argsort(-said[tree.depth[node] - 1], kind="stable")
            assert block[node] == order[tree.parents[:node].count(parent)]


@pytest.mark.parametrize("name, widths", [("blockwise", (1, 4)), ("medusa", (1, 16))])
def test_heads_may_have_their_width_chosen(name, widths):
    kind = CASES[name].kinds[0]
    use_one_device()
    chosen = adaptive.Adaptive(CASES[name].drafter, widths)
    weights = adaptive.Priced(np.array((1, 1.2), np.float32), np.float32(1), np.bool_(False))
    same(write(kind, GREEDY, decoding.Drafting(chosen, weights)), write(kind, GREEDY))


def test_drawn_guesses_come_with_the_law_they_were_drawn_from():
    """Which is what the heads say at the temperature, after top-k and top-p."""
    drafted = Drafted(blockwise.Blockwise(protocol.chain(3), drawn=True))
    *_, step = itertools.islice(steps(drafted, "joined of heads", SAMPLED), 4)
    law = step.draft.log_probability
    np.testing.assert_allclose(np.exp(law).sum(axis=-1), 1, atol=1e-5)
    assert (np.isfinite(law).sum(axis=-1) <= SAMPLED.top_k).all()
    chosen = np.take_along_axis(law, step.draft.tokens[..., None], axis=-1)
    assert np.isfinite(chosen).all()
    length = int(step.before.length[3])
    said = Whole("joined of heads").logits((), step.before.tokens[3], length, [0, 0, 0])
    kept = np.isfinite(law[3])
    cooled = np.where(kept, said[:2] / SAMPLED.temperature, -np.inf)
    expected = np.exp(cooled - cooled.max(axis=-1, keepdims=True))
    expected /= expected.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(np.exp(law[3]), expected, atol=1e-4)


def test_the_promising_tree_is_the_best_of_all_trees():
    """Compared with every choice of nodes that are closed under parents."""
    chances = ((0.6, 0.3), (0.5, 0.25))
    nodes = [(i,) for i in range(2)] + [(i, j) for i in range(2) for j in range(2)]
    worth = {way: np.prod([chances[i][rank] for i, rank in enumerate(way)]) for way in nodes}
    for width in range(2, 8):
        closed = [
            kept
            for kept in itertools.combinations(nodes, width - 1)
            if all(way[:-1] in kept or len(way) == 1 for way in kept)
            and all((*way[:-1], way[-1] - 1) in kept or way[-1] == 0 for way in kept)
        ]
        best = max(sum(worth[way] for way in kept) for kept in closed)
        tree = medusa.promising(width, chances)
        ways = [()]
        for node, parent in list(enumerate(tree.parents))[1:]:
            ways.append((*ways[parent], tree.parents[:node].count(parent)))
        assert sum(worth[way] for way in ways[1:]) == pytest.approx(best)
    assert medusa.cartesian((2, 1)).parents == (-1, 0, 0, 1, 2)
    with pytest.raises(ValueError, match="No tree of 8 nodes"):
        medusa.promising(8, chances)
    with pytest.raises(ValueError, match="do not fall"):
        medusa.promising(3, ((0.2, 0.4),))


def test_bigrams_learn_how_often_tokens_follow_one_another():
    draw = np.random.default_rng(1)
    law = draw.dirichlet(np.full(6, 0.5), size=6)
    rows = []
    for _ in range(300):
        row = [0]
        for _ in range(20):
            row.append(int(draw.choice(6, p=law[row[-1]])))
        rows.append(row[1:])
    sharding.use_mesh(config.Mesh())
    found = bigrams.fit(rows, vocab=6, width=6)
    logits = found.before @ found.after
    said = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    counted = np.zeros((6, 6))
    np.add.at(counted, tuple(bigrams.pairs(rows, 0).T), 1)
    np.testing.assert_allclose(said, counted / counted.sum(axis=1, keepdims=True), atol=0.05)
    with pytest.raises(ValueError, match="no tokens at all"):
        bigrams.fit([[]], vocab=6)
    with pytest.raises(ValueError, match="ids must be in 0..5"):
        bigrams.fit([[1, 6]], vocab=6)


@pytest.mark.parametrize(
    "drafter, kind, message",
    [
        (blockwise.Blockwise(), "pair", "has no heads"),
        (blockwise.Blockwise(protocol.chain(5)), "pair of heads", "a block of at most 4 tokens"),
        (medusa.Medusa(protocol.chain(6)), "joined of medusa", "a block of at most 4 tokens"),
        (refined.Refined(), "pair of hydra", "nothing to refine"),
        (merged.Merged(), "pair of hydra", "a merged pass does not have yet"),
    ],
)
def test_a_model_without_the_heads_is_told_so(drafter, kind, message):
    use_one_device()
    with pytest.raises(ValueError, match=message):
        write(kind, GREEDY, decoding.Drafting(drafter))
