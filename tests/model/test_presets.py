# SPDX-License-Identifier: Apache-2.0
"""Every preset is the model of its name: weights as published, tensors, config.json of releases."""

import dataclasses

import jax
import numpy as np
import published
import pytest
import released
import torch
import transformers
from published import preset

from t5x_lite import config, model, sharding
from t5x_lite.checkpoints import matching
from t5x_lite.checkpoints.formats.huggingface import (
    decoders,
    family_for_export,
    family_of_config,
)
from t5x_lite.config import gin_file

FAMILIES = ("bart", "byt5", "mt5", "t5_1_0", "t5_1_1", "t5gemma", "t5gemma2")
STARTS = ("flan_t5_", "mt5_", "t5_1_", "umt5_", "byt5_", "ul2_", "t5gemma_", "t5gemma2_")
STARTS += ("bart_", "mbart50_", "m2m100_", "nllb_", "marian_", "pegasus_")
# Gemma 2's softcaps with T5Gemma 2's merged attention: a study of ours that no family has.
STUDIES = ("t5gemma_tiny_merged",)
ENCODER_DECODERS = sorted(
    path.stem
    for path in (gin_file.configs_folder() / "models").glob("*.gin")
    if path.stem.startswith(STARTS) and path.stem not in (*FAMILIES, *STUDIES)
)
HEADS = ("lm_head.weight", "lm_head.out_proj.weight")
RELEASED = {
    **{name: (fields, False) for name, fields in released.RELEASED_DECODERS.items()},
    **released.RELEASED_ENCODER_DECODERS,
}


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Sets a mesh of one device."""
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])


def rounded(parameters: int, digits: str) -> float:
    """parameters in millions, with as many digits as a published number has."""
    count = len(digits.partition("e")[0].replace(".", ""))
    return float(f"{parameters / 1e6:.{count}g}")


@pytest.mark.slow
@pytest.mark.parametrize("name, count", published.COUNTS.items())
def test_presets_have_the_published_number_of_weights(name, count):
    weights = sum(model.count(preset(name)).values())
    if isinstance(count, int):
        assert weights == count
    else:
        assert rounded(weights, count) == float(count)


@pytest.mark.parametrize("place, count", published.PARTS.items())
def test_parts_have_the_published_number_of_weights(place, count):
    name, part = place
    # The paper rounds some of its millions and cuts off others.
    assert abs(model.count(preset(name))[part] / 1e6 - count) < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [*published.DECODERS, *ENCODER_DECODERS])
def test_presets_have_the_tensors_that_transformers_makes(name):
    """Each name and shape, at full size; nothing is allocated on either side."""
    cfg = preset(name)
    family = family_for_export(cfg)
    config_json = family.config_json(cfg)
    lone = cfg.layout == "decoder_only"
    kind = transformers.AutoModelForCausalLM if lone else transformers.AutoModelForSeq2SeqLM
    with torch.device("meta"):
        theirs = kind.from_config(transformers.AutoConfig.for_model(**config_json))
    assert type(theirs).__name__ == config_json["architectures"][0]
    if name in published.DECODERS:
        count = sum(weight.numel() for weight in theirs.parameters())
        assert count == published.DECODERS[name]
    names = {
        name.replace(".text_model.", "."): (tuple(weight.shape), np.dtype(np.float32))
        for name, weight in theirs.state_dict().items()
    }
    ignored, duplicates = family.ignored(cfg), family.duplicates(cfg)
    plan = matching.plan_conversion(
        names, cfg, family.entries(cfg), ignored=ignored, duplicates=duplicates
    )
    assert plan.problems == {}


def logit_fields(cfg: config.Model):
    """All that decides the logits of a model, each thing in one way."""
    if cfg.layout == "decoder_only":
        return decoders.logit_fields(cfg)

    def with_kv_heads(stack):
        return dataclasses.replace(stack, kv_heads=stack.key_heads)

    return dataclasses.replace(
        cfg,
        encoder=with_kv_heads(cfg.encoder),
        decoder=with_kv_heads(cfg.decoder),
        dropout=0.0,
        embedding_std=1.0,
    )


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_give_the_presets(name):
    config_json, headed = RELEASED[name]
    names = ["decoder.final_layer_norm.weight", "final_logits_bias", *(HEADS if headed else ())]
    read = family_of_config(config_json).parse_config(config_json, names)
    assert logit_fields(read) == logit_fields(preset(name))


@pytest.mark.parametrize("name", RELEASED)
def test_an_exported_config_is_read_as_the_same_model(name):
    cfg = preset(name)
    names = ["decoder.final_layer_norm.weight", "final_logits_bias", *(() if cfg.tied else HEADS)]
    written = family_for_export(cfg).config_json(cfg)
    read = family_of_config(written).parse_config(written, names)
    assert logit_fields(read) == logit_fields(cfg)
