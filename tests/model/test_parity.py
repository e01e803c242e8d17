# SPDX-License-Identifier: Apache-2.0
"""Every family equals transformers: outputs, cached decoding, gradients, conversion and back."""

import dataclasses
import functools

import encoder_decoder_parity
import numpy as np
import parity
import pytest
from families import FAMILIES

# One of each way in which layers are built and read.
QUICK = ("gemma2, softcaps", "gpt2", "t5_1_1", "bart", "t5gemma2")
CASES = [
    *(
        pytest.param(name, seed, marks=() if name in QUICK and seed == 0 else pytest.mark.slow)
        for name, family in FAMILIES.items()
        for seed in family.seeds
    ),
    *(
        pytest.param(name, seed, marks=pytest.mark.exhaustive)
        for name, family in FAMILIES.items()
        for seed in family.exhaustive_seeds
        if seed not in family.seeds
    ),
]
GRADIENTS = [
    pytest.param(name, marks=pytest.mark.exhaustive if family.gradients == "exhaustive" else ())
    for name, family in FAMILIES.items()
    if family.gradients != "never"
]


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    """Builds the pair of a family and a seed, once for all laws."""

    @functools.cache
    def build(name, seed):
        return parity.read(FAMILIES[name].draw(seed), tmp_path_factory.mktemp("theirs"))

    return build


def adjusted(name: str, pair: parity.Pair) -> parity.Pair:
    """The pair whose architecture is the one that transformers computes."""
    return pair._replace(cfg=FAMILIES[name].adjust(pair.cfg))


def ids_of(name: str, pair: parity.Pair, seed: int):
    """Random ids for a family.

    Args:
      name: name of the family.
      pair: both models.
      seed: seed of the draw.
    """
    family = FAMILIES[name]
    start = pair.cfg.decoder_start_token_id if family.start is None else family.start
    return family.ids(family.laws.drawn_ids(pair.cfg.vocab, start, seed))


@pytest.mark.parametrize("name, seed", CASES)
def test_outputs_equal_in_one_pass_and_token_by_token(name, seed, pair_of):
    pair = adjusted(name, pair_of(name, seed))
    FAMILIES[name].laws.assert_alike(pair, ids_of(name, pair, seed=5))


@pytest.mark.slow
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal(name, pair_of):
    pair = adjusted(name, pair_of(name, FAMILIES[name].seeds[0]))
    FAMILIES[name].laws.assert_gradients_alike(pair, ids_of(name, pair, seed=6))


@pytest.mark.parametrize("name, seed", CASES)
def test_conversion_there_and_back_keeps_every_bit(name, seed, pair_of, tmp_path):
    family, pair = FAMILIES[name], pair_of(name, seed)
    loaded = parity.assert_there_and_back(pair, tmp_path / "ours", family.loads, family.lacks)
    ids = ids_of(name, pair, seed=5)
    before, after = (family.laws.their_outputs(theirs, ids) for theirs in (pair.theirs, loaded))
    np.testing.assert_array_equal(after, before)


def test_a_byt5_is_a_t5_of_unequal_depths(pair_of):
    cfg = pair_of("byt5", 5).cfg
    assert (cfg.encoder.layers, cfg.decoder.layers) == (3, 1)


def test_a_released_umt5_is_read_without_scaled_logits(pair_of):
    """transformers 5.23 divides by sqrt(d_model), transformers 4 and the training did not."""
    pair = pair_of("umt5", 0)
    config_json = pair.theirs.config.to_dict() | {"tie_word_embeddings": False}
    config_json.pop("scale_decoder_outputs", None)  # No released file has it; 5.24 writes it.
    names = ["decoder.", "lm_head.weight"]
    cfg = pair.family.parse_config(config_json, names)
    assert cfg.scale_logits is False
    assert pair.family.parse_config(pair.family.config_json(cfg), names) == cfg
    ids = encoder_decoder_parity.drawn_ids(cfg.vocab, 0, seed=5)
    unscaled = pair._replace(cfg=dataclasses.replace(pair.cfg, scale_logits=False))
    _, logits = encoder_decoder_parity.our_results(unscaled, ids)
    _, divided = encoder_decoder_parity.their_results(pair.theirs, ids)
    np.testing.assert_allclose(logits, divided * cfg.encoder.embed**0.5, atol=1e-4, rtol=1e-4)
