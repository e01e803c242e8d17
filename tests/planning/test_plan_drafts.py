# SPDX-License-Identifier: Apache-2.0
"""Laws of plans of draft models: the paper's equation, what pays, and what never does."""

import numpy as np
import pytest
from conftest import toy_model

from t5x_lite import config, plan
from t5x_lite.planning import chips, drafts, phases

SIZES = phases.TextSizes(inputs=16, new_tokens=16)


def test_expected_tokens_are_those_of_a_simulation():
    draw = np.random.default_rng(0)
    for acceptance, length in ((0.3, 2), (0.8, 5)):
        accepted = draw.random((20000, length)) < acceptance
        written = 1 + np.cumprod(accepted, axis=1).sum(1)
        expected = drafts.expected_tokens(acceptance, length)
        assert expected == pytest.approx(written.mean(), rel=0.02)
        # Leviathan et al., 2023, equation 1.
        assert expected == pytest.approx((1 - acceptance ** (length + 1)) / (1 - acceptance))


def test_a_draft_pays_from_its_break_even_on():
    blocks = [1.0 + 0.02 * k for k in range(17)]
    for step in (0.01, 0.1, 0.5):
        at = drafts.plan_draft((1, 8), step, blocks, 0.5).break_even
        assert 0 < at < 1
        assert drafts.plan_draft((1, 8), step, blocks, at + 0.01).speedup > 1
        assert drafts.plan_draft((1, 8), step, blocks, at - 0.001).speedup <= 1
    # The best draft length is that of all lengths tried by hand.
    tried = {k: drafts.expected_tokens(0.8, k) / (blocks[k] + 0.1 * k) for k in range(1, 17)}
    best = drafts.plan_draft((1, 8), 0.1, blocks, 0.8)
    assert best.draft_length == max(tried, key=tried.__getitem__)
    assert best.speedup == pytest.approx(max(tried.values()))
    never = drafts.plan_draft((1, 8), 1.1, blocks, 1.0)
    assert never.speedup < 1 and never.break_even == 1


def test_drafts_are_ranked_and_a_block_costs_no_more_than_its_tokens():
    cfg = toy_model("decoder_only", heads=4, embed=32, head_dim=8, positions="none", layers=4)
    run = config.Run(model_dir="none", model=cfg, data=None)
    known = phases.serving_arithmetic(run, chips.parse_chips("v5ex1"), SIZES)
    one, four = (drafts.block_seconds(known, 2, tokens) for tokens in (1, 4))
    assert one == known.decoding(2).seconds and one < four < 4 * one
    ranked = drafts.rank_drafts(
        run, chips.parse_chips("v5ex1"), SIZES, [(4, 32), (1, 8)], rows=2, acceptance=0.7
    )
    assert [(each.layers, each.width) for each in ranked] == [(1, 8), (4, 32)]
    assert ranked[0].cost < ranked[1].cost == pytest.approx(1)


@pytest.mark.parametrize("text", ["4", "2x", "0x8", "1x8x2", "axb", "1x8,"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="write layers and width"):
        drafts.parse_sizes(text)
    assert drafts.parse_sizes("1x8, 2x16") == [(1, 8), (2, 16)]


def test_an_acceptance_without_drafts_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        plan.main(
            ["--gin_file=configs/runs/g2p.gin", "--chips=v5ex1", "--serve", "--acceptance=0.5"]
        )
    assert end.value.code == 2 and "add --draft" in capsys.readouterr().err
