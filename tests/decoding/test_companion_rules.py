# SPDX-License-Identifier: Apache-2.0
"""Rules of companions: the formulas of their papers, the processor of transformers, refusals."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from companion_toys import CASES, Case, assert_same_logits, combine_by_hand
from jax import Array
from transformers.modeling_outputs import CausalLMOutput

from t5x_lite import config
from t5x_lite.config.companions import parse_combination
from t5x_lite.decoding import sampling
from t5x_lite.decoding.companions import rules
from t5x_lite.decoding.companions.companion import BlockView, CompanionState, combine_logits
from t5x_lite.decoding.protocol import chain

VOCAB, COUNT = 24, 100


@pytest.mark.parametrize(
    "companion, combine, layers",
    [
        *((case.companion, case.combine, 1) for case in CASES.values() if ":3.86" not in case[1]),
        ("model:other", "contrast:0.1", 1),
        ("model:other", "switch:2", 1),
        ("model:other", "contrast:1:2", 1),
        ("prompt:other", "guidance:0.5", 1),
        ("layers:high", "dola:0.1", 4),
        ("layers:high", "deco:0.6:0.5", 4),
    ],
)
def test_rules_are_the_formulas_of_their_papers(companion, combine, layers):
    case = Case(companion, combine)
    draw = np.random.default_rng(7)
    plain = (2 * draw.normal(size=(COUNT, 1, VOCAB))).astype(np.float32)
    others = (2 * draw.normal(size=(layers, COUNT, 1, VOCAB))).astype(np.float32)
    others[:, ::2] += plain[::2]  # of which some are alike
    rule = rules.make_rule(parse_combination(combine, companion))
    with jax.set_mesh(None):
        both = jax.nn.log_softmax(jnp.array(plain)), jax.nn.log_softmax(jnp.array(others))
        entropy = sampling.entropy(both[1][0])[..., 0] if rule.window else None
        ours = rule.combine(rules.BothLogits(*both, entropy)).logits
    for row in range(COUNT):
        expected = combine_by_hand(case, plain[row, 0], others[:, row, 0])
        assert_same_logits(ours[row, 0], expected, atol=2e-5)


def test_guidance_is_the_processor_of_transformers():
    draw = np.random.default_rng(5)
    plain, other = (2 * draw.normal(size=(2, COUNT, VOCAB))).astype(np.float32)

    class Stub:
        def __call__(self, input_ids, **options):
            return CausalLMOutput(logits=torch.tensor(other)[:, None])

    theirs = transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.7, Stub())
    expected = theirs(torch.zeros(COUNT, 3).long(), torch.tensor(plain)).numpy()
    rule = rules.make_rule(parse_combination("guidance:1.7", "unconditional"))
    with jax.set_mesh(None):
        both = rules.BothLogits(
            jax.nn.log_softmax(jnp.array(plain))[:, None],
            jax.nn.log_softmax(jnp.array(other))[None, :, None],
        )
        ours = rule.combine(both).logits[:, 0]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


class Stub(NamedTuple):
    """A companion whose logits are known."""

    rule: rules.CombinationRule
    others: Array

    def read(self, target, state, view, inner):
        """Its logits, whatever target, state, view and inner are."""
        return self.others, state


@pytest.mark.parametrize("combine", ["guidance:1.7", "contrast:0.1", "switch:0.01"])
def test_what_either_of_both_never_writes_is_never_written(combine):
    """Also where one vocabulary is padded to more ids than the other."""
    never = -np.inf
    model_logits = np.array([1, never, 2, 0, 5, 1], np.float32)
    others = np.array([0, 3, never, 1], np.float32)
    rule = rules.make_rule(parse_combination(combine, "model:other"))
    with jax.set_mesh(None):
        stub = Stub(rule, jnp.array(others)[None, None, None])
        state = CompanionState(jnp.zeros(1, jnp.int32), jnp.zeros((1, 0)))
        view = BlockView(jnp.zeros((1, 1), jnp.int32), jnp.ones(1), jnp.ones(1), chain(1))
        output = combine_logits(stub, None, state, view, {}, jnp.array(model_logits)[None, None])
    assert np.isneginf(output.logits[0, 0]).tolist() == [False, True, True, False, True, True]


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(companion="modl:x"), "did you mean model"),
        (dict(companion="model"), "is empty: write model:PATH"),
        (dict(companion="prompt:"), "is empty: write prompt:TEXT, or unconditional"),
        (dict(companion="prompt: "), "is empty"),
        (dict(companion="unconditional:x"), "takes nothing after a colon"),
        (dict(companion="layers:2,two"), "needs different numbers of layers"),
        (dict(companion="layers:2,2"), "needs different numbers of layers"),
        (dict(combine="guidance:2"), "set Decode.companion"),
        (dict(companion="unconditional", combine="guidence:2"), "did you mean guidance"),
        (dict(companion="unconditional", combine="guidance:-1"), "SCALE must be"),
        (dict(companion="unconditional", combine="guidance:nan"), "SCALE must be"),
        (dict(companion="unconditional", combine="guidance:x"), "SCALE is not a number"),
        (dict(companion="unconditional", combine="guidance:1:2"), r"guidance\[:SCALE\]"),
        (dict(companion="model:x", combine="contrast:0"), "ALPHA must be"),
        (dict(companion="model:x", combine="contrast:1.1"), "ALPHA must be"),
        (dict(companion="model:x", combine="contrast:0.1:0"), "BETA must be"),
        (dict(companion="model:x", combine="switch"), r"write switch:NATS\[:TOKENS\]"),
        (dict(companion="model:x", combine="switch:1:2.5"), "TOKENS must be an integer"),
        (dict(companion="model:x", combine="dola"), "needs Decode.companion layers"),
        (dict(companion="layers:high", combine="contrast"), "has several layers"),
    ],
)
def test_what_cannot_be_combined_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        config.Decode(**options)
