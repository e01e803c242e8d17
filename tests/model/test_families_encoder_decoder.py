# SPDX-License-Identifier: Apache-2.0
"""config.json of released encoder-decoders gives the presets; what cannot be said is refused."""

import dataclasses

import pytest

from t5x_lite import config
from t5x_lite.checkpoints.formats.huggingface import (
    family_for_export,
    family_module,
    family_of_config,
    t5gemma2,
)
from t5x_lite.config import gin_file

# Fields of the released files that decide the model.
T5 = dict(model_type="t5", decoder_start_token_id=0, d_kv=64, vocab_size=32128)
T5_SMALL = dict(d_ff=2048, d_model=512, num_heads=8, num_layers=6, n_positions=512)
T5_BASE = dict(d_ff=2048, d_model=768, num_decoder_layers=12, num_heads=12, num_layers=12)
GATED = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
ALTERNATING = 4 * ["sliding_attention", "full_attention"]
T5GEMMA_S = dict(
    attention_bias=False,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    head_dim=64,
    hidden_activation="gelu_pytorch_tanh",
    hidden_size=512,
    intermediate_size=1024,
    layer_types=ALTERNATING,
    num_attention_heads=8,
    num_hidden_layers=8,
    num_key_value_heads=8,
    query_pre_attn_scalar=64,
    rope_theta=10000.0,
    sliding_window=4096,
    vocab_size=256000,
)
T5GEMMA2_270M = dict(
    _sliding_window_pattern=6,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    head_dim=256,
    hidden_size=640,
    intermediate_size=2048,
    layer_types=3 * [*5 * ["sliding_attention"], "full_attention"],
    num_attention_heads=4,
    num_hidden_layers=18,
    num_key_value_heads=1,
    query_pre_attn_scalar=256,
    rope_parameters={
        "full_attention": {"factor": 8.0, "rope_theta": 1000000, "rope_type": "linear"},
        "sliding_attention": {"rope_theta": 10000, "rope_type": "default"},
    },
    sliding_window=512,
    use_bidirectional_attention=False,
    vocab_size=262144,
)
# preset -> config.json, and whether the file has a head of its own.
RELEASED = {
    "t5_1_0_small": (T5 | T5_SMALL, False),
    "t5_1_1_base": (T5 | T5_BASE | GATED, True),
    "flan_t5_base": (T5 | T5_BASE | GATED | {"dense_act_fn": "gelu_new"}, True),
    "mt5_base": (T5 | T5_BASE | GATED | {"model_type": "mt5", "vocab_size": 250112}, True),
    "umt5_base": (T5 | T5_BASE | GATED | {"model_type": "umt5", "vocab_size": 256384}, True),
    "byt5_small": (
        T5
        | GATED
        | dict(d_ff=3584, d_model=1472, num_heads=6, num_layers=12, num_decoder_layers=4)
        | {"vocab_size": 384},
        True,
    ),
    "ul2_20b": (
        T5
        | dict(d_ff=16384, d_kv=256, d_model=4096, num_heads=16, num_layers=32)
        | dict(feed_forward_proj="gated-silu", num_decoder_layers=32),
        False,
    ),
    "t5gemma_s_s": (
        {"model_type": "t5gemma", "encoder": T5GEMMA_S, "decoder": T5GEMMA_S},
        False,
    ),
    "t5gemma2_270m": (
        {
            "model_type": "t5gemma2",
            "encoder": {"text_config": T5GEMMA2_270M, "eoi_token_index": 256000},
            "decoder": T5GEMMA2_270M,
        },
        False,
    ),
}
HEADS = ("lm_head.weight", "lm_head.out_proj.weight")


def preset(name: str) -> config.Model:
    """Architecture of configs/models/NAME.gin."""
    lines = gin_file.read_lines(f"configs/models/{name}.gin")
    for binding in ('config.Run.model_dir = ""', "config.Run.model = @config.Model()"):
        lines.append(gin_file.Line(binding, "the test"))
    return gin_file.parse_lines(lines, []).model


def for_decoding(cfg: config.Model) -> config.Model:
    """cfg without what training alone uses, one way of saying each thing."""

    def full(stack):
        return dataclasses.replace(stack, kv_heads=stack.key_heads)

    return dataclasses.replace(
        cfg, encoder=full(cfg.encoder), decoder=full(cfg.decoder), dropout=0.0, embedding_std=1.0
    )


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_give_the_presets(name):
    described, headed = RELEASED[name]
    names = ["decoder.final_layer_norm.weight", *(HEADS if headed else ())]
    read = family_of_config(described).parse_config(described, names)
    assert for_decoding(read) == for_decoding(preset(name))


@pytest.mark.parametrize("name", RELEASED)
def test_an_exported_config_is_read_as_the_same_model(name):
    cfg = preset(name)
    names = ["decoder.final_layer_norm.weight", *(() if cfg.tied else HEADS)]
    written = family_for_export(cfg).config_json(cfg)
    assert for_decoding(family_of_config(written).parse_config(written, names)) == for_decoding(cfg)


def changed(name: str, half: str | None, **fields) -> dict:
    """A released config.json with other fields.

    Args:
      name: case in `RELEASED`.
      half: "encoder" or "decoder" for fields of one half; None for the top level.
      **fields: the new fields.
    """
    described, _ = RELEASED[name]
    if half is None:
        return described | fields
    if name == "t5gemma2_270m" and half == "encoder":
        return described | {half: {"text_config": T5GEMMA2_270M | fields}}
    return described | {half: described[half] | fields}


STRETCHED = {"full_attention": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}
UNKNOWN = {
    "dense_act_fn": changed("t5_1_0_small", None, feed_forward_proj="gelu"),
    "feed_forward_proj": changed("t5_1_0_small", None, feed_forward_proj="mixed-relu"),
    "hidden_activation": changed("t5gemma_s_s", "encoder", hidden_activation="gelu"),
    "rope_type": changed("t5gemma_s_s", "decoder", rope_scaling={"type": "linear", "factor": 2.0}),
    "layer_types": changed("t5gemma_s_s", "decoder", layer_types=8 * ["chunked_attention"]),
    "vocab_size": changed("t5gemma_s_s", "decoder", vocab_size=256128),
    "rope_type ": changed("t5gemma2_270m", "decoder", rope_parameters=STRETCHED),
    "attn_logit_softcapping": changed("t5gemma2_270m", "encoder", attn_logit_softcapping=50.0),
    "use_bidirectional_attention": changed(
        "t5gemma2_270m", "encoder", use_bidirectional_attention=True
    ),
}


@pytest.mark.parametrize("field, described", UNKNOWN.items())
def test_what_is_not_implemented_is_refused_by_name(field, described):
    with pytest.raises(ValueError, match=f"config.json: .*{field.strip()}"):
        family_of_config(described).parse_config(described, ["decoder.x"])


def test_an_older_t5gemma2_config_is_read_alike():
    """Before transformers 5: rope_theta, rope_local_base_freq and rope_scaling."""
    older = {
        "rope_parameters": None,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "layer_types": None,
    }
    described = RELEASED["t5gemma2_270m"][0] | {"decoder": T5GEMMA2_270M | older}
    assert t5gemma2.parse_config(described, []) == t5gemma2.parse_config(
        RELEASED["t5gemma2_270m"][0], []
    )


def with_stack(cfg: config.Model, **fields) -> config.Model:
    """cfg with other fields of its decoder."""
    return dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, **fields))


INEXPRESSIBLE = {
    "logits_softcap": ("t5", dataclasses.replace(preset("t5_1_1_base"), logits_softcap=30.0)),
    "kv_heads": ("t5", with_stack(preset("t5_1_1_base"), kv_heads=4)),
    "qk_norm": ("t5", with_stack(preset("t5_1_1_base"), qk_norm=True)),
    "mlp": ("t5", with_stack(preset("t5_1_1_base"), mlp=17)),
    "positions": ("t5", with_stack(preset("t5_1_1_base"), positions="rotary")),
    "window": ("t5", with_stack(preset("t5_1_1_base"), pattern=("sliding",), window=8)),
    "norm": ("t5gemma", with_stack(preset("t5gemma_s_s"), norm="rms")),
    "query_scale": ("t5gemma", with_stack(preset("t5gemma_s_s"), query_scale=0.3)),
    "merged": ("t5gemma2", with_stack(preset("t5gemma2_270m"), merged=False)),
    "eoi": ("t5gemma2", dataclasses.replace(preset("t5gemma2_270m"), eoi=None)),
    "scale_embedding": (
        "t5gemma2",
        dataclasses.replace(preset("t5gemma2_270m"), scale_embedding=False),
    ),
}


@pytest.mark.parametrize("field", INEXPRESSIBLE)
def test_a_feature_that_the_family_lacks_is_not_dropped(field):
    name, cfg = INEXPRESSIBLE[field]
    with pytest.raises(ValueError, match=field):
        family_module(name).config_json(cfg)


def test_a_family_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="'bert' .*t5gemma2"):
        family_of_config({"model_type": "bert"})
    with pytest.raises(ValueError, match="model_type"):
        family_of_config({})


def test_a_family_that_would_be_written_as_another_is_refused_by_both_names():
    cfg = preset("gemma_2b")
    with pytest.raises(ValueError, match="gemma2: .*read it as gemma,"):
        family_for_export(cfg, "gemma2")
    assert family_for_export(cfg, "gemma").config_json(cfg)["model_type"] == "gemma"


@pytest.mark.parametrize("layers", [10**12, 0, -3, "12", 2.5, True])
def test_a_number_of_layers_that_is_none_is_refused_at_once(layers):
    for described in (
        {"model_type": "t5", "num_layers": layers},
        {"model_type": "t5gemma", "encoder": {"num_hidden_layers": layers}},
    ):
        with pytest.raises(ValueError, match="layers = .*counted from 1 to 1,000"):
            family_of_config(described)
