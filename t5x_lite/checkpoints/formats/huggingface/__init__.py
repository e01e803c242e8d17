# SPDX-License-Identifier: Apache-2.0
"""Model families as Hugging Face writes them: one module for each way of naming the weights.

A family module has pure functions only: parse_config(config_json, names) -> config.Model, and of
that Model entries(cfg), ignored(cfg), duplicates(cfg) and config_json(cfg). Where files of one
model have several names for a tensor, canonical_name(name) is the one that entries has.
"""

import importlib
from collections.abc import Collection
from types import ModuleType

from t5x_lite import config
from t5x_lite.checkpoints.formats.huggingface import fields

# model_type of config.json -> module here, imported when it is needed.
FAMILIES = {
    "t5": "t5",
    "mt5": "t5",
    "umt5": "t5",
    "t5gemma": "t5gemma",
    "t5gemma2": "t5gemma2",
    "bart": "bart",
    "mbart": "bart",
    "m2m_100": "bart",
    "marian": "bart",
    "pegasus": "bart",
    "gpt2": "gpt2",
    "llama": "llama",
    "qwen2": "qwen",
    "qwen3": "qwen",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3": "gemma",
    "gemma3_text": "gemma",
}


# Fields that count layers, and more layers than any model has.
DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer")
DEPTHS += ("encoder_layers", "decoder_layers")
DEEPEST = 1000


def family_module(name: str) -> ModuleType:
    """The module of a model_type.

    Raises:
      ValueError: there is none; lists those there are.
    """
    if name not in FAMILIES:
        raise ValueError(
            f"model_type {name!r} is not a family that can be converted; there are: "
            f"{', '.join(FAMILIES)}"
        )
    return importlib.import_module(f"{__name__}.{FAMILIES[name]}")


def family_of_config(config_json: dict) -> ModuleType:
    """The module that reads a checkpoint with this config.json."""
    if "model_type" not in config_json:
        raise ValueError("config.json has no model_type: it does not say which family it is of")
    check_layer_counts(config_json)
    return family_module(config_json["model_type"])


# Ends of transformers' class names of models that have another head than a language model's.
HEADS = {
    "ForSequenceClassification": "a classifier of texts",
    "ForTokenClassification": "a classifier of tokens",
    "ForQuestionAnswering": "a model that marks answers in a text",
    "ForMultipleChoice": "a model that chooses among answers",
    "DoubleHeadsModel": "a language model with a second head, which chooses among answers",
    "ForRewardModel": "a reward model",
    "ForImageClassification": "a classifier of images",
}
# Beginnings of the names of such heads' tensors.
HEAD_TENSORS = ("classification_head.", "classifier.", "score.", "qa_outputs.", "v_head.")


def describe_head(config_json: dict, names: Collection[str]) -> str:
    """The head that a checkpoint has in place of a language model's, in words; "" for none.

    Args:
      config_json: config.json of the checkpoint.
      names: names of its tensors.
    """
    classes = config_json.get("architectures")
    for name in classes if isinstance(classes, list) else []:
        for end, words in HEADS.items():
            if str(name).endswith(end):
                return f"{words} ({name})"
    heads = sorted(name for name in names if name.startswith(HEAD_TENSORS))
    return f"a model with a head of its own ({heads[0]})" if heads else ""


def is_layer_count(value: object) -> bool:
    """True for an integer that can be a number of layers."""
    return type(value) is int and 0 < value <= DEEPEST


def check_layer_counts(config_json: dict) -> None:
    """Raises ValueError where a number of layers, at any depth of the file, cannot be one.

    A broken file would otherwise keep a conversion busy for hours, which plans layer by layer.
    """
    for name, value in config_json.items():
        if isinstance(value, dict):
            check_layer_counts(value)
        elif name in DEPTHS and value is not None and not is_layer_count(value):
            raise ValueError(
                f"config.json has {name} = {value!r}; layers are counted from 1 to {DEEPEST:,}"
            )


def family_for_export(cfg: config.Model, name: str | None = None) -> ModuleType:
    """The module to export cfg with: of the model_type `name`, or the first that can express cfg.

    Raises:
      ValueError: there is none; names for every family the field that it cannot express.
    """
    fields.require_usual_causality(cfg, "transformers")
    refused = []
    for module in [name] if name else default_families():
        try:
            written = family_module(module).config_json(cfg)["model_type"]
        except ValueError as error:
            refused.append(f"{module}: {error}")
            continue
        # The text part of a family that also sees images has a model_type of its own.
        if name is None or written in (name, f"{name}_text"):
            return family_module(module)
        refused.append(f"{module}: transformers would read it as {written}, so name that")
    raise ValueError("No Hugging Face family can express this Model. " + "; ".join(refused))


def default_families() -> list[str]:
    """One model_type for each module, in the order of FAMILIES."""
    firsts = {module: name for name, module in reversed(FAMILIES.items())}
    return [name for name, module in FAMILIES.items() if firsts[module] == name]
