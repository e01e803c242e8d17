# SPDX-License-Identifier: Apache-2.0
"""T5Gemma (Gemma 2 blocks), and lone encoders of it, as Hugging Face names them.

The encoder's window is |q - k| < sliding_window: so the checkpoints were trained (DeepMind's Flax
code, and transformers 4), though transformers 5.23 computes |q - k| <= sliding_window.
"""

from collections.abc import Collection

from t5x_lite import config
from t5x_lite.conversion.huggingface import fields
from t5x_lite.conversion.tables import Entry

# What transformers takes where config.json is silent.
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
# What every layer of the Gemma 2 and Gemma 3 kind is.
GEMMA = dict(
    norm="rms_plus_one",
    post_norms=True,
    gated=True,
    activation="gelu",
    mlp_bias=False,
    positions="rotary",
)
PROJECTIONS = {"query": "q", "key": "k", "value": "v"}


def model(config_json: dict, names: Collection[str]) -> config.Model:
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
        encoder=config.Stack(**tower(encoder)),
        decoder=config.Stack(**tower(decoder)) if pair else None,
        tied=not pair or (tied and "lm_head.out_proj.weight" not in names),
        logits_softcap=decoder["final_logit_softcapping"] if pair else None,
        scale_embedding=True,
        separate_embeddings=pair,
        start=top["bos_token_id"],
        dropout=config_json.get("dropout_rate", 0.0),
        pooling=None if pair else config.Pooling(),
    )


def tower(said: dict) -> dict:
    """The fields of the Stack that one of config.json's two halves describes."""
    pattern = fields.repeated(said["layer_types"] or alternating(said["num_hidden_layers"], 2))
    return gemma_layers(said) | dict(
        softcap=said["attn_logit_softcapping"],
        rotary_base=rotary_base(said),
        pattern=pattern,
        window=said["sliding_window"] if "sliding" in pattern else None,
    )


def gemma_layers(said: dict) -> dict:
    """The fields of a Stack that T5Gemma 1 and 2 say alike."""
    activations = {"gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "silu": "silu", "relu": "relu"}
    biased = said["attention_bias"]
    return GEMMA | dict(
        layers=said["num_hidden_layers"],
        embed=said["hidden_size"],
        heads=said["num_attention_heads"],
        head_dim=said["head_dim"],
        mlp=said["intermediate_size"],
        kv_heads=said["num_key_value_heads"],
        activation=fields.one_of(said, "hidden_activation", activations),
        norm_epsilon=said["rms_norm_eps"],
        qkv_bias=biased,
        out_bias=biased,
        query_scale=said["query_pre_attn_scalar"] ** -0.5,
    )


def alternating(layers: int, every: int) -> list[str]:
    """layer_types where config.json has none: the last of every so many layers is full."""
    return [
        "sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)
    ]


def rotary_base(said: dict) -> float:
    """The one rotary base of all layers; ValueError if positions are stretched."""
    turned = said.get("rope_parameters") or said.get("rope_scaling") or {}
    kind = turned.get("rope_type", turned.get("type", "default"))
    fields.one_of({"rope_type": kind}, "rope_type", {"default": None})
    return float(turned.get("rope_theta", said.get("rope_theta", 10000.0)))


def entries(cfg: config.Model) -> list[Entry]:
    """Where every weight of a T5Gemma lies."""
    if cfg.decoder is None:
        table = [Entry("embedding", "encoder.embed_tokens.weight", "vocab embed")]
        return table + tower_entries("encoder", "encoder", cfg.encoder)
    table = [
        Entry("embedding", "model.decoder.embed_tokens.weight", "vocab embed"),
        Entry("encoder_embedding", "model.encoder.embed_tokens.weight", "vocab encoder_embed"),
    ]
    if not cfg.tied:
        table.append(Entry("head", "lm_head.out_proj.weight", "vocab embed"))
    table += tower_entries("encoder", "model.encoder", cfg.encoder)
    table += tower_entries("decoder", "model.decoder", cfg.decoder)
    layer = "model.decoder.layers.{layer}"
    crossed = "decoder/layers/cross_attention"
    return table + attention(crossed, layer, "cross_attn", cfg.decoder, source="encoder_embed")


def tower_entries(ours: str, theirs: str, stack: config.Stack) -> list[Entry]:
    """A tower's own norm, and its layers without cross-attention."""
    layer = f"{theirs}.layers.{{layer}}"
    mlp = f"{ours}/layers/mlp"
    return [
        Entry(f"{ours}/norm", f"{theirs}.norm.weight", "norm"),
        *attention(f"{ours}/layers/attention", layer, "self_attn", stack),
        Entry(f"{mlp}/norm", f"{layer}.pre_feedforward_layernorm.weight", "norm"),
        Entry(f"{mlp}/post_norm", f"{layer}.post_feedforward_layernorm.weight", "norm"),
        Entry(f"{mlp}/gate", f"{layer}.mlp.gate_proj.weight", "mlp embed"),
        Entry(f"{mlp}/up", f"{layer}.mlp.up_proj.weight", "mlp embed"),
        Entry(f"{mlp}/down", f"{layer}.mlp.down_proj.weight", "embed mlp"),
    ]


def attention(
    ours: str, layer: str, kind: str, stack: config.Stack, source: str = "embed"
) -> list[Entry]:
    """One attention layer and its two norms; keys and values read the width named `source`."""
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
    """Buffers that old files carry."""
    return ("*.rotary_emb.inv_freq",)


def duplicates(cfg: config.Model) -> dict[str, str]:
    """A head that repeats the decoder's table."""
    tied = cfg.tied and cfg.decoder is not None
    return {"lm_head.out_proj.weight": "model.decoder.embed_tokens.weight"} if tied else {}


def config_json(cfg: config.Model) -> dict:
    """config.json of cfg; ValueError names a field that no T5Gemma has."""
    if cfg.encoder is None:
        raise ValueError("T5Gemma cannot express a Model without an encoder")
    pair = cfg.decoder is not None
    wanted = dict(scale_logits=False, scale_embedding=True, separate_embeddings=pair, eoi=None)
    fields.demand(cfg, "T5Gemma", **wanted)
    halves = {"encoder": half(cfg, cfg.encoder) | {"is_decoder": False}}
    if pair:
        crossed = {"cross_attention_hidden_size": cfg.encoder.embed, "is_decoder": True}
        halves["decoder"] = half(cfg, cfg.decoder) | crossed
    return halves | {
        "model_type": "t5gemma",
        "architectures": ["T5GemmaForConditionalGeneration" if pair else "T5GemmaEncoderModel"],
        "is_encoder_decoder": pair,
        "tie_word_embeddings": cfg.tied,
        "vocab_size": cfg.vocab,
        "dropout_rate": cfg.dropout,
        "bos_token_id": cfg.start,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def half(cfg: config.Model, stack: config.Stack) -> dict:
    """One tower as transformers' T5GemmaModuleConfig."""
    fields.demand(stack, "T5Gemma", qk_norm=False, merged=False, rotary_scaling=None)
    fields.demand(stack, "T5Gemma", sliding_rotary_base=(None, stack.rotary_base))
    fields.demand(stack, "T5Gemma", window_form=("below", "within"))
    base = {"rope_type": "default", "rope_theta": stack.rotary_base}
    return gemma_half(cfg, stack, "T5Gemma") | {
        "model_type": "t5_gemma_module",
        "rope_parameters": base,
        "attn_logit_softcapping": stack.softcap,
    }


def gemma_half(cfg: config.Model, stack: config.Stack, family: str) -> dict:
    """The fields of one tower that T5Gemma 1 and 2 say alike."""
    fields.demand(stack, family, **{**GEMMA, "activation": ("gelu", "silu", "relu")})
    fields.demand(stack, family, out_bias=stack.qkv_bias)
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
        "layer_types": fields.layer_types(stack),
        "final_logit_softcapping": cfg.logits_softcap,
        "bos_token_id": cfg.start,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
