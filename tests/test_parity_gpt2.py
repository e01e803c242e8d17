# SPDX-License-Identifier: Apache-2.0
"""GPT-2 equals transformers: logits, cached decoding, gradients, conversion there and back."""

import decoder_parity
import jax
import numpy as np
import pytest
import transformers

from t5x_lite.conversion.huggingface import gpt2

DRAWS = {
    "plain": dict(n_embd=24, n_head=3, n_layer=2),
    "own inner width, untied": dict(n_embd=20, n_head=5, n_inner=28, tie_word_embeddings=False),
    "unscaled scores, relu": dict(n_embd=16, scale_attn_weights=False, activation_function="relu"),
}


def described(**changes) -> dict:
    fields = dict(vocab_size=37, n_positions=16, n_layer=1, n_head=2, n_embd=16) | changes
    return fields | dict(bos_token_id=36, eos_token_id=36, layer_norm_epsilon=1e-4)


def pair_of(name: str, folder):
    fields = described(**DRAWS[name])
    return decoder_parity.drawn(transformers.GPT2Config(**fields), len(name), folder)


@pytest.mark.parametrize("name", DRAWS)
def test_logits_equal_and_conversion_loses_nothing(name, tmp_path):
    pair = pair_of(name, tmp_path / "theirs")
    ids = decoder_parity.drawn_ids(37, pair.cfg.start, seed=1)
    decoder_parity.assert_alike(pair, ids)
    decoder_parity.assert_there_and_back(pair, ids, tmp_path / "ours")


def test_gradients_equal(tmp_path):
    pair = pair_of("plain", tmp_path / "theirs")
    decoder_parity.assert_gradients_alike(pair, decoder_parity.drawn_ids(37, 36, seed=2))


def test_released_files_leave_out_the_prefix_and_carry_masks(tmp_path):
    pair = pair_of("plain", tmp_path / "theirs")
    state = decoder_parity.state_of(pair.params, pair.cfg, gpt2)
    bare = {name.removeprefix("transformer."): array for name, array in state.items()}
    bare |= {f"h.{layer}.attn.bias": np.tril(np.ones((1, 1, 16, 16))) for layer in range(2)}
    assert gpt2.model(described(**DRAWS["plain"]), bare).tied
    params = decoder_parity.ours(decoder_parity.State(bare), pair.cfg, gpt2)
    jax.tree.map(np.testing.assert_array_equal, params, pair.params)
    bare["transformer.ln_f.bias"] = bare["ln_f.bias"]
    with pytest.raises(ValueError, match="ln_f.bias and transformer.ln_f.bias"):
        decoder_parity.ours(decoder_parity.State(bare), pair.cfg, gpt2)


def test_a_tied_head_in_the_file_has_to_equal_the_table(tmp_path):
    pair = pair_of("plain", tmp_path / "theirs")
    state = decoder_parity.state_of(pair.params, pair.cfg, gpt2)
    state["lm_head.weight"] = state["transformer.wte.weight"].copy()
    decoder_parity.ours(decoder_parity.State(state), pair.cfg, gpt2)
    state["lm_head.weight"][3, 4] += 1
    with pytest.raises(ValueError, match="lm_head.weight"):
        decoder_parity.ours(decoder_parity.State(state), pair.cfg, gpt2)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"add_cross_attention": True},
        {"activation_function": "gelu"},
        {"n_embd": None},
        {"n_layer": "2"},
        {"n_head": 3},
    ],
)
def test_what_is_not_computed_is_refused_by_name(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        gpt2.model({"model_type": "gpt2"} | described(**changes), ["lm_head.weight"])
