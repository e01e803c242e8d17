# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters as the peft library stores them: adapter_config.json and adapter_model.safetensors.

Names follow from a family's table: the weight MODULE.weight has the tensors
base_model.model.MODULE.lora_A.weight [rank inputs], .lora_B.weight [outputs rank], and for DoRA
.lora_magnitude_vector [outputs].
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from t5x_lite import config
from t5x_lite.checkpoints import transforms
from t5x_lite.checkpoints.transforms import Entry
from t5x_lite.model import adapters
from t5x_lite.tokenizers.errors import SourceError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, WEIGHT = "base_model.model.", ".weight"
SUFFIXES = {"a": ".lora_A.weight", "b": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
TASKS = {
    "encoder_decoder": "SEQ_2_SEQ_LM",
    "decoder_only": "CAUSAL_LM",
    "encoder_only": "FEATURE_EXTRACTION",
}
# Fields that decide how adapters begin, where peft puts them (the tensors show it), or nothing.
NEUTRAL = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode", "revision"),
    *("base_model_name_or_path", "target_modules", "exclude_modules", "layers_pattern"),
    *("fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "loftq_config"),
    *("eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"),
}
# Values of init_lora_weights that leave the base as it is.
PLAIN_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva", "lora_ga")
# Fields whose values are these are as if they were not there.
EMPTY = (None, False, "none", "", 0)


class PeftAdapter(NamedTuple):
    """Content of an adapter_config.json.

    Attributes:
      lora: config of the adapters, all of whose weights are those that have tensors.
      base: name or path of the model that they belong to, with its revision; "" if unknown.
    """

    lora: config.Lora
    base: str


def parse_adapter(config_json: Mapping[str, Any], weights: Collection[str]) -> PeftAdapter:
    """Reads adapter_config.json.

    Args:
      config_json: its fields.
      weights: dotted names of the weights that have adapters.

    Raises:
      SourceError: it asks for something that is not implemented; names the field.
    """
    kind = str(config_json.get("peft_type", "")).upper()
    if kind != "LORA":
        raise SourceError(f"{CONFIG}: peft_type {kind or 'missing'} is not implemented, LORA is")
    beginning = config_json.get("init_lora_weights")
    if beginning not in PLAIN_BEGINNINGS:
        raise SourceError(
            f"{CONFIG}: init_lora_weights = {beginning!r} changes the weights of the base, which "
            "is not implemented: convert it to a plain LoRA with peft first"
        )
    for name, value in config_json.items():
        if name in NEUTRAL | {"init_lora_weights"} or value in EMPTY or value in ({}, []):
            continue
        raise SourceError(
            f"{CONFIG}: {name} = {value!r} is not implemented: merge the adapter with peft and "
            "save the whole model (model.merge_and_unload().save_pretrained(FOLDER))"
        )
    try:
        lora = config.Lora(
            rank=config_json["r"],
            alpha=config_json["lora_alpha"],
            weights=tuple(sorted(weights)),
            dropout=config_json.get("lora_dropout", 0.0),
            rank_stabilized=bool(config_json.get("use_rslora")),
            dora=bool(config_json.get("use_dora")),
        )
    except KeyError as error:
        raise SourceError(f"{CONFIG} has no field {error}") from error
    except ValueError as error:
        raise SourceError(f"{CONFIG}: {error}") from error
    return PeftAdapter(lora, read_base(config_json))


def read_base(config_json: Mapping[str, Any]) -> str:
    """Name or path of the base in an adapter_config.json, with its revision; "" if unknown.

    Raises:
      SourceError: one of them is no text.
    """
    names = [config_json.get(name) or "" for name in ("base_model_name_or_path", "revision")]
    for name in names:
        if not isinstance(name, str):
            raise SourceError(f"{CONFIG} names a base by {name!r:.80}: a name or path is a text")
    base, revision = names
    return f"{base}@{revision}" if revision else base


def adapter_entries(
    entries: Iterable[Entry], lora: config.Lora, axes: Mapping[str, str]
) -> list[Entry]:
    """Table of the adapters of a model.

    Args:
      entries: the family's table of the model.
      lora: config of the adapters.
      axes: axis names of every weight of the model by dotted name.

    Raises:
      ValueError: a weight with an adapter is a part of a larger tensor in this family.
    """
    names = adapters.adapter_axes(lora, axes)
    table = []
    for entry in entries:
        name = entry.ours.replace("/", ".")
        if f"{name}.a" not in names:
            continue
        if entry.part is not None or "{layer}" not in entry.theirs:
            raise ValueError(
                f"{entry.theirs} holds several weights side by side, of which {name} is one: peft "
                "has one adapter for all of them, which is not implemented"
            )
        _, inward, outward = adapters.split_axes(name, axes[name])
        stored = {
            "a": f"rank {grouped(entry, inward)}",
            "b": f"{grouped(entry, outward)} rank",
            "magnitude": grouped(entry, outward).replace("embed", "norm"),
        }
        module = PREFIX + entry.theirs.removesuffix(WEIGHT)
        table += [
            Entry(f"{entry.ours}/{part}", module + SUFFIXES[part], order)
            for part, order in stored.items()
            if f"{name}.{part}" in names
        ]
    return table


def grouped(entry: Entry, axes: str) -> str:
    """The axis of a matrix of theirs that holds these axes of ours: "(heads head_dim)"."""
    group = next(g for g in transforms.axis_groups(entry.axes) if set(g) == set(axes.split()))
    return group[0] if len(group) == 1 else f"({' '.join(group)})"


def adapted_names(entries: Iterable[Entry], tensors: Collection[str]) -> list[str]:
    """Dotted names of the weights of ours that have tensors of an adapter.

    Args:
      entries: the family's table of the model.
      tensors: names of the tensors in the file.
    """

    def tensor(entry: Entry) -> str:
        module = entry.theirs.replace("{layer}", "0").removesuffix(WEIGHT)
        return PREFIX + module + SUFFIXES["a"]

    return [entry.ours.replace("/", ".") for entry in entries if tensor(entry) in tensors]


def adapter_config(
    lora: config.Lora, base: str, cfg: config.Model, entries: Iterable[Entry]
) -> dict[str, Any]:
    """Fields of adapter_config.json.

    Args:
      lora: config of the adapters.
      base: name or path of the base model, with @revision or without.
      cfg: its config.
      entries: the family's table of the model.
    """
    repository, _, revision = base.partition("@")
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": TASKS[cfg.layout],
        "base_model_name_or_path": repository,
        "revision": revision or None,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilized,
        "use_dora": lora.dora,
        "target_modules": target_modules(lora, cfg, entries),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def target_modules(lora: config.Lora, cfg: config.Model, entries: Iterable[Entry]) -> list[str]:
    """Modules of theirs that have an adapter: by the ends of their names where these say which,
    else by whole names.

    Args:
      lora: config of the adapters.
      cfg: config of the model.
      entries: the family's table of the model.
    """
    matrices = {
        entry.ours.replace("/", "."): entry.theirs.removesuffix(WEIGHT)
        for entry in entries
        if "{layer}" in entry.theirs
    }
    chosen = set(adapters.find_adapted(lora, matrices))
    ends: dict[str, set[str]] = {}
    for name, module in matrices.items():
        ends.setdefault(module.rpartition(".")[2], set()).add(name)
    last = {matrices[name].rpartition(".")[2] for name in chosen}
    if all(ends[end] <= chosen for end in last):
        return sorted(last)
    modules = []
    for name in chosen:
        layers = getattr(cfg, name.partition(".")[0]).layers
        modules += [matrices[name].replace("{layer}", str(layer)) for layer in range(layers)]
    return sorted(modules)
