# SPDX-License-Identifier: Apache-2.0
"""Gemma 1, 2 and 3 (the text part of those that also see images), as Hugging Face names them."""

from collections.abc import Collection
from typing import Any

from t5x_lite import config
from t5x_lite.checkpoints.formats.huggingface import decoders, fields
from t5x_lite.checkpoints.formats.huggingface.llama import canonical_name, duplicates, entries
from t5x_lite.utils.not_none import not_none

__all__ = ["config_json", "duplicates", "entries", "ignored", "parse_config", "canonical_name"]

# Defaults of transformers for fields that config.json leaves out, as those of Gemma 3 do.
GEMMA1_DEFAULTS = {"head_dim": 256, "vocab_size": 256000, "num_key_value_heads": 16}
GEMMA2_DEFAULTS = {
    "head_dim": 256,
    "vocab_size": 256000,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window_pattern": 2,
}
GEMMA3_DEFAULTS = GEMMA2_DEFAULTS | {
    "vocab_size": 262208,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
}
DEFAULTS = {"gemma": GEMMA1_DEFAULTS, "gemma2": GEMMA2_DEFAULTS, "gemma3_text": GEMMA3_DEFAULTS}


def parse_config(config_json: dict, names: Collection[str]) -> config.Model:
    """The Model of a Gemma with this config.json, whose files have tensors of these names.

    Raises:
      ValueError: a field is missing, or its value is not implemented.
    """
    config_json = text_config(config_json)
    kind = config_json["model_type"]
    config_json = DEFAULTS[kind] | config_json
    decoders.refuse_unknown(config_json)
    generation = {"gemma": gemma1_fields, "gemma2": gemma2_fields, "gemma3_text": gemma3_fields}[
        kind
    ]
    return config.Model(
        decoder=config.Stack(**generation(config_json)),
        tied=decoders.is_tied(config_json, names, default=True),
        scale_embedding=True,
        logits_softcap=config_json.get("final_logit_softcapping"),
        **decoders.model_fields(config_json),
    )


def text_config(config_json: dict) -> dict:
    """config.json itself, or the text part of one of a Gemma 3 that also sees images."""
    if config_json["model_type"] != "gemma3":
        return config_json
    shared = ("dtype", "torch_dtype", "tie_word_embeddings", "bos_token_id", "eos_token_id")
    above = {name: config_json[name] for name in shared if config_json.get(name) is not None}
    text = decoders.require_field(config_json, "text_config")
    return {"bos_token_id": 2} | above | text | {"model_type": "gemma3_text"}


def shared_fields(config_json: dict, act: str) -> dict:
    """Fields of Stack that all Gemmas read alike; field `act` names the activation."""
    biased = bool(config_json.get("attention_bias", False))
    activation = fields.choose_value(config_json, act, decoders.ACTIVATIONS, "gelu_pytorch_tanh")
    return decoders.stack_fields(
        config_json,
        norm="rms_plus_one",
        activation=activation,
        qkv_bias=biased,
        out_bias=biased,
    )


def gemma1_fields(config_json: dict) -> dict:
    """The fields of Stack of a Gemma 1."""
    if config_json.get("hidden_act") == "gelu":
        # The first releases say gelu and mean its tanh form; transformers reads them so.
        config_json = config_json | {"hidden_act": "gelu_pytorch_tanh"}
    decoders.refuse_unknown(config_json, {"final_logit_softcapping": (None,)})
    stack = shared_fields(config_json, "hidden_act") | decoders.rotary_fields(config_json)
    return stack | {"query_scale": stack["head_dim"] ** -0.5}


def later_fields(config_json: dict) -> dict:
    """Fields of Stack that Gemma 2 and 3 have beyond Gemma 1's, rotary positions left out."""
    cycle = decoders.require_count(config_json, "sliding_window_pattern")
    layers = decoders.require_count(config_json, "num_hidden_layers")
    kinds = fields.alternate_layer_types(layers, cycle)
    stack = shared_fields(config_json, "hidden_activation")
    stack |= decoders.window_fields(config_json, kinds, config_json["sliding_window"])
    scale = decoders.require_count(config_json, "query_pre_attn_scalar") ** -0.5
    return stack | {"post_norms": True, "query_scale": scale}


def gemma2_fields(config_json: dict) -> dict:
    """The fields of Stack of a Gemma 2."""
    softcap = config_json["attn_logit_softcapping"]
    return later_fields(config_json) | decoders.rotary_fields(config_json) | {"softcap": softcap}


def gemma3_fields(config_json: dict) -> dict:
    """The fields of Stack of a Gemma 3."""
    fields.warn_softcap(config_json, "Gemma 3")
    stack: dict[str, Any] = later_fields(config_json) | {"qk_norm": True}
    full, sliding = rotary_by_kind(config_json)
    stack |= decoders.rotary_fields(full)
    if "sliding" in stack["pattern"]:
        stack |= {"sliding_rotary_base": sliding}
    return stack


def rotary_by_kind(config_json: dict) -> tuple[dict, float]:
    """The full layers' fields, as other models have them, and the sliding layers' base.

    Raises:
      ValueError: the sliding layers' positions are stretched.
    """
    by_kind = config_json.get("rope_parameters") or {}
    unknown = sorted(set(by_kind) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(f"config.json: {unknown[0]} in a Gemma 3's rope_parameters is not known")
    full, sliding = (by_kind.get(f"{kind}_attention") or {} for kind in ("full", "sliding"))
    full = {"rope_theta": config_json.get("rope_theta", 1e6)} | full
    full |= config_json.get("rope_scaling") or {}
    sliding = {"rope_theta": config_json.get("rope_local_base_freq", 1e4)} | sliding
    if decoders.rotary_fields({"rope_parameters": sliding})["rotary_scaling"] is not None:
        raise ValueError(
            "config.json: rope_parameters of sliding_attention with rope_type = "
            f"{sliding['rope_type']!r} is not implemented; known: 'default'"
        )
    longest = config_json.get("max_position_embeddings")
    return {"rope_parameters": full, "max_position_embeddings": longest}, sliding["rope_theta"]


def ignored(cfg: config.Model) -> tuple[str, ...]:
    """Buffers of old files, and the parts of a Gemma 3 that see images."""
    parts = ("vision_tower", "multi_modal_projector", "model.vision_tower")
    parts += ("model.multi_modal_projector",)
    return ("*.rotary_emb.inv_freq", *(f"{part}.*" for part in parts))


def config_json(cfg: config.Model) -> dict:
    """config.json of cfg; raises ValueError, naming the field, for a value that no Gemma has."""
    decoders.require_decoder_only(cfg, "gemma")
    stack = not_none(cfg.decoder)
    generation = 3 if stack.qk_norm else 2 if stack.post_norms else 1
    model_type = ("gemma", "gemma2", "gemma3_text")[generation - 1]
    act = "hidden_act" if generation == 1 else "hidden_activation"
    values = decoders.export_fields(
        cfg,
        model_type=model_type,
        architectures=[("Gemma", "Gemma2", "Gemma3")[generation - 1] + "ForCausalLM"],
        attention_bias=stack.qkv_bias,
        **{act: decoders.activation_name(stack.activation)},
    )
    if generation > 1:
        values |= {
            "layer_types": fields.list_layer_types(stack),
            # transformers builds a mask with a window even where no layer has one.
            "sliding_window": stack.window or 4096,
            "query_pre_attn_scalar": fields.pre_attention_scalar(stack, model_type),
            "attn_logit_softcapping": stack.softcap,
            "final_logit_softcapping": cfg.logits_softcap,
        }
    if generation == 3:
        local = stack.sliding_rotary_base or stack.rotary_base
        sliding = decoders.rope_parameters(local, None)
        values["rope_parameters"] = {
            "full_attention": values["rope_parameters"],
            "sliding_attention": sliding,
        }
        values["rope_local_base_freq"] = local
    return decoders.check_round_trip(cfg, values, parse_config)
