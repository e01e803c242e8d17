# SPDX-License-Identifier: Apache-2.0
"""T5Gemma gives transformers' numbers: grouped keys, unequal towers, windows, softcaps."""

import dataclasses

import numpy as np
import parity
import pytest
import torch
import transformers

KIND = transformers.T5GemmaForConditionalGeneration

SEEDS = [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))]


def their_half(draw, **changes) -> dict:
    """One tower drawn: odd groups of query heads, a window shorter than the inputs."""
    kv_heads = int(draw.choice([1, 2, 3]))
    heads = kv_heads * int(draw.choice([1, 2, 3]))
    fields = dict(
        hidden_size=heads * int(draw.integers(2, 5)),
        intermediate_size=int(draw.integers(9, 30)),
        num_hidden_layers=int(draw.integers(2, 4)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=int(draw.integers(2, 5)) * 2,
        query_pre_attn_scalar=int(draw.integers(3, 9)),
        sliding_window=int(draw.integers(2, 6)),
        attn_logit_softcapping=float(draw.choice([2.0, 50.0])),
        final_logit_softcapping=float(draw.choice([3.0, 30.0])),
        attention_bias=bool(draw.integers(2)),
        vocab_size=31,
    )
    return fields | changes


def their_model(seed: int, **changes) -> torch.nn.Module:
    """A random model of transformers."""
    draw = np.random.default_rng(seed)
    halves = {name: their_half(draw, **changes) for name in ("encoder", "decoder")}
    described = transformers.T5GemmaConfig(**halves, vocab_size=31)
    return parity.shaken(KIND._from_config(described, attn_implementation="eager"), seed)


@pytest.fixture
def pair(request, tmp_path):
    """Ours sees |q - k| <= window, as transformers 5.23 computes it; see t5gemma.py for why the
    family reads its files as |q - k| < window.
    """
    read = parity.read(their_model(request.param), tmp_path / "theirs")
    encoder = dataclasses.replace(read.cfg.encoder, window_form="within")
    return read._replace(cfg=dataclasses.replace(read.cfg, encoder=encoder))


@pytest.mark.parametrize("pair", SEEDS, indirect=True)
def test_logits_are_those_of_transformers(pair):
    parity.assert_alike(pair, parity.drawn_ids(pair.cfg.vocab, 2, seed=5))


@pytest.mark.parametrize("pair", [1], indirect=True)
def test_gradients_are_those_of_transformers(pair):
    parity.assert_gradients_alike(pair, parity.drawn_ids(pair.cfg.vocab, 2, seed=6))


@pytest.mark.parametrize("seed", [0, 5])
def test_there_and_back_keeps_every_bit(seed, tmp_path):
    pair = parity.read(their_model(seed), tmp_path / "theirs")
    parity.assert_there_and_back(pair, KIND, tmp_path / "ours")
