# SPDX-License-Identifier: Apache-2.0
"""Llama equals transformers: logits, cached decoding, gradients, conversion there and back."""

import dataclasses

import decoder_parity
import pytest
import transformers

from t5x_lite import config
from t5x_lite.checkpoints.formats import huggingface
from t5x_lite.checkpoints.formats.huggingface import llama

LLAMA3 = dict(
    rope_type="llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
    rope_theta=1000.0,
)
DRAWS = {
    "one key head, tied": dict(num_key_value_heads=1, tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "llama3 positions": dict(rope_parameters=LLAMA3, rms_norm_eps=1e-3, head_dim=12),
    "linear positions": dict(
        rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}
    ),
}


def described(**changes) -> dict:
    """config.json of a tiny model; changes are its fields."""
    fields = dict(vocab_size=41, hidden_size=24, intermediate_size=20, num_attention_heads=3)
    fields |= dict(num_hidden_layers=2, num_key_value_heads=3, max_position_embeddings=64)
    return fields | changes


def pair_of(name: str, folder, seed: int = 0):
    """A random pair of models.

    Args:
      name: case in `DRAWS`.
      folder: folder to save theirs in.
      seed: seed of sizes and weights.
    """
    fields = described(**decoder_parity.drawn_sizes(seed + len(name)) | DRAWS[name])
    return decoder_parity.drawn(transformers.LlamaConfig(**fields), seed, folder)


@pytest.mark.parametrize("seed", decoder_parity.SEEDS)
@pytest.mark.parametrize("name", DRAWS)
def test_logits_equal_and_conversion_loses_nothing(name, seed, tmp_path):
    pair = pair_of(name, tmp_path / "theirs", seed)
    decoder_parity.assert_alike(pair, decoder_parity.ids_of(pair, seed))
    decoder_parity.assert_there_and_back(pair, decoder_parity.ids_of(pair, seed), tmp_path / "ours")


def test_gradients_equal(tmp_path):
    pair = pair_of("biases", tmp_path / "theirs")
    decoder_parity.assert_gradients_alike(pair, decoder_parity.ids_of(pair, seed=2))


def read(names=("lm_head.weight",), **changes):
    """Architecture that we read from a config.json."""
    return llama.parse_config({"model_type": "llama"} | described(**changes), names)


def test_transformers_4_and_5_write_the_same_positions():
    plain = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    four = read(rope_theta=1000.0, rope_scaling=plain)
    older = read(rope_theta=1000.0, rope_scaling={"type": "linear", "factor": 2})
    assert four == read(rope_parameters=LLAMA3)
    assert four.decoder.rotary_base == 1000.0
    assert older.decoder.rotary_scaling.factor == 2.0
    assert read(rope_theta=500000.0, rope_scaling=None).decoder.rotary_scaling is None


def test_the_head_is_tied_by_what_config_and_file_say():
    assert read(tie_word_embeddings=True, names=()).tied
    assert not read(tie_word_embeddings=False).tied
    assert not read().tied
    assert read(names=()).tied
    repeated = read(tie_word_embeddings=True)
    assert repeated.tied
    assert llama.duplicates(repeated) == {"lm_head.weight": "model.embed_tokens.weight"}
    with pytest.raises(ValueError, match="tie_word_embeddings.*lm_head.weight"):
        read(tie_word_embeddings=False, names=())


def test_a_text_begins_with_bos_or_else_eos():
    assert read(bos_token_id=7, eos_token_id=3).decoder_start_token_id == 7
    assert read(bos_token_id=None, eos_token_id=[5, 6]).decoder_start_token_id == 5
    assert read(bos_token_id=41, eos_token_id=3).decoder_start_token_id == 3
    assert read().decoder_start_token_id == 0


def test_a_model_saved_without_its_head_has_the_same_names():
    names = [entry.theirs for entry in llama.entries(read(names=()))]
    assert [llama.canonical_name(name.removeprefix("model.")) for name in names] == names
    assert [llama.canonical_name(name) for name in names] == names


@pytest.mark.parametrize(
    "word, changes",
    [
        ("yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}),
        ("dynamic", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        ("factor", {"rope_scaling": {"type": "linear"}}),
        ("low_freq_factor", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}),
        ("mrope_section", {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 1]}}),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ("rope_scaling", {"rope_scaling": "linear"}),
        ("quantization_config", {"quantization_config": {"quant_method": "gptq"}}),
        ("layer_types", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("hidden_size", {"hidden_size": None}),
        ("num_hidden_layers", {"num_hidden_layers": 2.5}),
        ("intermediate_size", {"intermediate_size": 0}),
        ("heads", {"num_key_value_heads": 2}),
    ],
)
def test_what_is_not_computed_is_refused_by_name(word, changes):
    with pytest.raises(ValueError, match=word):
        read(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"gated": False},
        {"norm": "layer"},
        {"norm": "rms_plus_one"},
        {"post_norms": True},
        {"qk_norm": True},
        {"qkv_bias": True},
        {"out_bias": True},
        {"query_scale": 0.5},
        {"softcap": 30.0},
        {"positions": "relative"},
        {"pattern": ("sliding", "full"), "window": 3},
    ],
)
def test_what_no_llama_has_is_not_written(changes):
    cfg = read()
    cfg = dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, **changes))
    with pytest.raises(ValueError, match=f"Stack.({next(iter(changes))}|sliding|out_bias)"):
        llama.config_json(cfg)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_logits": True},
        {"logits_softcap": 30.0},
        {"scale_embedding": True},
        {"prefix_lm": True},
        {"eoi": 3},
        {"pooling": config.Pooling()},
    ],
)
def test_what_no_llama_model_has_is_not_written(changes):
    with pytest.raises(ValueError, match=f"Model.{next(iter(changes))}"):
        llama.config_json(dataclasses.replace(read(), **changes))


def test_an_encoder_is_not_written():
    stack = read().decoder
    with pytest.raises(ValueError, match="Model.encoder"):
        llama.config_json(config.Model(vocab=41, encoder=stack, decoder=stack))
    with pytest.raises(ValueError, match="Model.encoder"):
        llama.config_json(config.Model(vocab=41, encoder=stack))


def test_export_chooses_the_family_that_can_say_it():
    stack = read().decoder

    def changed(**changes):
        return config.Model(vocab=41, decoder=dataclasses.replace(stack, **changes))

    for name, changes in {
        "llama": {},
        "qwen": {"qkv_bias": True},
        "gemma": {"norm": "rms_plus_one"},
    }.items():
        cfg = changed(**changes)
        cfg = dataclasses.replace(cfg, scale_embedding=name == "gemma")
        assert huggingface.family_for_export(cfg).__name__.endswith(f".{name}")
