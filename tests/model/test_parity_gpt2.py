# SPDX-License-Identifier: Apache-2.0
"""GPT-2 equals transformers: logits, cached decoding, gradients, conversion there and back."""

import decoder_parity
import jax
import numpy as np
import pytest
import transformers

from t5x_lite.checkpoints.formats.huggingface import gpt2

DRAWS = {
    "plain": dict(),
    "own inner width, untied": dict(n_inner=28, tie_word_embeddings=False),
    "unscaled scores, relu": dict(scale_attn_weights=False, activation_function="relu"),
}


def described(**changes) -> dict:
    """config.json of a tiny model; changes are its fields."""
    fields = dict(vocab_size=37, n_positions=16, n_layer=2, n_head=3, n_embd=24) | changes
    return fields | dict(bos_token_id=29, eos_token_id=29, layer_norm_epsilon=1e-4)


def pair_of(name: str, folder, seed: int = 0):
    """A random pair of models.

    Args:
      name: case in `DRAWS`.
      folder: folder to save theirs in.
      seed: seed of sizes and weights.
    """
    sizes = decoder_parity.drawn_sizes(seed + len(name))
    fields = described(
        vocab_size=sizes["vocab_size"],
        n_embd=sizes["hidden_size"],
        n_head=sizes["num_attention_heads"],
        n_layer=sizes["num_hidden_layers"],
    )
    return decoder_parity.drawn(transformers.GPT2Config(**fields | DRAWS[name]), seed, folder)


@pytest.mark.parametrize("seed", decoder_parity.SEEDS)
@pytest.mark.parametrize("name", DRAWS)
def test_logits_equal_and_conversion_loses_nothing(name, seed, tmp_path):
    pair = pair_of(name, tmp_path / "theirs", seed)
    decoder_parity.assert_alike(pair, decoder_parity.ids_of(pair, seed))
    decoder_parity.assert_there_and_back(pair, decoder_parity.ids_of(pair, seed), tmp_path / "ours")


def test_gradients_equal(tmp_path):
    pair = pair_of("plain", tmp_path / "theirs")
    decoder_parity.assert_gradients_alike(pair, decoder_parity.ids_of(pair, seed=2))


def test_released_files_leave_out_the_prefix_and_carry_masks(tmp_path):
    pair = pair_of("plain", tmp_path / "theirs")
    state = decoder_parity.state_of(pair.params, pair.cfg, gpt2)
    bare = {name.removeprefix("transformer."): array for name, array in state.items()}
    layers = range(pair.cfg.decoder.layers)
    bare |= {f"h.{layer}.attn.bias": np.tril(np.ones((1, 1, 16, 16))) for layer in layers}
    assert gpt2.parse_config(described(), bare).tied
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
        {"n_head": 5},
    ],
)
def test_what_is_not_computed_is_refused_by_name(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        gpt2.parse_config({"model_type": "gpt2"} | described(**changes), ["lm_head.weight"])
