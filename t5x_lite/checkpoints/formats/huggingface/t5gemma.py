# SPDX-License-Identifier: Apache-2.0
"""T5Gemma (Gemma 2 blocks), and encoders of it, as Hugging Face names them.

The encoder's window is |q - k| < sliding_window: so the checkpoints were trained (DeepMind's Flax
code, and transformers 4), though transformers 5.23 computes |q - k| <= sliding_window.
"""

from collections.abc import Collection

from t5x_lite import config
from t5x_lite.checkpoints.formats.huggingface import fields
from t5x_lite.checkpoints.transforms import Entry
from t5x_lite.utils.not_none import not_none

# Defaults of transformers for fields that config.json leaves out.
DEFAULTS = dict(
    vocab_size=256000,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    rms_norm_eps=1e-6,
    bos_token_id=2,
    attention_bias=False,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    layer_types=None,
    final_logit_softcapping=30.0,
    attn_logit_softcapping=50.0,
)
# Fields of every layer of the Gemma 2 and Gemma 3 kind.
GEMMA_STACK = dict(
    norm="rms_plus_one",
    norm_order="pre",
    embedding_norm=False,
    post_norms=True,
    gated=True,
    activation="gelu",
    mlp_bias=False,
    positions="rotary",
    rotary_span=None,
    chunk=None,
    qkv_norm=False,
    output_norm=False,
    cross_rotary=False,
)
PROJECTIONS = {"query": "q", "key": "k", "value": "v"}


def parse_config(config_json: dict, names: Collection[str]) -> config.Model:
    """The Model of a T5Gemma with this config.json, whose files have tensors of these names."""
    encoder = DEFAULTS | config_json["encoder"]
    decoder = DEFAULTS | config_json.get("decoder", {})
    pair = config_json.get("is_encoder_decoder", True)
    top = decoder if pair else encoder
    if pair and encoder["vocab_size"] != decoder["vocab_size"]:
        raise ValueError(
            f"config.json: encoder.vocab_size ({encoder['vocab_size']}) and decoder.vocab_size "
            f"({decoder['vocab_size']}) differ, which is not implemented"
        )
    tied = config_json.get("tie_word_embeddings", True)
    return config.Model(
        vocab=top["vocab_size"],
        encoder=config.Stack(**tower_fields(encoder)),
        decoder=config.Stack(**tower_fields(decoder)) if pair else None,
        tied=not pair or (tied and "lm_head.out_proj.weight" not in names),
        logits_softcap=decoder["final_logit_softcapping"] if pair else None,
        scale_embedding=True,
        separate_embeddings=pair,
        decoder_start_token_id=top["bos_token_id"],
        dropout=config_json.get("dropout_rate", 0.0),
    )


def tower_fields(tower: dict) -> dict:
    """Fields of the Stack that one of config.json's two towers describes."""
    pattern = fields.shortest_pattern(
        tower["layer_types"] or fields.alternate_layer_types(tower["num_hidden_layers"], 2)
    )
    return gemma_stack_fields(tower) | dict(
        softcap=tower["attn_logit_softcapping"],
        rotary_base=rotary_base(tower),
        pattern=pattern,
        window=tower["sliding_window"] if "sliding" in pattern else None,
    )


def gemma_stack_fields(tower: dict) -> dict:
    """Fields of a Stack that T5Gemma 1 and 2 read alike."""
    activations = {"gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "silu": "silu", "relu": "relu"}
    biased = tower["attention_bias"]
    return GEMMA_STACK | dict(
        layers=tower["num_hidden_layers"],
        embed=tower["hidden_size"],
        heads=tower["num_attention_heads"],
        head_dim=tower["head_dim"],
        mlp=tower["intermediate_size"],
        kv_heads=tower["num_key_value_heads"],
        activation=fields.choose_value(tower, "hidden_activation", activations),
        norm_epsilon=tower["rms_norm_eps"],
        qkv_bias=biased,
        out_bias=biased,
        query_scale=tower["query_pre_attn_scalar"] ** -0.5,
    )


def rotary_base(tower: dict) -> float:
    """The one rotary base of all layers; raises ValueError if positions are stretched."""
    rope = tower.get("rope_parameters") or tower.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields.choose_value({"rope_type": kind}, "rope_type", {"default": None})
    return float(rope.get("rope_theta", tower.get("rope_theta", 10000.0)))


def entries(cfg: config.Model) -> list[Entry]:
    """Table of a T5Gemma."""
    if cfg.decoder is None:
        table = [Entry("embedding", "encoder.embed_tokens.weight", "vocab embed")]
        return table + tower_entries("encoder", "encoder", cfg.last_stack)
    table = [
        Entry("embedding", "model.decoder.embed_tokens.weight", "vocab embed"),
        Entry("encoder_embedding", "model.encoder.embed_tokens.weight", "vocab encoder_embed"),
    ]
    if not cfg.tied:
        table.append(Entry("head", "lm_head.out_proj.weight", "vocab embed"))
    table += tower_entries("encoder", "model.encoder", not_none(cfg.encoder))
    table += tower_entries("decoder", "model.decoder", cfg.decoder)
    layer = "model.decoder.layers.{layer}"
    crossed = "decoder/layers/cross_attention"
    return table + attention_entries(
        crossed, layer, "cross_attn", cfg.decoder, source="encoder_embed"
    )


def tower_entries(ours: str, theirs: str, stack: config.Stack) -> list[Entry]:
    """Entries of a tower: its own norm, and its layers without cross-attention.

    Args:
      ours: path of the tower.
      theirs: its name in their tensors.
      stack: its config.
    """
    layer = f"{theirs}.layers.{{layer}}"
    mlp = f"{ours}/layers/mlp"
    return [
        Entry(f"{ours}/norm", f"{theirs}.norm.weight", "norm"),
        *attention_entries(f"{ours}/layers/attention", layer, "self_attn", stack),
        Entry(f"{mlp}/norm", f"{layer}.pre_feedforward_layernorm.weight", "norm"),
        Entry(f"{mlp}/post_norm", f"{layer}.post_feedforward_layernorm.weight", "norm"),
        Entry(f"{mlp}/gate", f"{layer}.mlp.gate_proj.weight", "mlp embed"),
        Entry(f"{mlp}/up", f"{layer}.mlp.up_proj.weight", "mlp embed"),
        Entry(f"{mlp}/down", f"{layer}.mlp.down_proj.weight", "embed mlp"),
    ]


def attention_entries(
    ours: str, layer: str, kind: str, stack: config.Stack, source: str = "embed"
) -> list[Entry]:
    """Entries of one attention layer and its two norms.

    Args:
      ours: path of the attention layer.
      layer: name of their layer.
      kind: its name there, "self_attn" or "cross_attn".
      stack: config of the tower.
      source: axis of the hidden states that keys and values are computed from.
    """
    table = [
        Entry(f"{ours}/norm", f"{layer}.pre_{kind}_layernorm.weight", "norm"),
        Entry(f"{ours}/post_norm", f"{layer}.post_{kind}_layernorm.weight", "norm"),
        Entry(f"{ours}/out", f"{layer}.{kind}.o_proj.weight", "embed (heads head_dim)"),
    ]
    for name, letter in PROJECTIONS.items():
        heads, width = ("heads", "embed") if name == "query" else ("kv_heads", source)
        theirs = f"{layer}.{kind}.{letter}_proj"
        table.append(Entry(f"{ours}/{name}", f"{theirs}.weight", f"({heads} head_dim) {width}"))
        if stack.qkv_bias:
            table.append(Entry(f"{ours}/{name}_bias", f"{theirs}.bias", f"({heads} head_dim)"))
    if stack.out_bias:
        table.append(Entry(f"{ours}/out_bias", f"{layer}.{kind}.o_proj.bias", "norm"))
    if stack.qk_norm:
        for name in ("query", "key"):
            theirs = f"{layer}.{kind}.{name[0]}_norm.weight"
            table.append(Entry(f"{ours}/{name}_norm", theirs, "head_norm"))
    return table


def ignored(cfg: config.Model) -> tuple[str, ...]:
    """Buffers of old files."""
    return ("*.rotary_emb.inv_freq",)


def duplicates(cfg: config.Model) -> dict[str, str]:
    """A head that repeats the decoder's table."""
    tied = cfg.tied and cfg.decoder is not None
    return {"lm_head.out_proj.weight": "model.decoder.embed_tokens.weight"} if tied else {}


def config_json(cfg: config.Model) -> dict:
    """config.json of cfg; raises ValueError, naming the field, for a value that no T5Gemma has."""
    if cfg.encoder is None:
        raise ValueError("T5Gemma cannot express a Model without an encoder")
    pair = cfg.decoder is not None
    wanted = dict(scale_logits=False, scale_embedding=True, separate_embeddings=pair, eoi=None)
    fields.require_values(cfg, "T5Gemma", logits_bias=False, **wanted)
    towers = {"encoder": tower_config(cfg, cfg.encoder) | {"is_decoder": False}}
    if pair:
        crossed = {"cross_attention_hidden_size": cfg.encoder.embed, "is_decoder": True}
        towers["decoder"] = tower_config(cfg, cfg.decoder) | crossed
    return towers | {
        "model_type": "t5gemma",
        "architectures": ["T5GemmaForConditionalGeneration" if pair else "T5GemmaEncoderModel"],
        "is_encoder_decoder": pair,
        "tie_word_embeddings": cfg.tied,
        "vocab_size": cfg.vocab,
        "dropout_rate": cfg.dropout,
        "bos_token_id": cfg.decoder_start_token_id,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def tower_config(cfg: config.Model, stack: config.Stack) -> dict:
    """One tower as transformers' T5GemmaModuleConfig."""
    fields.require_values(stack, "T5Gemma", qk_norm=False, merged=False, rotary_scaling=None)
    fields.require_values(stack, "T5Gemma", sliding_rotary_base=(None, stack.rotary_base))
    fields.require_values(stack, "T5Gemma", window_form=("below", "within"))
    base = {"rope_type": "default", "rope_theta": stack.rotary_base}
    return shared_tower_config(cfg, stack, "T5Gemma") | {
        "model_type": "t5_gemma_module",
        "rope_parameters": base,
        "attn_logit_softcapping": stack.softcap,
    }


def shared_tower_config(cfg: config.Model, stack: config.Stack, family: str) -> dict:
    """Fields of one tower that T5Gemma 1 and 2 write alike.

    Args:
      cfg: config of the model.
      stack: config of the tower.
      family: name of the family, for messages.
    """
    fields.require_values(stack, family, **{**GEMMA_STACK, "activation": ("gelu", "silu", "relu")})
    fields.require_values(stack, family, out_bias=stack.qkv_bias)
    activation = {"gelu": "gelu_pytorch_tanh"}.get(stack.activation, stack.activation)
    return {
        "vocab_size": cfg.vocab,
        "hidden_size": stack.embed,
        "intermediate_size": stack.mlp,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": stack.heads,
        "num_key_value_heads": stack.key_heads,
        "head_dim": stack.head_dim,
        "hidden_activation": activation,
        "rms_norm_eps": stack.norm_epsilon,
        "attention_bias": stack.qkv_bias,
        "query_pre_attn_scalar": fields.pre_attention_scalar(stack, family),
        # transformers wants a window even where no layer slides.
        "sliding_window": stack.window or 4096,
        "layer_types": fields.list_layer_types(stack),
        "final_logit_softcapping": cfg.logits_softcap,
        "bos_token_id": cfg.decoder_start_token_id,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
