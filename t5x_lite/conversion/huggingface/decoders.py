# SPDX-License-Identifier: Apache-2.0
"""What the lone decoders share: fields of config.json in and out, and what it cannot say."""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

from t5x_lite import config
from t5x_lite.conversion.huggingface import fields

# Both spellings of gelu are its tanh form; "gelu" alone is the exact one, which we do not have.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
}
# What transformers would compute otherwise, and the only values that are computed here.
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
}
# Fields on which no logits depend, or that checkpoints of other makes do not have.
UNTOLD = ("activations", "dropout", "embedding_std", "starts_prompts", "encoder", "decoder")
UNTOLD_OF_STACK = ("bias_std", "kv_heads", "pattern", "window_form")
BELONGINGS = {
    "relative": ("buckets", "max_distance", "bias_per_layer"),
    "rotary": ("rotary_base", "rotary_scaling", "sliding_rotary_base"),
    "learned": ("max_length",),
}


def required(config_json: dict, name: str) -> Any:
    """A field that has no default; ValueError names it where it is missing."""
    if config_json.get(name) is None:
        raise ValueError(f"config.json has no {name}: take the file that came with the weights")
    return config_json[name]


def whole(config_json: dict, name: str) -> int:
    """A field that has no default and counts something; ValueError names it where it does not."""
    value = required(config_json, name)
    if type(value) is not int or value < 1:
        raise ValueError(f"config.json: {name} must be a whole number from 1 on; got {value!r}")
    return value


def refuse_unknown(config_json: dict, more: dict[str, tuple] | None = None) -> None:
    """ValueError names a field whose value asks for a computation that is not implemented."""
    for name, known in (COMMON | (more or {})).items():
        value = config_json.get(name, known[0])
        if value not in known:
            choices = ", ".join(repr(choice) for choice in known)
            raise ValueError(
                f"config.json: {name} = {value!r} is not implemented; known: {choices}"
            )


def head_dim(config_json: dict) -> int:
    """head_dim, or where it is left open the width over the heads."""
    if config_json.get("head_dim") is not None:
        return whole(config_json, "head_dim")
    return whole(config_json, "hidden_size") // whole(config_json, "num_attention_heads")


def stack(config_json: dict, **more: Any) -> dict:
    """The fields of Stack that Llama and its kind have under the same names."""
    shared = {
        "layers": whole(config_json, "num_hidden_layers"),
        "embed": whole(config_json, "hidden_size"),
        "heads": whole(config_json, "num_attention_heads"),
        "kv_heads": config_json.get("num_key_value_heads"),
        "head_dim": head_dim(config_json),
        "mlp": whole(config_json, "intermediate_size"),
        "norm_epsilon": config_json.get("rms_norm_eps", 1e-6),
        "positions": "rotary",
    }
    return shared | more


def rotary(config_json: dict) -> dict:
    """Stack's rotary fields: of rope_parameters (transformers 5), or rope_scaling and rope_theta.

    Raises:
      ValueError: a way of scaling that is not implemented; linear and llama3 are.
    """
    # In this order transformers 5 reads a file that has both.
    said = config_json.get("rope_scaling") or config_json.get("rope_parameters") or {}
    if not isinstance(said, dict):
        raise ValueError(f"config.json: rope_scaling = {said!r} is no table of values")
    said = {"rope_theta": config_json.get("rope_theta") or 10000.0} | said
    return {"rotary_base": said["rope_theta"], "rotary_scaling": scaling(said, config_json)}


def scaling(said: dict, config_json: dict) -> config.RotaryScaling | None:
    """How rope_parameters stretch the positions; ValueError names what is not implemented."""
    unknown = sorted(set(said) - ROTARY)
    if unknown:
        raise ValueError(f"config.json: {unknown[0]} in rope_parameters is not implemented")
    kind = said.get("rope_type", said.get("type", "default"))
    known = {"rope_type": ("default", "linear", "llama3")}
    refuse_unknown({"rope_type": kind, **said}, known)
    if kind == "default":
        return None
    if kind == "linear":
        return config.RotaryScaling("linear", required(said, "factor"))
    longest = {"original_max_position_embeddings": config_json.get("max_position_embeddings")}
    said = longest | said
    return config.RotaryScaling(
        "llama3",
        required(said, "factor"),
        low=required(said, "low_freq_factor"),
        high=required(said, "high_freq_factor"),
        original=whole(said, "original_max_position_embeddings"),
    )


def rope_parameters(base: float, scaling: config.RotaryScaling | None) -> dict:
    """rope_parameters as transformers 5 writes them."""
    if scaling is None:
        return {"rope_type": "default", "rope_theta": base}
    said = {"rope_type": scaling.kind, "rope_theta": base, "factor": scaling.factor}
    if scaling.kind == "linear":
        return said
    return said | {
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        "original_max_position_embeddings": scaling.original,
    }


def windows(config_json: dict, derived: list[str], window: int | None) -> dict:
    """Stack's pattern and window: of layer_types, or where they are missing of `derived`."""
    kinds = config_json.get("layer_types") or derived
    layers = whole(config_json, "num_hidden_layers")
    if len(kinds) != layers:
        raise ValueError(
            f"config.json: layer_types has {len(kinds)} entries for num_hidden_layers = {layers}"
        )
    pattern = fields.repeated(kinds)
    if "sliding" not in pattern:
        return {"pattern": pattern}
    if window is None:
        raise ValueError(
            "config.json: layer_types has sliding layers, but there is no sliding_window"
        )
    return {"pattern": pattern, "window": window}


def tied(config_json: dict, names: Collection[str], default: bool) -> bool:
    """Whether the logits are read through the embedding table.

    tie_word_embeddings says so (`default` is the family's own), and the file has to agree: a head
    in spite of it is a duplicate, which conversion compares.

    Raises:
      ValueError: the head is a weight of its own by config.json, and the file has none.
    """
    said = config_json.get("tie_word_embeddings")
    has_head = any(name.endswith("lm_head.weight") for name in names)
    if said is None:
        return default or not has_head
    if not said and not has_head:
        raise ValueError(
            "config.json: tie_word_embeddings = False, but there is no lm_head.weight. If the "
            "model was saved without a head on purpose, write tie_word_embeddings = true there"
        )
    return said


def common(config_json: dict) -> dict:
    """The fields of Model that every lone decoder reads alike."""
    vocab = whole(config_json, "vocab_size")
    exact = (config_json.get("dtype") or config_json.get("torch_dtype")) == "float32"
    return dict(
        vocab=vocab,
        start=start(config_json, vocab),
        embedding_std=config_json.get("initializer_range", 0.02),
        activations="float32" if exact else "bfloat16",
    )


def start(config_json: dict, vocab: int) -> int:
    """The id that begins a text: bos, or else the first eos, or 0."""
    ends = config_json.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    for token in (config_json.get("bos_token_id"), *ends):
        if token is not None and 0 <= token < vocab:
            return token
    return 0


def written(activation: str) -> str:
    """Hugging Face's name of an activation."""
    return next(name for name, ours in ACTIVATIONS.items() if ours == activation)


def exported(cfg: config.Model, **more: Any) -> dict:
    """The fields of config.json that Llama and its kind write alike."""
    inside = cfg.decoder
    said = {
        "vocab_size": cfg.vocab,
        "hidden_size": inside.embed,
        "intermediate_size": inside.mlp,
        "num_hidden_layers": inside.layers,
        "num_attention_heads": inside.heads,
        "num_key_value_heads": inside.key_heads,
        "head_dim": inside.head_dim,
        "rms_norm_eps": inside.norm_epsilon,
        "initializer_range": cfg.embedding_std,
        "tie_word_embeddings": cfg.tied,
        "rope_parameters": rope_parameters(inside.rotary_base, inside.rotary_scaling),
        # Readers of before transformers 5 look here.
        "rope_theta": inside.rotary_base,
    }
    return said | ends(cfg) | more


def ends(cfg: config.Model) -> dict:
    """Ids of special tokens: the start is the model's, the others are for the vocabulary to say."""
    return {"bos_token_id": cfg.start, "eos_token_id": None, "pad_token_id": None}


def require_lone(cfg: config.Model, family: str) -> None:
    """ValueError if cfg is not a decoder alone."""
    if cfg.layout != "joined":
        raise ValueError(f"{family} cannot express Model.encoder: it is a decoder alone")


def faithful(cfg: config.Model, said: dict, model: Callable) -> dict:
    """said, if `model`, reading it again, gives a Model with the logits of cfg.

    Raises:
      ValueError: it does not; names the fields that the family cannot express.
    """
    names = [] if cfg.tied else ["lm_head.weight"]
    wanted, found = facts(cfg), facts(model(said, names))
    differing = [name for name in wanted if not alike(wanted[name], found.get(name))]
    if differing:
        lost = ", ".join(f"{name} = {wanted[name]!r}" for name in differing)
        raise ValueError(
            f"{said['model_type']} cannot express {lost}; choose another family to export to"
        )
    return said


def facts(cfg: config.Model) -> dict[str, Any]:
    """What the logits of a lone decoder depend on, by field, defaults resolved."""
    inside = cfg.decoder
    idle = [
        name for kind, names in BELONGINGS.items() if kind != inside.positions for name in names
    ]
    if not any(inside.sliding):
        idle += ["window", "sliding_rotary_base"]
    found = {"Stack.key_heads": inside.key_heads, "Stack.sliding": inside.sliding}
    for owner, skipped in ((cfg, UNTOLD), (inside, (*UNTOLD_OF_STACK, *idle))):
        kind = type(owner).__name__
        for field in dataclasses.fields(owner):
            if field.name not in skipped:
                found[f"{kind}.{field.name}"] = getattr(owner, field.name)
    return found


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9)
    return one == other
