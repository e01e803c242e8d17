# SPDX-License-Identifier: Apache-2.0
"""Llama, and models published as one (SmolLM2, TinyLlama), as Hugging Face names them."""

from collections.abc import Collection

from t5x_lite import config
from t5x_lite.checkpoints.formats.huggingface import decoders, fields
from t5x_lite.checkpoints.transforms import Entry
from t5x_lite.utils.not_none import not_none

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def parse_config(config_json: dict, names: Collection[str]) -> config.Model:
    """The Model of a Llama with this config.json, whose files have tensors of these names.

    Raises:
      ValueError: a field is missing, or its value is not implemented.
    """
    kinds = config_json.get("layer_types")
    if isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds):
        fields.warn_ignored("layer_types", "all layers are full, as in any Llama")
    else:
        decoders.refuse_unknown(config_json, {"layer_types": (None,)})
    decoders.refuse_unknown(config_json)
    head_dim = decoders.head_dim(config_json)
    biased = bool(config_json.get("attention_bias", False))
    stack = decoders.stack_fields(
        config_json,
        activation=fields.choose_value(config_json, "hidden_act", decoders.ACTIVATIONS, "silu"),
        query_scale=head_dim**-0.5,
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=bool(config_json.get("mlp_bias", False)),
        **decoders.rotary_fields(config_json),
    )
    return config.Model(
        decoder=config.Stack(**stack),
        tied=decoders.is_tied(config_json, names, default=False),
        **decoders.model_fields(config_json),
    )


def canonical_name(name: str) -> str:
    """A tensor's name as `entries` has it, in a model without a head or one that sees images."""
    for prefix in ("language_model.model.", "model.language_model."):
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    if name.startswith(("layers.", "embed_tokens.", "norm.")):
        return "model." + name
    return name.removeprefix("language_model.")


def entries(cfg: config.Model) -> list[Entry]:
    """Table of a Llama, Qwen or Gemma."""
    stack = not_none(cfg.decoder)
    block, attention = "model.layers.{layer}", "decoder/layers/attention"
    table = [
        Entry("embedding", "model.embed_tokens.weight", "vocab embed"),
        Entry("decoder/norm", "model.norm.weight", "norm"),
        Entry(f"{attention}/norm", f"{block}.input_layernorm.weight", "norm"),
        *projection_entries(stack, block, attention),
    ]
    if not cfg.tied:
        table.append(Entry("head", "lm_head.weight", "vocab embed"))
    if stack.qk_norm:
        for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            name = f"{block}.self_attn.{theirs}.weight"
            table.append(Entry(f"{attention}/{ours}", name, "head_norm"))
    before, after = "decoder/layers/mlp/norm", f"{block}.post_attention_layernorm.weight"
    if not stack.post_norms:
        return [*table, Entry(before, after, "norm")]
    return table + [
        Entry(f"{attention}/post_norm", after, "norm"),
        Entry(before, f"{block}.pre_feedforward_layernorm.weight", "norm"),
        Entry("decoder/layers/mlp/post_norm", f"{block}.post_feedforward_layernorm.weight", "norm"),
    ]


def projection_entries(stack: config.Stack, block: str, attention: str) -> list[Entry]:
    """Entries of the matrices of attention and feed-forward layers, and of their biases.

    Args:
      stack: config of the decoder.
      block: name of a layer of theirs.
      attention: path of our attention layers.
    """
    mlp, table = "decoder/layers/mlp", []
    lines = [
        (stack.qkv_bias, f"{attention}/query", "self_attn.q_proj", "(heads head_dim)", "embed"),
        (stack.qkv_bias, f"{attention}/key", "self_attn.k_proj", "(kv_heads head_dim)", "embed"),
        (stack.qkv_bias, f"{attention}/value", "self_attn.v_proj", "(kv_heads head_dim)", "embed"),
        (stack.out_bias, f"{attention}/out", "self_attn.o_proj", "embed", "(heads head_dim)"),
        (stack.mlp_bias, f"{mlp}/gate", "mlp.gate_proj", "mlp", "embed"),
        (stack.mlp_bias, f"{mlp}/up", "mlp.up_proj", "mlp", "embed"),
        (stack.mlp_bias, f"{mlp}/down", "mlp.down_proj", "embed", "mlp"),
    ]
    for biased, ours, theirs, outward, inward in lines:
        table.append(Entry(ours, f"{block}.{theirs}.weight", f"{outward} {inward}"))
        if biased:
            axes = outward.replace("embed", "norm")
            table.append(Entry(f"{ours}_bias", f"{block}.{theirs}.bias", axes))
    return table


def ignored(cfg: config.Model) -> tuple[str, ...]:
    """Buffers that files written before transformers 4.32 carry."""
    return ("*.rotary_emb.inv_freq",)


def duplicates(cfg: config.Model) -> dict[str, str]:
    """A tied head, where the file has it."""
    return {HEAD: TABLE} if cfg.tied else {}


def config_json(cfg: config.Model) -> dict:
    """config.json of cfg; raises ValueError, naming the field, for a value that no Llama has."""
    decoders.require_decoder_only(cfg, "llama")
    stack = not_none(cfg.decoder)
    values = decoders.export_fields(
        cfg,
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        hidden_act=decoders.activation_name(stack.activation),
        attention_bias=stack.qkv_bias,
        mlp_bias=stack.mlp_bias,
    )
    return decoders.check_round_trip(cfg, values, parse_config)
