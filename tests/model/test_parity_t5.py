# SPDX-License-Identifier: Apache-2.0
"""The T5 family gives transformers' numbers: T5 1.0, 1.1, mT5, umT5, UL2 and lone encoders."""

import dataclasses

import numpy as np
import parity
import pytest
import torch
import transformers

VERSIONS = {
    "t5_1_0": (transformers.T5ForConditionalGeneration, {"feed_forward_proj": "relu"}, True),
    "t5_1_1": (
        transformers.T5ForConditionalGeneration,
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        False,
    ),
    "ul2": (transformers.T5ForConditionalGeneration, {"feed_forward_proj": "gated-silu"}, True),
    "mt5": (transformers.MT5ForConditionalGeneration, {"feed_forward_proj": "gated-gelu"}, False),
    "umt5": (transformers.UMT5ForConditionalGeneration, {"feed_forward_proj": "gated-gelu"}, False),
}


def their_config(kind, seed: int, **changes):
    """A tiny config drawn by seed: odd numbers of heads, unequal depths, few buckets.

    Args:
      kind: class of the model in transformers.
      seed: seed of the draw.
      **changes: fields of the config.
    """
    draw = np.random.default_rng(seed)
    fields = dict(
        vocab_size=int(draw.integers(20, 40)),
        d_model=int(draw.integers(3, 9)) * 2,
        d_kv=int(draw.integers(3, 8)),
        d_ff=int(draw.integers(9, 30)),
        num_heads=int(draw.choice([1, 3, 5])),
        num_layers=int(draw.integers(2, 4)),
        num_decoder_layers=int(draw.integers(1, 4)),
        relative_attention_num_buckets=int(draw.choice([6, 8, 12])),
        relative_attention_max_distance=int(draw.integers(8, 12)),
        layer_norm_epsilon=float(draw.choice([1e-6, 1e-3])),
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return kind.config_class(**fields | changes)


def their_model(version: str, seed: int) -> torch.nn.Module:
    """A random model of transformers."""
    kind, changes, tied = VERSIONS[version]
    theirs = kind._from_config(their_config(kind, seed, **changes), attn_implementation="eager")
    if not tied:
        # transformers 5 ties every new T5; only weights of its own make a head untied.
        theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.detach().clone())
    return parity.shaken(theirs, seed)


@pytest.fixture
def pair(request, tmp_path):
    """A random model of transformers and ours."""
    version, seed = request.param
    return parity.read(their_model(version, seed), tmp_path / "theirs")


FIRST = [pytest.param((version, 0), id=version) for version in VERSIONS]
AGAIN = [
    pytest.param((version, seed), id=f"{version}-{seed}", marks=pytest.mark.slow)
    for version in VERSIONS
    for seed in (1, 2, 3)
]


@pytest.mark.parametrize("pair", FIRST + AGAIN, indirect=True)
def test_logits_are_those_of_transformers(pair):
    parity.assert_alike(pair, parity.drawn_ids(pair.cfg.vocab, 0, seed=5))


GRADIENTS = [("t5_1_0", 2), pytest.param(("umt5", 2), marks=pytest.mark.slow)]


@pytest.mark.parametrize("pair", GRADIENTS, indirect=True, ids=str)
def test_gradients_are_those_of_transformers(pair):
    parity.assert_gradients_alike(pair, parity.drawn_ids(pair.cfg.vocab, 0, seed=6))


@pytest.mark.parametrize("pair", FIRST, indirect=True)
def test_there_and_back_keeps_every_bit(pair, tmp_path):
    kind = type(pair.theirs)
    if kind is transformers.MT5ForConditionalGeneration:
        kind = transformers.T5ForConditionalGeneration  # the same numbers under T5's name
    parity.assert_there_and_back(pair, kind, tmp_path / "ours")


def test_a_released_umt5_is_read_without_scaled_logits(tmp_path):
    """transformers 5.23 divides by sqrt(d_model), transformers 4 and the training did not."""
    theirs = their_model("umt5", 4)
    pair = parity.read(theirs, tmp_path / "theirs")
    described = theirs.config.to_dict() | {"tie_word_embeddings": False}
    described.pop("scale_decoder_outputs", None)  # No released file has it; 5.24 writes it.
    cfg = pair.family.parse_config(described, ["decoder.", "lm_head.weight"])
    assert cfg.scale_logits is False
    assert (
        pair.family.parse_config(pair.family.config_json(cfg), ["decoder.", "lm_head.weight"])
        == cfg
    )
    ids = parity.drawn_ids(cfg.vocab, 0, seed=5)
    unscaled = pair._replace(cfg=dataclasses.replace(pair.cfg, scale_logits=False))
    _, logits = parity.our_results(unscaled, ids)
    _, divided = parity.their_results(theirs, ids)
    np.testing.assert_allclose(logits, divided * cfg.encoder.embed**0.5, atol=1e-4, rtol=1e-4)


def test_a_byt5_is_a_t5_with_unequal_depths(tmp_path):
    kind, changes, _ = VERSIONS["t5_1_1"]
    deep = their_config(kind, 5, num_layers=3, num_decoder_layers=1, **changes)
    theirs = parity.shaken(kind._from_config(deep, attn_implementation="eager"), 5)
    pair = parity.read(theirs, tmp_path / "theirs")
    assert (pair.cfg.encoder.layers, pair.cfg.decoder.layers) == (3, 1)
    parity.assert_alike(pair, parity.drawn_ids(pair.cfg.vocab, 0, seed=5))
