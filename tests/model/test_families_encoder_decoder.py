# SPDX-License-Identifier: Apache-2.0
"""config.json of encoder-decoders: what each family refuses to read or to write."""

import dataclasses

import pytest
from published import preset
from released import RELEASED_ENCODER_DECODERS, T5GEMMA2_270M

from t5x_lite import config
from t5x_lite.checkpoints.formats.huggingface import (
    family_for_export,
    family_module,
    family_of_config,
    t5gemma2,
)


def changed(name: str, half: str | None, **fields) -> dict:
    """A released config.json with other fields.

    Args:
      name: case in `RELEASED_ENCODER_DECODERS`.
      half: "encoder" or "decoder" for fields of one half; None for the top level.
      **fields: the new fields.
    """
    described, _ = RELEASED_ENCODER_DECODERS[name]
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
    "use_bidirectional_attention": changed(
        "t5gemma2_270m", "encoder", use_bidirectional_attention=True
    ),
}


@pytest.mark.parametrize("field, described", UNKNOWN.items())
def test_what_is_not_implemented_is_refused_by_name(field, described):
    with pytest.raises(ValueError, match=f"config.json: .*{field.strip()}"):
        family_of_config(described).parse_config(described, ["decoder.x"])


def test_a_softcap_that_transformers_does_not_compute_is_named_and_changes_nothing():
    described = changed("t5gemma2_270m", "encoder", attn_logit_softcapping=50.0)
    with pytest.warns(UserWarning, match="attn_logit_softcapping changes nothing"):
        cfg = t5gemma2.parse_config(described, [])
    assert cfg == t5gemma2.parse_config(RELEASED_ENCODER_DECODERS["t5gemma2_270m"][0], [])


def test_t5gemma_reads_windows_as_its_authors_and_not_as_transformers():
    described, _ = RELEASED_ENCODER_DECODERS["t5gemma_s_s"]
    cfg = family_of_config(described).parse_config(described, ["decoder.x"])
    assert {cfg.encoder.window_form, cfg.decoder.window_form} == {"below"} and cfg.encoder.window


def test_an_older_t5gemma2_config_is_read_alike():
    """Before transformers 5: rope_theta, rope_local_base_freq and rope_scaling."""
    older = {
        "rope_parameters": None,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "layer_types": None,
    }
    described = RELEASED_ENCODER_DECODERS["t5gemma2_270m"][0] | {"decoder": T5GEMMA2_270M | older}
    assert t5gemma2.parse_config(described, []) == t5gemma2.parse_config(
        RELEASED_ENCODER_DECODERS["t5gemma2_270m"][0], []
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
