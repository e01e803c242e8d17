# SPDX-License-Identifier: Apache-2.0
"""Laws of drafters with the model's bigram heads: they draft what the heads predict."""

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
    DrafterCase,
    assert_same,
    decode_rows,
    steps,
    trained,
)
from test_decoding_loop import use_one_device

from t5x_lite import config, decoding, model, sharding
from t5x_lite.decoding import protocol
from t5x_lite.decoding.adaptive import drafter as adaptive
from t5x_lite.decoding.drafters import blockwise, medusa, refined, trees

# Models with heads, by name.
PAIR = dict(layers=1, positions="relative")
JOINED = dict(layers=1, positions="rotary", kv_heads=2)
KINDS |= {
    "encoder_decoder of heads": toy_model(
        "encoder_decoder", draft_heads=config.DraftHeads(4, "block_diagonal"), **PAIR
    ),
    "decoder_only of heads": toy_model(
        "decoder_only", draft_heads=config.DraftHeads(4, "stern"), **JOINED
    ),
    "encoder_decoder of hydra": toy_model(
        "encoder_decoder", draft_heads=config.DraftHeads(4, "hydra"), **PAIR
    ),
    "decoder_only of medusa": toy_model(
        "decoder_only", draft_heads=config.DraftHeads(4, "medusa"), **JOINED
    ),
}
HEADS = ("encoder_decoder of heads", "decoder_only of heads")
DRAW = np.random.default_rng(0)
BIGRAMS = refined.BigramModel(
    DRAW.normal(size=(64, 4)).astype(np.float32), DRAW.normal(size=(4, 64)).astype(np.float32)
)
# All paths of the 3, 2 and 1 most probable tokens of three heads.
CARTESIAN = protocol.Tree((-1, 0, 0, 0, 1, 1, 2, 2, 3, 3, *range(4, 10)))
CASES = {
    "blockwise": DrafterCase(blockwise.Blockwise(protocol.chain(4)), kinds=HEADS),
    "medusa": DrafterCase(medusa.Medusa(CARTESIAN), kinds=("decoder_only of medusa",)),
    "medusa of hydra": DrafterCase(
        medusa.Medusa(protocol.Tree((-1, 0, 0, 1, 2, 1, 3))), kinds=("encoder_decoder of hydra",)
    ),
    "refined": DrafterCase(
        refined.Refined(protocol.chain(4), candidates=3, share=0.4, from_input=True),
        weights=lambda kind: BIGRAMS,
        kinds=HEADS[:1],
    ),
    "hydra": DrafterCase(
        blockwise.Blockwise(protocol.chain(3)), kinds=("encoder_decoder of hydra",)
    ),
}


# Sequential heads differ from others in their drafts alone: two laws are enough for them.
SEQUENTIAL = ("hydra", "medusa of hydra")
LAW_CASES = [(name, law) for name in CASES for law in (LAWS[::5] if name in SEQUENTIAL else LAWS)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, law", LAW_CASES, ids=[f"{n}, {law.__name__}" for n, law in LAW_CASES]
)
def test_laws(name, law):
    law(CASES[name])


class WholeModel:
    """The model and its heads in one teacher-forced pass over the whole text."""

    def __init__(self, kind: str):
        use_one_device()
        self.cfg, self.params = KINDS[kind], decoding.prepare_params(KINDS[kind], trained(kind))

    @functools.cached_property
    def apply(self):
        transformer = model.Transformer(self.cfg, scan=False)

        @jax.jit
        def run(params, tokens, inputs, before):
            apply = functools.partial(transformer.apply, {"params": params})
            encoder_memory = model.EncoderMemory()
            if self.cfg.encoder:
                ones = jnp.ones_like(inputs)
                where = jnp.arange(inputs.shape[1])[None]
                encoded = apply(inputs, ones, where, method=model.Transformer.encode)
                encoder_memory = model.EncoderMemory(
                    apply(encoded, method=model.Transformer.cross_kv), ones > 0
                )
            cache = model.empty_cache(self.cfg, 1, tokens.shape[1], scan=False)
            block = model.TokenBlock(tokens, jnp.zeros((1,), jnp.int32))
            hidden, _ = apply(block, cache, encoder_memory, method=model.Transformer.decode)
            logits = []
            for head in range(self.cfg.draft_heads.count):
                one, drafts = slice(head, head + 1), before[:, :, : head + 1]
                states = apply(hidden, one, drafts, method=model.Transformer.draft_hidden)
                logits.append(apply(states[:, :, 0], method=model.Transformer.logits))
            return jnp.stack(logits, axis=2)

        return run

    def logits(self, example, tokens, length, drafts) -> np.ndarray:
        """Returns the heads' logits [g v], after drafts, at the hidden state of the root,
        tokens[length], of an example."""
        padded = np.zeros((1, 48), np.int32)
        padded[0, : length + 1] = tokens[: length + 1]
        before = np.broadcast_to(np.array([tokens[length], *drafts]), (1, 48, 4)).astype(np.int32)
        inputs = np.array([example], np.int32)
        logits = self.apply(self.params, padded, inputs, np.maximum(before, 0))
        return np.asarray(logits)[0, length - 1]


def expected_of_chain(drafter, head_logits, step, row, example):
    """Returns the most probable token of each head.

    Args:
      drafter: the drafter.
      head_logits: [g v] logits of the heads.
      step: not used here, as row and example.
      row: number of the row.
      example: its input.
    """
    return head_logits.argmax(axis=1)[: drafter.tree.width - 1].tolist()


def expected_of_tree(drafter, head_logits, step, row, example):
    """Returns, at depth i, the most probable tokens of head i, by rank among the siblings.

    Args:
      drafter: the drafter.
      head_logits: [g v] logits of the heads.
      step: not used here, as row and example.
      row: number of the row.
      example: its input.
    """
    tree, tokens = drafter.tree, []
    for node, parent in list(enumerate(tree.parents))[1:]:
        rank = tree.parents[:node].count(parent)
        order = np.argsort(-head_logits[tree.depth[node] - 1], kind="stable")
        tokens.append(int(order[rank]))
    return tokens


def expected_of_search(drafter, head_logits, step, row, example):
    """Returns the best of all chains through the lattice, each scored by itself.

    Args:
      drafter: the drafter.
      head_logits: [g v] logits of the heads.
      step: the step, with the text before it.
      row: number of the row.
      example: its input.
    """
    tokens = step.before.tokens[row, : int(step.before.length[row]) + 1].tolist()
    pairs = list(itertools.pairwise(tokens))
    pairs += itertools.pairwise(example)
    log_probability = head_logits - np.log(np.exp(head_logits).sum(axis=1, keepdims=True))
    candidates = np.argsort(-head_logits, axis=1, kind="stable")[:, : drafter.candidates]

    def score(chain):
        total = 0.0
        for head, (before, after) in enumerate(itertools.pairwise([tokens[-1], *chain])):
            probability = np.exp(log_probability[head, after])
            followers = [pair for pair in pairs if pair[0] == before]
            if followers:
                share = followers.count((before, after)) / len(followers)
                probability = (1 - drafter.share) * probability + drafter.share * share
            logits = BIGRAMS.before[before] @ BIGRAMS.after
            bigram = logits[after] - np.log(np.exp(logits).sum())
            total += np.log(probability) + drafter.strength * bigram
        return total

    return list(map(int, max(itertools.product(*candidates), key=score)))


EXPECTED = {
    "blockwise": expected_of_chain,
    "hydra": expected_of_chain,
    "medusa": expected_of_tree,
    "refined": expected_of_search,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_drafts_are_those_of_the_heads_in_a_pass_over_the_whole_text(name):
    case, right = CASES[name], 0
    for kind in case.kinds:
        whole = WholeModel(kind)
        for number, step in enumerate(itertools.islice(steps(case, kind), 6)):
            if number == 0:
                assert (step.draft.tokens == -1).all()
                continue
            for row in (0, 3):
                drafts = step.draft.tokens[row].tolist()
                # The drafts that sequential heads depend on.
                before = [*drafts, 0, 0, 0][:3]
                length = int(step.before.length[row])
                head_logits = whole.logits(EXAMPLES[row], step.before.tokens[row], length, before)
                inputs = EXAMPLES[row] if whole.cfg.encoder else ()
                assert drafts == EXPECTED[name](case.drafter, head_logits, step, row, inputs)
            right += (step.output.count > 1).sum()
    assert right > 0


def test_a_tree_of_sequential_heads_has_what_each_predicts_on_its_path():
    case = CASES["medusa of hydra"]
    tree, whole = case.drafter.tree, WholeModel("encoder_decoder of hydra")
    *_, step = itertools.islice(steps(case, "encoder_decoder of hydra"), 3)
    for row in (0, 3):
        block = step.output.block[row]
        for node, parent in list(enumerate(tree.parents))[1:]:
            path = [int(block[each]) for each in np.flatnonzero(tree.ancestors[parent])]
            before = [*path[1:], 0, 0, 0][:3]
            length = int(step.before.length[row])
            head_logits = whole.logits(EXAMPLES[row], step.before.tokens[row], length, before)
            order = np.argsort(-head_logits[tree.depth[node] - 1], kind="stable")
            assert block[node] == order[tree.parents[:node].count(parent)]


@pytest.mark.slow
@pytest.mark.parametrize("name, widths", [("blockwise", (1, 4)), ("medusa", (1, 16))])
def test_heads_may_be_adaptive(name, widths):
    kind = CASES[name].kinds[0]
    use_one_device()
    chosen = adaptive.Adaptive(CASES[name].drafter, widths)
    weights = adaptive.CostModel(np.array((1, 1.2), np.float32), np.float32(1), np.bool_(False))
    assert_same(
        decode_rows(kind, GREEDY, decoding.Drafting(chosen, weights)), decode_rows(kind, GREEDY)
    )


def test_stochastic_drafts_carry_the_distribution_they_were_sampled_from():
    """That of the heads at the temperature, after top-k and top-p."""
    case = DrafterCase(blockwise.Blockwise(protocol.chain(3), stochastic=True))
    *_, step = itertools.islice(steps(case, "decoder_only of heads", SAMPLED), 4)
    log_p = step.draft.log_probability
    np.testing.assert_allclose(np.exp(log_p).sum(axis=-1), 1, atol=1e-5)
    assert (np.isfinite(log_p).sum(axis=-1) <= SAMPLED.top_k).all()
    chosen = np.take_along_axis(log_p, step.draft.tokens[..., None], axis=-1)
    assert np.isfinite(chosen).all()
    length = int(step.before.length[3])
    head_logits = WholeModel("decoder_only of heads").logits(
        (), step.before.tokens[3], length, [0, 0, 0]
    )
    kept = np.isfinite(log_p[3])
    cooled = np.where(kept, head_logits[:2] / SAMPLED.temperature, -np.inf)
    expected = np.exp(cooled - cooled.max(axis=-1, keepdims=True))
    expected /= expected.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(np.exp(log_p[3]), expected, atol=1e-4)


def test_the_best_first_tree_is_the_best_of_all_trees():
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
        tree = trees.best_tree_of_heads(width, chances)
        ways = [()]
        for node, parent in list(enumerate(tree.parents))[1:]:
            ways.append((*ways[parent], tree.parents[:node].count(parent)))
        assert sum(worth[way] for way in ways[1:]) == pytest.approx(best)
    with pytest.raises(ValueError, match="No tree of 8 nodes"):
        trees.best_tree_of_heads(8, chances)
    with pytest.raises(ValueError, match="do not fall"):
        trees.best_tree_of_heads(3, ((0.2, 0.4),))


def test_bigrams_learn_how_often_tokens_follow_one_another():
    draw = np.random.default_rng(1)
    frequency = draw.dirichlet(np.full(6, 0.5), size=6)
    rows = []
    for _ in range(300):
        row = [0]
        for _ in range(20):
            row.append(int(draw.choice(6, p=frequency[row[-1]])))
        rows.append(row[1:])
    sharding.use_mesh(config.Mesh())
    bigrams = refined.fit_bigrams(rows, vocab=6, width=6)
    logits = bigrams.before @ bigrams.after
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    counted = np.zeros((6, 6))
    np.add.at(counted, tuple(refined.bigram_pairs(rows, 0).T), 1)
    np.testing.assert_allclose(probability, counted / counted.sum(axis=1, keepdims=True), atol=0.05)
    with pytest.raises(ValueError, match="no tokens at all"):
        refined.fit_bigrams([[]], vocab=6)
    with pytest.raises(ValueError, match="ids must be in 0..5"):
        refined.fit_bigrams([[1, 6]], vocab=6)


@pytest.mark.parametrize(
    "drafter, kind, message",
    [
        (blockwise.Blockwise(), "encoder_decoder", "has no heads"),
        (
            blockwise.Blockwise(protocol.chain(5)),
            "encoder_decoder of heads",
            "a block of at most 4 tokens",
        ),
        (medusa.Medusa(protocol.chain(6)), "decoder_only of medusa", "a block of at most 4 tokens"),
        (refined.Refined(), "encoder_decoder of hydra", "nothing to refine"),
    ],
)
def test_a_model_without_the_heads_is_refused(drafter, kind, message):
    use_one_device()
    with pytest.raises(ValueError, match=message):
        decode_rows(kind, GREEDY, decoding.Drafting(drafter))
