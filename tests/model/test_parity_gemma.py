# SPDX-License-Identifier: Apache-2.0
"""Gemma 1, 2 and 3 equal transformers: logits, cached decoding, gradients, conversion and back."""

import dataclasses
import json

import decoder_parity
import numpy as np
import pytest
import torch
import transformers

from t5x_lite.checkpoints.formats.huggingface import gemma

KINDS = {
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
}
STRETCHED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
CAPPED = dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
DRAWS = {
    "gemma, one key head": ("gemma", dict(num_key_value_heads=1)),
    "gemma, biases, untied": ("gemma", dict(attention_bias=True, tie_word_embeddings=False)),
    "gemma2, softcaps": ("gemma2", dict(CAPPED, sliding_window=3, query_pre_attn_scalar=7)),
    "gemma2, no softcaps": (
        "gemma2",
        dict(attn_logit_softcapping=None, final_logit_softcapping=None, num_hidden_layers=3),
    ),
    "gemma3, both positions": (
        "gemma3_text",
        dict(num_hidden_layers=3, rope_parameters=STRETCHED, sliding_window=4)
        | dict(layer_types=["sliding_attention", "sliding_attention", "full_attention"]),
    ),
    "gemma3, windows only": ("gemma3_text", dict(sliding_window=2, final_logit_softcapping=4.0)),
}


def described(kind: str, **changes) -> dict:
    """config.json of a tiny model; changes are its fields."""
    fields = dict(vocab_size=45, hidden_size=21, intermediate_size=24, num_attention_heads=3)
    fields |= dict(num_hidden_layers=2, num_key_value_heads=3, head_dim=8)
    if kind != "gemma":
        fields |= dict(sliding_window=5, query_pre_attn_scalar=10)
    return fields | dict(max_position_embeddings=64, pad_token_id=None) | changes


def pair_of(name: str, folder, seed: int = 0):
    """A random pair of models.

    Args:
      name: case in `DRAWS`.
      folder: folder to save theirs in.
      seed: seed of sizes and weights.
    """
    kind, changes = DRAWS[name]
    fields = described(kind, **decoder_parity.drawn_sizes(seed + len(name)) | changes)
    return decoder_parity.drawn(KINDS[kind](**fields), seed, folder)


@pytest.mark.parametrize("seed", decoder_parity.SEEDS)
@pytest.mark.parametrize("name", DRAWS)
def test_logits_equal_and_conversion_loses_nothing(name, seed, tmp_path):
    pair = pair_of(name, tmp_path / "theirs", seed)
    decoder_parity.assert_alike(pair, decoder_parity.ids_of(pair, seed))
    decoder_parity.assert_there_and_back(pair, decoder_parity.ids_of(pair, seed), tmp_path / "ours")


@pytest.mark.parametrize(
    "name", ["gemma, one key head", "gemma2, softcaps", "gemma3, both positions"]
)
def test_gradients_equal(name, tmp_path):
    pair = pair_of(name, tmp_path / "theirs")
    decoder_parity.assert_gradients_alike(pair, decoder_parity.ids_of(pair, seed=2))


def read(kind="gemma2", names=(), **changes):
    """Architecture that we read from a config.json.

    Args:
      kind: model_type.
      names: names of the tensors.
      **changes: fields of config.json.
    """
    return gemma.parse_config({"model_type": kind} | described(kind, **changes), names)


def test_layers_slide_as_each_generation_has_it():
    assert read().decoder.pattern == ("sliding", "full")
    third = read("gemma3_text", num_hidden_layers=13).decoder
    assert third.sliding == tuple((layer + 1) % 6 != 0 for layer in range(13))
    assert third.pattern == ("sliding",) * 5 + ("full",)
    other = read("gemma3_text", num_hidden_layers=4, sliding_window_pattern=2).decoder
    assert other.pattern == ("sliding", "full")
    assert not any(read("gemma").decoder.sliding)


def test_transformers_4_and_5_write_the_same_positions():
    four = read(
        "gemma3_text",
        rope_theta=900.0,
        rope_local_base_freq=50.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    assert four == read("gemma3_text", rope_parameters=STRETCHED)
    assert four.decoder.sliding_rotary_base == 50.0
    unsaid = read("gemma3_text").decoder
    assert (unsaid.rotary_base, unsaid.sliding_rotary_base) == (1e6, 1e4)


def test_the_first_gemmas_say_gelu_and_mean_its_tanh_form():
    assert read("gemma", hidden_act="gelu") == read("gemma", hidden_act="gelu_pytorch_tanh")


def test_the_text_part_of_a_gemma_3_that_sees(tmp_path):
    text = {"model_type": "gemma3_text"} | described("gemma3_text")
    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(image_size=8, patch_size=4, vision_use_head=False)
    parts = {"text_config": text, "vision_config": vision}
    seeing = transformers.Gemma3Config(**parts, mm_tokens_per_image=4)
    whole = transformers.Gemma3ForConditionalGeneration(seeing).eval()
    folder = tmp_path / "whole"
    whole.save_pretrained(folder)
    config_json = json.loads((folder / "config.json").read_text())
    source = decoder_parity.safetensors_files.open_safetensors(folder)
    cfg = dataclasses.replace(gemma.parse_config(config_json, source.names), dtype="float32")
    params = decoder_parity.ours(source, cfg, gemma)
    ids = decoder_parity.drawn_ids(45, cfg.decoder_start_token_id, seed=3)
    batch = decoder_parity.inputs(ids)
    with torch.no_grad():
        expected = whole(**batch, token_type_ids=torch.zeros_like(batch["input_ids"])).logits
    pair = decoder_parity.Pair(whole, gemma, cfg, params)
    actual = decoder_parity.our_logits(pair, ids)
    np.testing.assert_allclose(actual[ids.exists], expected.numpy()[ids.exists], atol=1e-4, rtol=0)


def test_names_before_and_after_transformers_4_52_are_the_same():
    for before, after in {
        "language_model.model.norm.weight": "model.norm.weight",
        "model.language_model.norm.weight": "model.norm.weight",
        "language_model.lm_head.weight": "lm_head.weight",
        "vision_tower.vision_model.head.weight": "vision_tower.vision_model.head.weight",
    }.items():
        assert gemma.canonical_name(before) == after


def test_what_a_released_config_leaves_out_is_what_transformers_takes():
    text_config = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text_config |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    cfg = gemma.parse_config(
        {"model_type": "gemma3", "text_config": text_config, "eos_token_id": [1, 106]}, []
    )
    theirs = transformers.Gemma3TextConfig(**text_config)
    assert cfg.vocab == theirs.vocab_size and cfg.decoder_start_token_id == theirs.bos_token_id
    stack = cfg.decoder
    assert (stack.heads, stack.key_heads, stack.head_dim) == (8, 4, 256)
    assert (stack.rotary_base, stack.sliding_rotary_base, stack.window) == (1e6, 1e4, 1024)
    assert gemma.parse_config({"model_type": "gemma3_text"} | theirs.to_dict(), []) == cfg


@pytest.mark.parametrize(
    "word, kind, changes",
    [
        ("use_bidirectional_attention", "gemma3_text", {"use_bidirectional_attention": True}),
        ("use_bidirectional_attention", "gemma", {"use_bidirectional_attention": True}),
        ("attn_logit_softcapping", "gemma3_text", {"attn_logit_softcapping": 50.0}),
        ("final_logit_softcapping", "gemma", {"final_logit_softcapping": 30.0}),
        ("hidden_activation", "gemma2", {"hidden_activation": "gelu"}),
        ("query_pre_attn_scalar", "gemma2", {"query_pre_attn_scalar": 0}),
        ("sliding_window", "gemma2", {"sliding_window": None}),
        ("rope_type", "gemma2", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
        (
            "sliding_attention",
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        ),
        ("rope_theta", "gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}),
        ("text_config", "gemma3", {}),
    ],
)
def test_what_is_not_computed_is_refused_by_name(word, kind, changes):
    with pytest.raises(ValueError, match=word):
        read(kind, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_gemma_has_is_not_written(kind):
    cfg = read(kind)
    for changes in ({"mlp_bias": True}, {"norm": "rms"}, {"query_scale": 0.3}, {"out_bias": True}):
        stack = dataclasses.replace(cfg.decoder, **changes)
        with pytest.raises(ValueError, match=f"Stack.{next(iter(changes))}"):
            gemma.config_json(dataclasses.replace(cfg, decoder=stack))
    with pytest.raises(ValueError, match="Model.scale_embedding"):
        gemma.config_json(dataclasses.replace(cfg, scale_embedding=False))
