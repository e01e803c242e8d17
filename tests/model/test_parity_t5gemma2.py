# SPDX-License-Identifier: Apache-2.0
"""T5Gemma 2's text gives transformers' numbers: merged attention, two rotary bases, windows."""

import numpy as np
import parity
import pytest
import torch
import transformers

from t5x_lite.checkpoints.formats.huggingface import t5gemma2

KIND = transformers.T5Gemma2ForConditionalGeneration
VOCAB, EOI = 31, 17
VISION = r"model\.encoder\.(vision_tower|multi_modal_projector)\."

SEEDS = [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))]


def their_half(draw, **changes) -> dict:
    """One tower drawn: five sliding layers to a full one, or an uneven pattern."""
    kv_heads = int(draw.choice([1, 2, 3]))
    heads = kv_heads * int(draw.choice([1, 2, 3]))
    fields = dict(
        intermediate_size=int(draw.integers(9, 30)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=int(draw.integers(2, 5)) * 2,
        query_pre_attn_scalar=int(draw.integers(3, 9)),
        sliding_window=int(draw.integers(2, 7)),
        final_logit_softcapping=None if draw.integers(2) else 5.0,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0}
            if draw.integers(2)
            else {"rope_type": "default", "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
        vocab_size=VOCAB,
    )
    return fields | changes


def their_model(seed: int) -> torch.nn.Module:
    """A random model of transformers."""
    draw = np.random.default_rng(seed)
    width = 36  # of both towers, and a multiple of every number of heads that is drawn
    layers = int(draw.choice([6, 7]))
    short = {"num_hidden_layers": 3, "layer_types": ["full_attention", *2 * ["sliding_attention"]]}
    text = their_half(draw, hidden_size=width, num_hidden_layers=layers)
    decoder = their_half(draw, hidden_size=width, **short)
    encoder = {
        "text_config": text,
        "vision_config": t5gemma2.SMALLEST_VISION,
        "mm_tokens_per_image": 1,
        "eoi_token_index": EOI,
    }
    described = transformers.T5Gemma2Config(encoder=encoder, decoder=decoder)
    return parity.shaken(KIND._from_config(described, attn_implementation="eager"), seed)


@pytest.fixture
def pair(request, tmp_path):
    """A random model of transformers and ours."""
    return parity.read(their_model(request.param), tmp_path / "theirs")


def ids_with_eoi(seed: int) -> parity.Ids:
    """Random ids with an end-of-image token."""
    ids = parity.drawn_ids(VOCAB, 2, seed)
    ids.inputs[:, 5], ids.decoder[:, 3] = EOI, EOI
    return ids


@pytest.mark.parametrize("pair", SEEDS, indirect=True)
def test_logits_are_those_of_transformers(pair):
    parity.assert_alike(pair, ids_with_eoi(seed=5))


@pytest.mark.parametrize("pair", [1], indirect=True)
def test_gradients_are_those_of_transformers(pair):
    parity.assert_gradients_alike(pair, ids_with_eoi(seed=6))


@pytest.mark.parametrize("pair", [0, 3], indirect=True)
def test_there_and_back_keeps_every_bit(pair, tmp_path):
    parity.assert_there_and_back(pair, KIND, tmp_path / "ours", without=VISION)
