# SPDX-License-Identifier: Apache-2.0
"""Laws of companions: the logits of two full passes combined by hand, and a text that no drafter,
batch, mesh, beam or stream changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from companion_toys import (
    CASES,
    GREEDY,
    LENGTH,
    SAMPLED,
    assert_same_logits,
    expected_logits,
    full_pass,
    generate,
    plain,
    prepared,
    request_of,
)
from conftest import mark_exhaustive
from test_decoding_loop import EXAMPLES, KINDS, NEVER, use_one_device

from t5x_lite import config, decoding, sharding
from t5x_lite.decoding import commit, generation, streaming, target, verification
from t5x_lite.decoding.acceptance import exact
from t5x_lite.decoding.companions.companion import BlockView, combine_logits
from t5x_lite.decoding.drafters import (
    early_exit,
    jacobi,
    late_layers,
    lookahead,
    lookup,
    recycling,
    trigram,
)
from t5x_lite.decoding.drafters.draft_model import DraftModel
from t5x_lite.decoding.drafters.union import union
from t5x_lite.decoding.protocol import Draft, Tree, VerifySpec, chain

# The accepted path leads through the second branch.
TREE = Tree((-1, 0, 0, 1, 2, 4))


# The quick ones are of all sources of logits, and of both kinds of models.
QUICK = ("guidance encoder_decoder", "contrast decoder_only", "dola decoder_only")
# Both kinds read a companion by the same code: the others are of one kind each.
ONCE = ("rolling switch encoder_decoder", "switch decoder_only", "deco decoder_only")
ONCE += ("instructive encoder_decoder",)
EVERY = [
    pytest.param(
        name,
        kind,
        marks=[]
        if f"{name} {kind}" in QUICK
        else pytest.mark.slow
        if f"{name} {kind}" in ONCE
        else pytest.mark.exhaustive,
    )
    for name in CASES
    for kind in ("encoder_decoder", "decoder_only")
]


@pytest.mark.parametrize("name, kind", EVERY)
def test_logits_are_those_of_full_passes(name, kind):
    """In two blocks of a tree, with an accepted path that leaves its first branch."""
    tokens = plain(name, kind, GREEDY)[:, 0]
    wrong = (tokens[:, :3] + 1) % 64
    drafts = np.stack([wrong[:, 0], tokens[:, 0], wrong[:, 1], tokens[:, 1], wrong[:, 2]], axis=1)
    blocks = jax.device_get(two_blocks(name, kind, drafts))
    for number, (written_length, logits) in enumerate(blocks):
        for row, example in enumerate(EXAMPLES):
            count = int(written_length[row])
            assert count == (0, 3)[number]
            for node in range(TREE.width):
                path = [int(drafts[row, at - 1]) for at in np.flatnonzero(TREE.ancestors[node])[1:]]
                written = [*tokens[row, :count].tolist(), *path]
                assert_same_logits(
                    logits[row, node], expected_logits(name, kind, example, written), atol=1e-3
                )


def two_blocks(name, kind, drafts):
    """Number of new tokens before each of two blocks, and the combined logits after its nodes.

    Args:
      name: of the case.
      kind: of the model.
      drafts: draft tokens of both blocks.
    """
    use_one_device()
    request = request_of(name, kind, GREEDY)
    cfg, params = KINDS[kind], prepared(kind, jax.sharding.get_mesh())
    program = generation.make_program(cfg, GREEDY, decoding.Drafting(lookup.Lookup(chain(8))))

    @jax.jit
    def run(params, request, rules, drafts):
        encoded, cache = generation.read_request(program, params, request)
        companion_state = generation.begin_companion(program, request, rules.companion)
        decoded = target.make_target(program.cfg, params, encoded)
        context = generation.make_context(program, decoded, request, rules, None)
        state = generation.initial_state(context, cache, context.slots, None)
        state = state._replace(companion_state=companion_state)
        blocks = []
        for _ in range(2):
            block = jnp.concatenate([state.root[:, None], drafts], axis=1)
            view = BlockView(block, state.length, context.prompts.length, TREE)
            hidden, _, inner = verification.forward_block(context, view, state.cache)
            logits = decoded.logits(hidden)
            combined = combine_logits(
                context.companion, decoded, state.companion_state, view, inner, logits
            )
            blocks.append((state.length + 1 - context.prompts.length, combined.logits))
            spec = VerifySpec(TREE, 0, None)
            output, cache = verification.verify(context, spec, exact.Exact(), state, Draft(drafts))
            state = commit.commit(context, state._replace(cache=cache), TREE, output)
        return blocks

    placed, rules = generation.place_request(request), generation.make_rules(request, GREEDY)
    return run(params, placed, rules, generation.shard_rows(drafts))


# Each with a kind, so that both kinds and all sources of logits occur.
DRAFTED = {
    "guidance": "encoder_decoder",
    "contrast": "decoder_only",
    "dola": "encoder_decoder",
    "rolling switch": "decoder_only",
}


# Two logits of its own, one pass of another model, layers, and turns of both: each in one mode.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, decode",
    mark_exhaustive(
        [(name, decode) for name in DRAFTED for decode in (GREEDY, SAMPLED)],
        kept=[
            ("guidance", SAMPLED),
            ("contrast", SAMPLED),
            ("dola", GREEDY),
            ("rolling switch", GREEDY),
        ],
    ),
    ids=[f"{name}-{mode}" for name in DRAFTED for mode in ("greedy", "sampled")],
)
def test_drafts_change_no_token(name, decode):
    kind = DRAFTED[name]
    expected = plain(name, kind, decode)
    use_one_device()
    drafted = generate(name, kind, decode, decoding.Drafting(recycling.Recycling()))
    np.testing.assert_array_equal(drafted.tokens, expected)
    request = decoding.make_request(KINDS[kind], EXAMPLES, decode, eos=NEVER)
    params = prepared(kind, jax.sharding.get_mesh())
    free = decoding.generate(KINDS[kind], params, request, decode)
    # One toy writes the same token over and over, whatever guides it, unless it samples.
    assert (free.tokens != expected).any() or (name, decode) == ("guidance", GREEDY)
    if name == "rolling switch":
        assert 0 < drafted.model_tokens.sum() < drafted.lengths.sum()


DRAFTERS = {
    "lookup": lookup.Lookup(chain(4)),
    "trigram": trigram.Trigram(chain(4)),
    "jacobi": jacobi.Jacobi(chain(4)),
    "lookahead": lookahead.Lookahead(),
    "early": early_exit.EarlyExit(1, chain(3)),
    "late": late_layers.LateLayers(1, chain(3)),
    "draft": DraftModel(KINDS["decoder_only"], KINDS["decoder_only"], chain(3)),
    "union": union(lookup.Lookup(chain(3)), recycling.Recycling()),
}


@pytest.mark.slow
@pytest.mark.exhaustive  # every drafter; that drafts change no token is tested above
@pytest.mark.parametrize("name", ["contrast", "dola"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_no_drafter_changes_a_token(drafter, name):
    expected = plain(name, "decoder_only", GREEDY)
    use_one_device()
    mesh = jax.sharding.get_mesh()
    weights = prepared("decoder_only", mesh, 2) if drafter == "draft" else None
    drafting = decoding.Drafting(DRAFTERS[drafter], weights)
    drafted = generate(name, "decoder_only", GREEDY, drafting)
    np.testing.assert_array_equal(drafted.tokens, expected)
    assert drafted.steps <= LENGTH


@pytest.mark.slow
def test_the_amateur_may_draft_for_what_it_contrasts_or_decides():
    """Speculative contrastive decoding; and switching, whose larger model then runs less often."""
    for name in ("contrast", "switch"):
        expected = plain(name, "decoder_only", GREEDY)
        use_one_device()
        weights = prepared("decoder_only", jax.sharding.get_mesh(), 2)
        drafting = decoding.Drafting(DRAFTERS["draft"], weights)
        drafted = generate(name, "decoder_only", GREEDY, drafting)
        np.testing.assert_array_equal(drafted.tokens, expected)
    # Where the companion decides, its own draft is right.
    decided, new = drafted.model_tokens[:, 0], drafted.lengths[:, 0]
    for row in range(len(EXAMPLES)):
        steps = len(set(drafted.token_step[row, 0, : new[row]].tolist()))
        assert steps <= decided[row] + -(-new[row] // 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", mark_exhaustive(DRAFTED, kept=["guidance", "rolling switch"]))
def test_a_row_alone_and_a_stream_have_the_same_tokens(name):
    kind = DRAFTED[name]
    expected = plain(name, kind, GREEDY)
    use_one_device()
    for row in (0, 4):
        alone = generate(name, kind, GREEDY, examples=[EXAMPLES[row]], rows=[row])
        np.testing.assert_array_equal(alone.tokens[0], expected[row])
    params = prepared(kind, jax.sharding.get_mesh())
    text = streaming.DecodeStream(KINDS[kind], params, request_of(name, kind, GREEDY), GREEDY)
    text.advance(3)
    text.change_drafter(decoding.Drafting(recycling.Recycling()))
    done = False
    while not done:
        result, done = text.advance(2)
    np.testing.assert_array_equal(result.tokens, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", mark_exhaustive(["guidance", "dola"], kept=["guidance"]))
def test_a_mesh_changes_no_token(name):
    kind, eight = DRAFTED[name], [*EXAMPLES, *EXAMPLES[:3]]
    expected = plain(name, kind, GREEDY)
    sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    split = generate(name, kind, GREEDY, examples=eight)
    np.testing.assert_array_equal(split.tokens[: len(EXAMPLES)], expected)


@pytest.mark.slow
def test_samples_share_what_the_companion_reads():
    use_one_device()
    for name in ("guidance", "rolling switch"):
        kind = DRAFTED[name]
        several = dataclasses.replace(SAMPLED, n_best=3)
        result = generate(name, kind, several)
        np.testing.assert_array_equal(result.tokens[:, :1], plain(name, kind, SAMPLED))
        assert (result.tokens[:, 1] != result.tokens[:, 0]).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    mark_exhaustive(
        ["guidance", "contrast", "deco", "rolling switch"], kept=["guidance", "rolling switch"]
    ),
)
def test_beams_sum_the_combined_logits(name):
    kind = DRAFTED.get(name, "decoder_only")
    use_one_device()
    decode = config.Decode(max_new_tokens=5, beams=3, n_best=3)
    result = generate(name, kind, decode, examples=EXAMPLES[:2])
    for row, example in enumerate(EXAMPLES[:2]):
        for text in range(3):
            tokens = result.tokens[row, text].tolist()
            total = sum(
                expected_logits(name, kind, example, tokens[:place])[token]
                for place, token in enumerate(tokens)
            )
            np.testing.assert_allclose(result.log_probability[row, text], total, atol=2e-3)
    best = generate(name, kind, dataclasses.replace(GREEDY, max_new_tokens=5))
    assert (result.log_probability[:, 0] >= result.log_probability[:, 1]).all()
    assert best.tokens.shape == (len(EXAMPLES), 1, 5)


@pytest.mark.slow
def test_a_constraint_is_obeyed_where_it_allows_implausible_tokens_alone():
    use_one_device()
    name, kind = "contrast", "decoder_only"
    combined = expected_logits(name, kind, EXAMPLES[0], [])
    allowed = np.flatnonzero(~np.isfinite(combined))[:4]
    others = tuple(token for token in range(64) if token not in allowed)
    tokens = generate(name, kind, dataclasses.replace(GREEDY, suppress_tokens=others)).tokens
    assert np.isin(tokens, allowed).all()
    # Among implausible tokens the model's order stands.
    first = full_pass(kind).logits(EXAMPLES[0], [])
    assert tokens[0, 0, 0] == allowed[np.argmax(first[allowed])]
