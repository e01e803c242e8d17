# SPDX-License-Identifier: Apache-2.0
"""Fields of config.json that decoder-only families share, in and out, and fields it cannot say."""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

from t5x_lite import config
from t5x_lite.checkpoints.formats.huggingface import fields
from t5x_lite.utils.not_none import not_none

# Both spellings of gelu are its tanh form; "gelu" alone is the exact one, which we do not have.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
}
# Fields that change what transformers computes, and the only values that are computed here.
COMMON = {
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1),
    "rope_interleaved": (None, False),
    "use_bidirectional_attention": (None, False),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
}
ROTARY = {
    "rope_theta",
    "rope_type",
    "type",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
}
YARN = ("beta_fast", "beta_slow", "attention_factor", "truncate")
# Fields on which no logits depend, or that checkpoints of other libraries do not have.
NOT_COMPARED = ("dtype", "dropout", "embedding_std", "add_bos", "encoder", "decoder")
NOT_COMPARED_IN_STACK = ("bias_std", "kv_heads", "pattern", "window_form", "causal")
NOT_COMPARED_IN_STACK += ("random_positions",)
POSITION_FIELDS = {
    "relative": ("buckets", "max_distance", "bias_per_layer"),
    "rotary": ("rotary_base", "rotary_scaling", "sliding_rotary_base"),
    "learned": ("max_length",),
    "sinusoidal": ("sinusoids",),
}


def require_field(config_json: dict, name: str) -> Any:
    """A field that has no default; raises ValueError, naming it, where it is missing."""
    if config_json.get(name) is None:
        raise ValueError(f"config.json has no {name}: take the file that came with the weights")
    return config_json[name]


def require_count(config_json: dict, name: str) -> int:
    """A field that has no default and counts something.

    Raises:
      ValueError: it is missing, or not a positive integer.
    """
    value = require_field(config_json, name)
    if type(value) is not int or value < 1:
        raise ValueError(f"config.json: {name} must be a positive integer; got {value!r}")
    return value


def refuse_unknown(config_json: dict, more: dict[str, tuple] | None = None) -> None:
    """Raises ValueError, naming the field, for a computation that is not implemented."""
    for name, known in (COMMON | (more or {})).items():
        value = config_json.get(name, known[0])
        if value not in known:
            choices = ", ".join(repr(choice) for choice in known)
            raise ValueError(
                f"config.json: {name} = {value!r} is not implemented; known: {choices}"
            )


def head_dim(config_json: dict) -> int:
    """head_dim, or where it is missing the width divided by the heads."""
    if config_json.get("head_dim") is not None:
        return require_count(config_json, "head_dim")
    return require_count(config_json, "hidden_size") // require_count(
        config_json, "num_attention_heads"
    )


def stack_fields(config_json: dict, **more: Any) -> dict:
    """Fields of Stack that Llama, Qwen and Gemma have under the same names."""
    shared = {
        "layers": require_count(config_json, "num_hidden_layers"),
        "embed": require_count(config_json, "hidden_size"),
        "heads": require_count(config_json, "num_attention_heads"),
        "kv_heads": config_json.get("num_key_value_heads"),
        "head_dim": head_dim(config_json),
        "mlp": require_count(config_json, "intermediate_size"),
        "norm_epsilon": config_json.get("rms_norm_eps", 1e-6),
        "positions": "rotary",
    }
    return shared | more


def rotary_fields(config_json: dict) -> dict:
    """Stack's rotary fields, from rope_parameters (transformers 5) or rope_scaling and rope_theta.

    Raises:
      ValueError: a way of scaling that is not implemented; linear, llama3, yarn and dynamic are.
    """
    # In this order transformers 5 reads a file that has both.
    rope = config_json.get("rope_scaling") or config_json.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: rope_scaling = {rope!r} is not an object")
    rope = {"rope_theta": config_json.get("rope_theta") or 10000.0} | rope
    return {
        "rotary_base": rope["rope_theta"],
        "rotary_scaling": parse_rotary_scaling(rope, config_json),
    }


def parse_rotary_scaling(rope: dict, config_json: dict) -> config.RotaryScaling | None:
    """Scaling of rotary positions in rope_parameters; None for none.

    Raises:
      ValueError: it is not implemented.
    """
    unknown = sorted(set(rope) - ROTARY)
    if unknown:
        raise ValueError(f"config.json: {unknown[0]} in rope_parameters is not implemented")
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"rope_type": ("default", "linear", "llama3", "yarn", "dynamic")}
    refuse_unknown({"rope_type": kind, **rope}, known)
    if kind == "default":
        return None
    if kind == "linear":
        return config.RotaryScaling("linear", require_field(rope, "factor"))
    if kind == "dynamic":
        # transformers reads no other length for it.
        original = require_count(config_json, "max_position_embeddings")
        return config.RotaryScaling(kind, require_field(rope, "factor"), original=original)
    longest = {"original_max_position_embeddings": config_json.get("max_position_embeddings")}
    rope = longest | rope
    if kind == "yarn":
        return parse_yarn(rope, config_json)
    return config.RotaryScaling(
        "llama3",
        require_field(rope, "factor"),
        low=require_field(rope, "low_freq_factor"),
        high=require_field(rope, "high_freq_factor"),
        original=require_count(rope, "original_max_position_embeddings"),
    )


def parse_yarn(rope: dict, config_json: dict) -> config.RotaryScaling:
    """YaRN's scaling, read as transformers does.

    Args:
      rope: rope_parameters, with the length of pretraining.
      config_json: the file, from whose longest text a missing factor follows.

    Raises:
      ValueError: a number is missing or out of its range.
    """
    original = require_count(rope, "original_max_position_embeddings")
    factor = rope.get("factor")
    if factor is None:
        factor = require_count(config_json, "max_position_embeddings") / original
    attention = rope.get("attention_factor")
    share, all_share = rope.get("mscale"), rope.get("mscale_all_dim")
    if attention is None and share and all_share:
        growth = 0.1 * math.log(factor)
        attention = (growth * share + 1) / (growth * all_share + 1)
    return config.RotaryScaling(
        "yarn",
        float(factor),
        original=original,
        beta_slow=float(rope.get("beta_slow") or 1),
        beta_fast=float(rope.get("beta_fast") or 32),
        attention_factor=attention,
        truncate=rope.get("truncate", True),
    )


def rope_parameters(base: float, scaling: config.RotaryScaling | None) -> dict:
    """rope_parameters as transformers 5 writes them."""
    if scaling is None:
        return {"rope_type": "default", "rope_theta": base}
    rope = {"rope_type": scaling.kind, "rope_theta": base, "factor": scaling.factor}
    if scaling.kind in ("linear", "dynamic"):
        return rope
    if scaling.kind == "yarn":
        rope |= {name: getattr(scaling, name) for name in YARN}
        return rope | {"original_max_position_embeddings": scaling.original}
    return rope | {
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        "original_max_position_embeddings": scaling.original,
    }


def window_fields(config_json: dict, derived: list[str], window: int | None) -> dict:
    """Stack's pattern and window.

    Args:
      config_json: the file, whose layer_types may be missing.
      derived: layer_types to take then, one for each layer.
      window: size of the window; None without one.

    Raises:
      ValueError: layer_types do not fit the number of layers, or the window is missing.
    """
    kinds = config_json.get("layer_types") or derived
    layers = require_count(config_json, "num_hidden_layers")
    if len(kinds) != layers:
        raise ValueError(
            f"config.json: layer_types has {len(kinds)} entries for num_hidden_layers = {layers}"
        )
    pattern = fields.shortest_pattern(kinds)
    if "sliding" not in pattern:
        return {"pattern": pattern}
    if window is None:
        raise ValueError(
            "config.json: layer_types has sliding layers, but there is no sliding_window"
        )
    return {"pattern": pattern, "window": window}


def is_tied(config_json: dict, names: Collection[str], default: bool) -> bool:
    """True if the logits are computed with the embedding table.

    tie_word_embeddings says so, and the file has to agree: a head in spite of it is a duplicate,
    which conversion compares.

    Args:
      config_json: the file.
      names: names of the tensors.
      default: the family's own value of tie_word_embeddings.

    Raises:
      ValueError: the head is a weight of its own by config.json, and the file has none.
    """
    tied = config_json.get("tie_word_embeddings")
    has_head = any(name.endswith("lm_head.weight") for name in names)
    if tied is None:
        return default or not has_head
    if not tied and not has_head:
        raise ValueError(
            "config.json: tie_word_embeddings = False, but there is no lm_head.weight. If the "
            "model was saved without a head on purpose, write tie_word_embeddings = true there"
        )
    return tied


def model_fields(config_json: dict) -> dict:
    """Fields of Model that every decoder-only family reads alike."""
    vocab = require_count(config_json, "vocab_size")
    exact = (config_json.get("dtype") or config_json.get("torch_dtype")) == "float32"
    return dict(
        vocab=vocab,
        decoder_start_token_id=start_token(config_json, vocab),
        embedding_std=config_json.get("initializer_range", 0.02),
        dtype="float32" if exact else "bfloat16",
    )


def start_token(config_json: dict, vocab: int) -> int:
    """The id that begins a text: bos, or else the first eos, or 0."""
    ends = config_json.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    for token in (config_json.get("bos_token_id"), *ends):
        if token is not None and 0 <= token < vocab:
            return token
    return 0


def activation_name(activation: str) -> str:
    """Hugging Face's name of an activation."""
    names = [name for name, ours in ACTIVATIONS.items() if ours == activation]
    if not names:
        known = ", ".join(dict.fromkeys(ACTIVATIONS.values()))
        raise ValueError(f"cannot express Stack.activation = {activation!r}; only {known}")
    return names[0]


def export_fields(cfg: config.Model, **more: Any) -> dict:
    """Fields of config.json that Llama, Qwen and Gemma write alike."""
    stack = not_none(cfg.decoder)
    values = {
        "vocab_size": cfg.vocab,
        "hidden_size": stack.embed,
        "intermediate_size": stack.mlp,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": stack.heads,
        "num_key_value_heads": stack.key_heads,
        "head_dim": stack.head_dim,
        "rms_norm_eps": stack.norm_epsilon,
        "initializer_range": cfg.embedding_std,
        "tie_word_embeddings": cfg.tied,
        "rope_parameters": rope_parameters(stack.rotary_base, stack.rotary_scaling),
        # Readers of before transformers 5 look here.
        "rope_theta": stack.rotary_base,
    }
    scaling = stack.rotary_scaling
    if scaling is not None and scaling.kind in ("dynamic", "yarn"):
        # Dynamic scaling begins there; of YaRN, the length of texts that it is stretched to.
        reach = 1 if scaling.kind == "dynamic" else scaling.factor
        values["max_position_embeddings"] = round(scaling.original * reach)
    return values | end_token_fields(cfg) | more


def end_token_fields(cfg: config.Model) -> dict:
    """Ids of special tokens: the start is the model's, the others are those of the vocabulary."""
    return {"bos_token_id": cfg.decoder_start_token_id, "eos_token_id": None, "pad_token_id": None}


def require_decoder_only(cfg: config.Model, family: str) -> None:
    """Raises ValueError if cfg is not decoder-only."""
    if cfg.layout != "decoder_only":
        raise ValueError(f"{family} cannot express Model.encoder: it is decoder-only")


def check_round_trip(cfg: config.Model, config_json: dict, parse_config: Callable) -> dict:
    """Checks that an exported config.json, read again, is a Model with the same logits.

    Args:
      cfg: config of the model that is exported.
      config_json: the file.
      parse_config: the family's reader.

    Returns:
      `config_json`.

    Raises:
      ValueError: it is another model; names the fields that the family cannot express.
    """
    names = [] if cfg.tied else ["lm_head.weight"]
    wanted, reread = logit_fields(cfg), logit_fields(parse_config(config_json, names))
    differing = [name for name in wanted if not nearly_equal(wanted[name], reread.get(name))]
    if differing:
        lost = ", ".join(f"{name} = {wanted[name]!r}" for name in differing)
        raise ValueError(
            f"{config_json['model_type']} cannot express {lost}; choose another family to export to"
        )
    return config_json


def logit_fields(cfg: config.Model) -> dict[str, Any]:
    """Fields on which the logits of a decoder-only model depend, defaults resolved."""
    stack = not_none(cfg.decoder)
    idle = [
        name for kind, names in POSITION_FIELDS.items() if kind != stack.positions for name in names
    ]
    if not any(stack.sliding):
        idle += ["window", "sliding_rotary_base"]
    values = {"Stack.key_heads": stack.key_heads, "Stack.sliding": stack.sliding}
    for owner, skipped in ((cfg, NOT_COMPARED), (stack, (*NOT_COMPARED_IN_STACK, *idle))):
        kind = type(owner).__name__
        for field in dataclasses.fields(owner):
            if field.name not in skipped:
                values[f"{kind}.{field.name}"] = getattr(owner, field.name)
    return values


def nearly_equal(one: Any, other: Any) -> bool:
    """True for equal values; floats may differ by rounding."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9)
    return one == other
