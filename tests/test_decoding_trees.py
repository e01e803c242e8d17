# SPDX-License-Identifier: Apache-2.0
"""Laws of blocks that are trees: the accepted path, the tokens, and the cache after the move."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding_loop import (
    EXAMPLES,
    GREEDY,
    KINDS,
    NEVER,
    SAMPLED,
    generate,
    ready,
    script,
    use_one_device,
    weights,  # noqa: F401 (a fixture)
)

from t5x_lite import model
from t5x_lite.decoding import acceptance, generation, loop, protocol, target

# Two first guesses, of which the second has a chain below it and a wrong sibling on the way.
BUSHY = protocol.Tree((-1, 0, 0, 2, 2, 4, 5))
# The nodes that carry the right guesses, and how many steps they go.
RIGHT = (2, 4, 5, 6)


@pytest.fixture
def alone():
    use_one_device()


@dataclass(frozen=True)
class Planted:
    """The tokens of a script [b T] at the nodes `right`, and others everywhere else."""

    tree: protocol.Tree = BUSHY
    right: tuple[int, ...] = RIGHT
    top: int = 0

    def begin(self, setting):
        return setting.weights

    def propose(self, setting, memory, state):
        steps = len(self.right)
        take = lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, steps)
        coming = jax.vmap(take)(memory, state.length)
        depth = np.minimum(self.tree.depth[1:] - 1, steps - 1)

        def plant(coming):
            wrong = (coming[depth] + 1) % 64
            return wrong.at[np.array(self.right) - 1].set(coming)

        return protocol.Draft(jax.vmap(plant)(coming)), memory

    def observe(self, setting, memory, state, verdict):
        return memory


@pytest.mark.parametrize(
    "kind, decode", [("pair", GREEDY), ("joined", SAMPLED), ("prefix", GREEDY), ("pair", SAMPLED)]
)
def test_a_tree_changes_no_token_and_saves_calls(alone, weights, kind, decode):  # noqa: F811
    plain = generate(kind, weights, decode)
    right = generate(kind, weights, decode, drafter=Planted(), script=script(kind, plain))
    hostile = generate(kind, weights, decode, drafter=Planted(), script=script(kind, plain, 7))
    assert (right.calls, hostile.calls) == (2, 10)
    for found in (right, hostile):
        np.testing.assert_array_equal(found.tokens, plain.tokens)
        np.testing.assert_allclose(found.scores, plain.scores, atol=1e-4)
    # Who wrote what: four guesses and the model's own choice, twice.
    assert right.call[0, 0].tolist() == [0] * 5 + [1] * 5
    assert right.node[0, 0].tolist() == [*RIGHT, 0] * 2
    assert not hostile.node.any()


def test_the_cache_after_a_tree_equals_a_fresh_prefill(alone, weights):  # noqa: F811
    cfg, params = KINDS["joined"], ready("joined", weights)
    plain = generate("joined", weights, GREEDY)
    length = np.array([len(example) + 1 for example in EXAMPLES], np.int32)
    prompts = np.zeros((len(EXAMPLES), 16), np.int32)
    for row, example in enumerate(EXAMPLES):
        prompts[row, : len(example) + 1] = [cfg.start, *example]
    prompts = generation.place(protocol.Prompts(prompts, length))
    prefill = lambda params, prompts: target.prefill(cfg, params, model.Read(), prompts, 40)

    def once(params, prompts, script):
        rules = protocol.Rules(NEVER, prompts.length + 10, None)
        lone = target.of(cfg, params, model.Read())
        setting = protocol.Setting(lone, rules, prompts, weights=script)
        state = generation.started(setting, prefill(params, prompts), 40, script)
        return loop.run(setting, Planted(), acceptance.Exact(), state)

    state = jax.jit(once)(params, prompts, script("joined", plain))
    fresh = jax.jit(prefill)(params, protocol.Prompts(state.tokens, state.length))
    assert int(state.calls) == 2
    for ours, theirs in zip(jax.tree.leaves(state.cache), jax.tree.leaves(fresh), strict=True):
        for row, filled in enumerate(state.length.tolist()):
            np.testing.assert_allclose(ours[row, :, :filled], theirs[row, :, :filled], atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_the_longest_path_that_holds_is_found_as_by_search(seed):
    draw = np.random.default_rng(seed)
    width = int(draw.integers(2, 20))
    tree = protocol.Tree((-1, *(int(draw.integers(0, node)) for node in range(1, width))))
    block, chosen = draw.integers(0, 2, (2, 30, width))
    judged = acceptance.Judged(
        jnp.array(block), None, jnp.array(chosen), None, None, tree=tree, sampling=None
    )
    found = acceptance.Exact()(judged)
    for row in range(30):
        holds = [True]
        for node, parent in enumerate(tree.parents[1:], start=1):
            holds.append(holds[parent] and block[row, node] == chosen[row, parent])
        longest = max(tree.depth[node] for node in range(width) if holds[node])
        count = int(found.count[row])
        path = np.asarray(found.path[row, :count]).tolist()
        assert count == longest + 1
        assert path[0] == 0
        assert all(holds[node] for node in path)
        assert [tree.parents[node] for node in path[1:]] == path[:-1]
        assert found.tokens[row, :count].tolist() == chosen[row, path].tolist()


@pytest.mark.parametrize("parents", [(), (0,), (-1, 1), (-1, -1), (-1, 0, 3)])
def test_what_is_no_tree_is_refused(parents):
    with pytest.raises(ValueError, match="Not a tree"):
        protocol.Tree(parents)
