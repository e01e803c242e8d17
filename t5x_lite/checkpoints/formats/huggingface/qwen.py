# SPDX-License-Identifier: Apache-2.0
"""Qwen 2, 2.5 and 3 (dense), as Hugging Face names them: Llama's names, other biases and norms."""

from collections.abc import Collection

from t5x_lite import config
from t5x_lite.checkpoints.formats.huggingface import decoders, fields
from t5x_lite.checkpoints.formats.huggingface.llama import (
    canonical_name,
    duplicates,
    entries,
    ignored,
)
from t5x_lite.utils.not_none import not_none

__all__ = ["config_json", "duplicates", "entries", "ignored", "parse_config", "canonical_name"]


def parse_config(config_json: dict, names: Collection[str]) -> config.Model:
    """The Model of a Qwen with this config.json, whose files have tensors of these names.

    Raises:
      ValueError: a field is missing, or its value is not implemented.
    """
    third = config_json["model_type"] == "qwen3"
    decoders.refuse_unknown(config_json, {"dual_chunk_attention_config": (None,)})
    if third:
        config_json = {"head_dim": 128} | config_json
    biased = bool(config_json.get("attention_bias", False)) if third else True
    stack = decoders.stack_fields(
        config_json,
        activation=fields.choose_value(config_json, "hidden_act", decoders.ACTIVATIONS, "silu"),
        query_scale=decoders.head_dim(config_json) ** -0.5,
        qk_norm=third,
        qkv_bias=biased,
        out_bias=biased and third,
        **qwen_window_fields(config_json),
        **decoders.rotary_fields(config_json),
    )
    return config.Model(
        decoder=config.Stack(**stack),
        tied=decoders.is_tied(config_json, names, default=False),
        **decoders.model_fields(config_json),
    )


def qwen_window_fields(config_json: dict) -> dict:
    """Stack's pattern and window: sliding from max_window_layers on, if windows are used at all."""
    window = config_json.get("sliding_window", 4096)
    if not config_json.get("use_sliding_window", False):
        window = None
    layers = decoders.require_count(config_json, "num_hidden_layers")
    full = layers if window is None else config_json.get("max_window_layers", 28)
    kinds = ["full_attention" if layer < full else "sliding_attention" for layer in range(layers)]
    return decoders.window_fields(config_json, kinds, window)


def config_json(cfg: config.Model) -> dict:
    """config.json of cfg; raises ValueError, naming the field, for a value that no Qwen has."""
    decoders.require_decoder_only(cfg, "qwen")
    stack = not_none(cfg.decoder)
    values = decoders.export_fields(
        cfg,
        model_type="qwen3" if stack.qk_norm else "qwen2",
        architectures=["Qwen3ForCausalLM" if stack.qk_norm else "Qwen2ForCausalLM"],
        hidden_act=decoders.activation_name(stack.activation),
        layer_types=fields.list_layer_types(stack),
        use_sliding_window=any(stack.sliding),
        sliding_window=stack.window if any(stack.sliding) else None,
        # Full layers before the first sliding one, for readers that do not know layer_types.
        max_window_layers=[*stack.sliding, True].index(True),
    )
    if stack.qk_norm:
        values["attention_bias"] = stack.qkv_bias
    return decoders.check_round_trip(cfg, values, parse_config)
