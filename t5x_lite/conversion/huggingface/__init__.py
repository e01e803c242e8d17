# SPDX-License-Identifier: Apache-2.0
"""Model families as Hugging Face writes them: one module for each way of naming the weights.

A family module has pure functions only: model(config_json, names) -> config.Model, and of that
Model entries(cfg), ignored(cfg), duplicates(cfg) and config_json(cfg). Where files of one
model have several names for a tensor, plain(name) gives the one that entries has.
"""

import importlib
from types import ModuleType

from t5x_lite import config

# model_type of config.json -> module here, imported when it is asked for.
FAMILIES = {
    "t5": "t5",
    "mt5": "t5",
    "umt5": "t5",
    "t5gemma": "t5gemma",
    "t5gemma2": "t5gemma2",
    "gpt2": "gpt2",
    "llama": "llama",
    "qwen2": "qwen",
    "qwen3": "qwen",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3": "gemma",
    "gemma3_text": "gemma",
}


# The fields that count layers, and more of them than any model has.
DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer")
DEEPEST = 1000


def family(name: str) -> ModuleType:
    """The module of a model_type; ValueError lists those there are."""
    if name not in FAMILIES:
        raise ValueError(
            f"model_type {name!r} is no family that can be converted; there are: "
            f"{', '.join(FAMILIES)}"
        )
    return importlib.import_module(f"{__name__}.{FAMILIES[name]}")


def family_of(config_json: dict) -> ModuleType:
    """The module that reads a checkpoint with this config.json."""
    if "model_type" not in config_json:
        raise ValueError("config.json has no model_type: it does not say which family it is of")
    check_depth(config_json)
    return family(config_json["model_type"])


def is_depth(value: object) -> bool:
    return type(value) is int and 0 < value <= DEEPEST


def check_depth(config_json: dict) -> None:
    """Raises ValueError where a number of layers, at any depth of the file, is no such number.

    A broken file would otherwise be believed for hours: what lies where is settled per layer.
    """
    for name, value in config_json.items():
        if isinstance(value, dict):
            check_depth(value)
        elif name in DEPTHS and value is not None and not is_depth(value):
            raise ValueError(
                f"config.json has {name} = {value!r}; layers are counted from 1 to {DEEPEST:,}"
            )


def family_for(cfg: config.Model, name: str | None = None) -> ModuleType:
    """The module to export cfg with: of the model_type `name`, or the first that can express cfg.

    ValueError tells, for every family that was tried, which field it cannot express.
    """
    refused = []
    for module in [name] if name else first_names():
        try:
            written = family(module).config_json(cfg)["model_type"]
        except ValueError as error:
            refused.append(f"{module}: {error}")
            continue
        # The text part of a family that also sees images has a model_type of its own.
        if name is None or written in (name, f"{name}_text"):
            return family(module)
        refused.append(f"{module}: transformers would read it as {written}, so ask for that")
    raise ValueError("No Hugging Face family can express this Model. " + "; ".join(refused))


def first_names() -> list[str]:
    """One model_type for each module, in the order of FAMILIES."""
    firsts = {module: name for name, module in reversed(FAMILIES.items())}
    return [name for name, module in FAMILIES.items() if firsts[module] == name]
