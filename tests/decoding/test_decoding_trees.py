# SPDX-License-Identifier: Apache-2.0
"""Laws of blocks that are trees: the accepted path, the tokens, and the cache after the move."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding_loop import (
    EACH_KIND,
    EXAMPLES,
    GREEDY,
    KINDS,
    NEVER,
    generate,
    ready,
    script,
    use_one_device,
    weights,  # noqa: F401 (a fixture)
)

from t5x_lite import model
from t5x_lite.decoding import generation, loop, protocol, target
from t5x_lite.decoding.acceptance import exact

# Two first drafts, of which the second has a chain below it and a wrong sibling on the way.
BUSHY = protocol.Tree((-1, 0, 0, 2, 2, 4, 5))
# The nodes with the right drafts.
RIGHT = (2, 4, 5, 6)


@pytest.fixture
def alone():
    use_one_device()


@dataclass(frozen=True)
class Planted:
    """Drafts the tokens of a script [b T] at the nodes `right` of a tree, and others everywhere
    else; top is none."""

    tree: protocol.Tree = BUSHY
    right: tuple[int, ...] = RIGHT
    top: int = 0

    def begin(self, context):
        return context.weights

    def propose(self, context, drafter_state, state):
        steps = len(self.right)

        def take(row, start):
            return jax.lax.dynamic_slice_in_dim(row, start, steps)

        coming = jax.vmap(take)(drafter_state, state.length)
        depth = np.minimum(self.tree.depth[1:] - 1, steps - 1)

        def plant(coming):
            wrong = (coming[depth] + 1) % 64
            return wrong.at[np.array(self.right) - 1].set(coming)

        return protocol.Draft(jax.vmap(plant)(coming)), drafter_state

    def observe(self, context, drafter_state, state, output):
        return drafter_state


@pytest.mark.slow
@EACH_KIND
def test_a_tree_changes_no_token_and_saves_steps(alone, weights, kind, decode):  # noqa: F811
    plain = generate(kind, weights, decode)
    right = generate(kind, weights, decode, drafter=Planted(), script=script(kind, plain))
    hostile = generate(kind, weights, decode, drafter=Planted(), script=script(kind, plain, 7))
    assert (right.steps, hostile.steps) == (2, 10)
    for result in (right, hostile):
        np.testing.assert_array_equal(result.tokens, plain.tokens)
        np.testing.assert_allclose(result.scores, plain.scores, atol=1e-4)
    # Four drafts and the model's own choice, twice.
    assert right.token_step[0, 0].tolist() == [0] * 5 + [1] * 5
    assert right.token_node[0, 0].tolist() == [*RIGHT, 0] * 2
    assert not hostile.token_node.any()


def test_the_cache_after_a_tree_equals_a_fresh_prefill(alone, weights):  # noqa: F811
    cfg, params = KINDS["decoder_only"], ready("decoder_only", weights)
    plain = generate("decoder_only", weights, GREEDY)
    length = np.array([len(example) + 1 for example in EXAMPLES], np.int32)
    prompts = np.zeros((len(EXAMPLES), 16), np.int32)
    for row, example in enumerate(EXAMPLES):
        prompts[row, : len(example) + 1] = [cfg.decoder_start_token_id, *example]
    prompts = generation.shard_rows(protocol.Prompts(prompts, length))

    def prefill(params, prompts):
        return target.prefill(cfg, params, model.EncoderMemory(), prompts, 40)

    def decode_script(params, prompts, script):
        stopping = protocol.StoppingCriteria(NEVER, prompts.length + 10)
        lone = target.make_target(cfg, params, model.EncoderMemory())
        context = protocol.DecodeContext(lone, stopping, prompts, weights=script)
        state = generation.initial_state(context, prefill(params, prompts), 40, script)
        return loop.run_loop(context, Planted(), exact.Exact(), state)

    state = jax.jit(decode_script)(params, prompts, script("decoder_only", plain))
    fresh = jax.jit(prefill)(params, protocol.Prompts(state.tokens, state.length))
    assert int(state.steps) == 2
    for ours, theirs in zip(jax.tree.leaves(state.cache), jax.tree.leaves(fresh), strict=True):
        for row, filled in enumerate(state.length.tolist()):
            np.testing.assert_allclose(ours[row, :, :filled], theirs[row, :, :filled], atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_the_longest_accepted_path_is_found_as_by_search(seed):
    draw = np.random.default_rng(seed)
    width = int(draw.integers(2, 20))
    tree = protocol.Tree((-1, *(int(draw.integers(0, node)) for node in range(1, width))))
    block, chosen = draw.integers(0, 2, (2, 30, width))
    inputs = exact.VerifyInput(
        jnp.array(block), None, jnp.array(chosen), None, None, tree=tree, sampling=None
    )
    accepted = exact.Exact()(inputs)
    for row in range(30):
        holds = [True]
        for node, parent in enumerate(tree.parents[1:], start=1):
            holds.append(holds[parent] and block[row, node] == chosen[row, parent])
        longest = max(tree.depth[node] for node in range(width) if holds[node])
        count = int(accepted.count[row])
        path = np.asarray(accepted.path[row, :count]).tolist()
        assert count == longest + 1
        assert path[0] == 0
        assert all(holds[node] for node in path)
        assert [tree.parents[node] for node in path[1:]] == path[:-1]
        assert accepted.tokens[row, :count].tolist() == chosen[row, path].tolist()


@pytest.mark.parametrize("parents", [(), (0,), (-1, 1), (-1, -1), (-1, 0, 3)])
def test_parents_that_are_not_a_tree_are_refused(parents):
    with pytest.raises(ValueError, match="Not a tree"):
        protocol.Tree(parents)
