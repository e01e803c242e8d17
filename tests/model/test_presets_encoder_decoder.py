# SPDX-License-Identifier: Apache-2.0
"""Every named encoder-decoder is built abstractly; its parameters are as many as published."""

import jax
import numpy as np
import pytest
import torch
import transformers

from t5x_lite import config, model, sharding
from t5x_lite.checkpoints import matching
from t5x_lite.checkpoints.formats import huggingface
from t5x_lite.config import gin_file

# Millions, with the digits that were published; all embedding tables and heads are counted.
# T5 1.0 and 1.1: what the Hub counts in google-t5/t5-* and google/t5-v1_1-*. Flan-T5 is T5 1.1.
T5 = {
    "t5_1_0_small": "60.5",
    "t5_1_0_base": "222.9",
    "t5_1_0_large": "737.7",
    "t5_1_0_3b": "2.85e3",
    "t5_1_0_11b": "11.3e3",
    "t5_1_1_small": "76.96",
    "t5_1_1_base": "247.6",
    "t5_1_1_large": "783.2",
    "t5_1_1_xl": "2.85e3",
    "t5_1_1_xxl": "11.1e3",
    "flan_t5_small": "76.96",
    "flan_t5_base": "247.6",
    "flan_t5_large": "783.2",
    "flan_t5_xl": "2.85e3",
    "flan_t5_xxl": "11.1e3",
}
# mT5 and ByT5: table 1 of ByT5 (Xue et al., 2022), which compares the two. UL2: "20B" is the name
# (Tay et al., 2023).
MULTILINGUAL = {
    "mt5_small": "300",
    "mt5_base": "582",
    "mt5_large": "1.23e3",
    "mt5_xl": "3.74e3",
    "mt5_xxl": "12.9e3",
    "byt5_small": "300",
    "byt5_base": "582",
    "byt5_large": "1.23e3",
    "byt5_xl": "3.74e3",
    "byt5_xxl": "12.9e3",
    "ul2_20b": "2e4",
}
# T5Gemma 2: "~370M total, excluding vision encoder", "~1.7B" and "~7B" (Google's announcement,
# blog.google/technology/developers/t5gemma-2). T5Gemma ML: "~2B in total" (its model card).
GEMMA = {
    "t5gemma_ml_ml": "2e3",
    "t5gemma2_270m": "3.7e2",
    "t5gemma2_1b": "1.7e3",
    "t5gemma2_4b": "7e3",
}
# Gemma 2 (Gemma Team, 2024), table 2, of which T5Gemma's encoders are made: without embeddings,
# and the embeddings.
PARTS = {
    ("t5gemma_2b_2b", "encoder"): 2024,
    ("t5gemma_2b_2b", "encoder_embedding"): 590,
    ("t5gemma_9b_2b", "encoder"): 8324,
    ("t5gemma_9b_2b", "encoder_embedding"): 918,
    ("t5gemma_9b_2b", "embedding"): 590,
    ("t5gemma_9b_9b", "encoder"): 8324,
}
FAMILIES = ("byt5", "mt5", "t5_1_0", "t5_1_1", "t5gemma", "t5gemma2")
STARTS = ("flan_t5_", "mt5_", "t5_1_", "umt5_", "byt5_", "ul2_", "t5gemma_", "t5gemma2_")
# Gemma 2's softcaps with T5Gemma 2's merged attention: a study of ours that no family has.
STUDIES = ("t5gemma_tiny_merged",)
PRESETS = sorted(
    path.stem
    for path in (gin_file.configs_folder() / "models").glob("*.gin")
    if path.stem.startswith(STARTS) and path.stem not in (*FAMILIES, *STUDIES)
)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Sets a mesh of one device."""
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])


def preset(name: str) -> config.Model:
    """Architecture of configs/models/NAME.gin."""
    lines = gin_file.read_lines(f"configs/models/{name}.gin")
    for binding in ('config.Run.model_dir = ""', "config.Run.model = @config.Model()"):
        lines.append(gin_file.Line(binding, "the test"))
    return gin_file.parse_lines(lines, []).model


def rounded(parameters: int, published: str) -> float:
    """parameters in millions, with as many digits as published has."""
    digits = len(published.partition("e")[0].replace(".", ""))
    return float(f"{parameters / 1e6:.{digits}g}")


@pytest.mark.parametrize("name, published", (T5 | MULTILINGUAL | GEMMA).items())
def test_presets_have_the_published_number_of_parameters(name, published):
    parameters = sum(model.count(preset(name)).values())
    assert rounded(parameters, published) == float(published)


@pytest.mark.parametrize("place, published", PARTS.items())
def test_parts_have_the_published_number_of_parameters(place, published):
    name, part = place
    # The paper rounds some of its millions and cuts off others.
    assert abs(model.count(preset(name))[part] / 1e6 - published) < 1


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_tensors_that_transformers_makes(name):
    """Each name and shape, at full size; nothing is allocated on either side."""
    cfg = preset(name)
    family = huggingface.family_for_export(cfg)
    described = transformers.AutoConfig.for_model(**family.config_json(cfg))
    with torch.device("meta"):
        theirs = transformers.AutoModelForSeq2SeqLM.from_config(described)
    names = {
        name.replace(".text_model.", "."): (tuple(weight.shape), np.dtype(np.float32))
        for name, weight in theirs.state_dict().items()
    }
    ignored, duplicates = family.ignored(cfg), family.duplicates(cfg)
    plan = matching.plan_conversion(
        names, cfg, family.entries(cfg), ignored=ignored, duplicates=duplicates
    )
    assert plan.problems == {}
