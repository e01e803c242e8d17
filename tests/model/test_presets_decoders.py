# SPDX-License-Identifier: Apache-2.0
"""Presets of lone decoders have the sizes that were published, and transformers can say them."""

import jax
import pytest
import torch
import transformers

from t5x_lite import config, model, sharding
from t5x_lite.checkpoints.formats import huggingface
from t5x_lite.checkpoints.formats.huggingface import decoders
from t5x_lite.config import gin_file

# Weights in the released files (their safetensors headers as counted on huggingface.co), a table
# that serves as head too counted once; the buffers in GPT-2's and the repeated heads in Qwen 3's
# files are left out.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "tinyllama_1_1b": 1_100_048_384,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "llama3_1_8b": 8_030_261_248,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 2_031_739_904 - 151_936 * 2048,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "gemma_2b": 2_506_172_416,
    "gemma_7b": 8_537_680_896,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    # 4,300,079,472 with the vision tower (416,866,032) and the projection from it (2,950,272).
    "gemma3_4b": 4_300_079_472 - 416_866_032 - 2_950_272,
}
# The first lines of T5X's base.gin and xxl.gin count a bias table for each layer, though all
# layers share one; base.gin's also counts a head beside the embedding.
T5X = {
    "t5x_decoder_base": 134_307_072 - 11 * 32 * 12 - 32_128 * 768,
    "t5x_decoder_xxl": 4_762_357_760 - 23 * 32 * 64,
}
# From their layers' shapes by hand: 4 d n h + 3 d f + 2 d in each, and table, biases, norm.
BY_HAND = {
    "t5x_decoder_small": 8 * (4 * 512 * 384 + 3 * 512 * 1024 + 1024) + 32_128 * 512 + 32 * 6 + 512,
    "t5x_decoder_large": 24 * (4 * 1024**2 + 3 * 1024 * 2816 + 2048)
    + (32_128 * 1024 + 32 * 16 + 1024),
    "t5x_decoder_xl": 24 * (4 * 2048**2 + 3 * 2048 * 5120 + 4096) + 32_128 * 2048 + 32 * 32 + 2048,
}


def preset(name: str, folder) -> config.Model:
    """Architecture of configs/models/NAME.gin."""
    file = folder / "run.gin"
    file.write_text(
        f'include "models/{name}.gin"\n'
        "config.Run.model = @config.Model()\n"
        'config.Run.model_dir = "unused"\n'
    )
    return gin_file.load_run([str(file)]).model


@pytest.mark.parametrize("name", PUBLISHED | T5X | BY_HAND)
def test_a_preset_has_as_many_weights_as_were_published(name, tmp_path):
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    total = sum(model.count(preset(name, tmp_path)).values())
    assert total == (PUBLISHED | T5X | BY_HAND)[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_makes_the_same_number_of_weights_of_a_preset(name, tmp_path):
    cfg = preset(name, tmp_path)
    family = huggingface.family_for_export(cfg)
    config_json = family.config_json(cfg)
    described = transformers.AutoConfig.for_model(**config_json)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(described)
    assert type(theirs).__name__ == config_json["architectures"][0]
    assert sum(weight.numel() for weight in theirs.parameters()) == PUBLISHED[name]


# What decides the logits in config.json of released checkpoints, as of their first commits.
RELEASED = {
    "gpt2": dict(
        model_type="gpt2",
        activation_function="gelu_new",
        bos_token_id=50256,
        initializer_range=0.02,
        layer_norm_epsilon=1e-5,
        n_ctx=1024,
        n_embd=768,
        n_head=12,
        n_layer=12,
        n_positions=1024,
        vocab_size=50257,
    ),
    "smollm2_135m": dict(
        model_type="llama",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_interleaved=False,
        rope_scaling=None,
        rope_theta=100000,
        tie_word_embeddings=True,
        bos_token_id=0,
        vocab_size=49152,
    ),
    "llama3_2_1b": dict(
        model_type="llama",
        attention_bias=False,
        mlp_bias=False,
        head_dim=64,
        hidden_act="silu",
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        rope_scaling=dict(
            factor=32.0,
            high_freq_factor=4.0,
            low_freq_factor=1.0,
            original_max_position_embeddings=8192,
            rope_type="llama3",
        ),
        rope_theta=500000.0,
        tie_word_embeddings=True,
        bos_token_id=128000,
        vocab_size=128256,
    ),
    "qwen2_5_0_5b": dict(
        model_type="qwen2",
        hidden_act="silu",
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_window_layers=24,
        sliding_window=32768,
        use_sliding_window=False,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        tie_word_embeddings=True,
        bos_token_id=151643,
        vocab_size=151936,
    ),
    "qwen3_0_6b": dict(
        model_type="qwen3",
        attention_bias=False,
        head_dim=128,
        hidden_act="silu",
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_window_layers=28,
        sliding_window=None,
        use_sliding_window=False,
        rms_norm_eps=1e-6,
        rope_scaling=None,
        rope_theta=1000000,
        tie_word_embeddings=True,
        bos_token_id=151643,
        vocab_size=151936,
    ),
    "gemma_2b": dict(
        model_type="gemma",
        attention_bias=False,
        head_dim=256,
        hidden_act="gelu",
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        rms_norm_eps=1e-6,
        rope_scaling=None,
        rope_theta=10000.0,
        bos_token_id=2,
        vocab_size=256000,
    ),
    "gemma2_27b": dict(
        model_type="gemma2",
        attn_logit_softcapping=50.0,
        cache_implementation="hybrid",
        final_logit_softcapping=30.0,
        head_dim=128,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        hidden_size=4608,
        intermediate_size=36864,
        num_hidden_layers=46,
        num_attention_heads=32,
        num_key_value_heads=16,
        query_pre_attn_scalar=144,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        sliding_window=4096,
        bos_token_id=2,
        vocab_size=256000,
    ),
    "gemma3_1b": dict(
        model_type="gemma3_text",
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        head_dim=256,
        hidden_activation="gelu_pytorch_tanh",
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        query_pre_attn_scalar=256,
        rms_norm_eps=1e-6,
        rope_local_base_freq=10000,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=512,
        sliding_window_pattern=6,
        bos_token_id=2,
        vocab_size=262144,
    ),
    "gemma3_4b": dict(
        model_type="gemma3",
        boi_token_index=255999,
        eos_token_id=[1, 106],
        text_config=dict(
            model_type="gemma3_text",
            hidden_size=2560,
            intermediate_size=10240,
            num_hidden_layers=34,
            rope_scaling=dict(factor=8.0, rope_type="linear"),
            sliding_window=1024,
        ),
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_preset_computes_what_the_released_config_says(name, tmp_path):
    released = RELEASED[name]
    cfg = huggingface.family_of_config(released).parse_config(released, ())
    assert decoders.logit_fields(cfg) == decoders.logit_fields(preset(name, tmp_path))
