# SPDX-License-Identifier: Apache-2.0
"""T5 1.0 and 1.1, Flan-T5, mT5, umT5, ByT5, UL2 and encoders of T5, as Hugging Face names them.

Whether the head is tied is read off the file: transformers 5 writes tie_word_embeddings = true
for all of them. Whether logits are scaled stands in scale_decoder_outputs, and before transformers
5 in tie_word_embeddings. transformers 5.23 divides the logits of every umT5 by sqrt(d_model), also
of the released ones (tie_word_embeddings = false) that were trained without: here they are not.
"""

from collections.abc import Collection

from t5x_lite import config
from t5x_lite.checkpoints.formats.huggingface import sentence_t5
from t5x_lite.checkpoints.formats.huggingface.fields import (
    choose_value,
    require_equal,
    require_values,
)
from t5x_lite.checkpoints.transforms import Entry

ACTIVATIONS = {"relu": "relu", "silu": "silu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
# Fields of every T5, and fields that its config.json has once for both towers.
T5_STACK = dict(
    activation=("gelu", "relu", "silu"),
    norm="rms",
    norm_order="pre",
    embedding_norm=False,
    post_norms=False,
    qk_norm=False,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    query_scale=1.0,
    softcap=None,
    merged=False,
    positions="relative",
    bias_vectors=False,
    chunk=None,
    qkv_norm=False,
    output_norm=False,
    cross_rotary=False,
    window=None,
)
SHARED = ("embed", "heads", "head_dim", "mlp", "activation", "gated", "norm_epsilon", "buckets")
SHARED += ("max_distance", "bias_per_layer")
# Our name of a projection -> theirs and its axes.
PROJECTIONS = {
    "query": ("q", "(heads head_dim) embed"),
    "key": ("k", "(kv_heads head_dim) embed"),
    "value": ("v", "(kv_heads head_dim) embed"),
    "out": ("o", "embed (heads head_dim)"),
}

# Keys and values of cross-attention read the encoder's width.
CROSS_ATTENTION_AXES = "kv_heads head_dim) encoder_embed"


def parse_config(config_json: dict, names: Collection[str]) -> config.Model:
    """The Model of a T5 with this config.json, whose files have tensors of these names."""
    stack = tower_fields(config_json)
    readout = sentence_t5.parse_readout(config_json)
    pair = readout is None and any(name.startswith("decoder.") for name in names)
    layers = config_json.get("num_decoder_layers")
    decoder = stack | {"layers": stack["layers"] if layers is None else layers}
    return config.Model(
        vocab=config_json["vocab_size"],
        encoder=config.Stack(**stack),
        decoder=config.Stack(**decoder) if pair else None,
        tied=not pair or "lm_head.weight" not in names,
        scale_logits=pair and has_scaled_logits(config_json),
        decoder_start_token_id=config_json.get("decoder_start_token_id") or 0,
        dropout=config_json.get("dropout_rate", 0.1),
        readout=readout,
    )


def tower_fields(config_json: dict) -> dict:
    """Fields of the encoder's Stack."""
    inner, gated = feed_forward(config_json)
    return dict(
        layers=config_json["num_layers"],
        embed=config_json["d_model"],
        heads=config_json["num_heads"],
        head_dim=config_json["d_kv"],
        mlp=config_json["d_ff"],
        activation=inner,
        gated=gated,
        norm_epsilon=config_json.get("layer_norm_epsilon", 1e-6),
        buckets=config_json.get("relative_attention_num_buckets", 32),
        max_distance=config_json.get("relative_attention_max_distance", 128),
        bias_per_layer=config_json["model_type"] == "umt5",
    )


def feed_forward(config_json: dict) -> tuple[str, bool]:
    """Activation, and True if it is gated, of "gated-gelu", "relu", "gated-silu" ..."""
    default = "relu" if config_json["model_type"] == "t5" else "gated-gelu"
    kind = config_json.get("feed_forward_proj", default)
    gate, _, inner = kind.rpartition("-")
    if gate not in ("", "gated"):
        raise ValueError(f"config.json: feed_forward_proj = {kind!r} is not implemented")
    # "gated-gelu" means the tanh form; plain "gelu" is the exact one, which no T5 has.
    inner = "gelu_new" if kind == "gated-gelu" else inner
    activation = config_json.get("dense_act_fn", inner)
    activation = choose_value({"dense_act_fn": activation}, "dense_act_fn", ACTIVATIONS)
    return activation, config_json.get("is_gated_act", gate == "gated")


def has_scaled_logits(config_json: dict) -> bool:
    """True if hidden states are multiplied by d_model ** -0.5 before the logits."""
    if config_json["model_type"] == "mt5":
        return False
    tied = config_json.get("tie_word_embeddings") is not False
    return config_json.get("scale_decoder_outputs", tied)


def entries(cfg: config.Model) -> list[Entry]:
    """Table of a T5."""
    table = [Entry("embedding", "shared.weight", "vocab embed")]
    if cfg.decoder is not None and not cfg.tied:
        table.append(Entry("head", "lm_head.weight", "vocab embed"))
    for name in ("encoder", "decoder"):
        stack = getattr(cfg, name)
        if stack is not None:
            table += tower_entries(name, stack, cross=name == "decoder")
    return table + sentence_t5.entries(cfg)


def tower_entries(name: str, stack: config.Stack, cross: bool) -> list[Entry]:
    """Entries of one tower.

    Args:
      name: "encoder" or "decoder".
      stack: its config.
      cross: it has cross-attention.
    """
    block = f"{name}.block.{{layer}}.layer"
    table = [Entry(f"{name}/norm", f"{name}.final_layer_norm.weight", "norm")]
    table.append(bias_entry(name, stack))
    table += attention_entries(f"{name}/layers/attention", f"{block}.0", "SelfAttention")
    if cross:
        cross_entries = attention_entries(
            f"{name}/layers/cross_attention", f"{block}.1", "EncDecAttention"
        )
        for entry in cross_entries:
            axes = entry.axes.replace("kv_heads head_dim) embed", CROSS_ATTENTION_AXES)
            table.append(entry._replace(axes=axes))
    last = f"{block}.{2 if cross else 1}"
    table.append(Entry(f"{name}/layers/mlp/norm", f"{last}.layer_norm.weight", "norm"))
    parts = {"gate": "wi_0", "up": "wi_1"} if stack.gated else {"gate": "wi"}
    for ours, theirs in parts.items():
        theirs = f"{last}.DenseReluDense.{theirs}.weight"
        table.append(Entry(f"{name}/layers/mlp/{ours}", theirs, "mlp embed"))
    down = Entry(f"{name}/layers/mlp/down", f"{last}.DenseReluDense.wo.weight", "embed mlp")
    return [*table, down]


def bias_entry(name: str, stack: config.Stack) -> Entry:
    """The relative bias: in block 0 for all layers, or in each block (umT5)."""
    layer = "{layer}" if stack.bias_per_layer else "0"
    theirs = f"{name}.block.{layer}.layer.0.SelfAttention.relative_attention_bias.weight"
    ours = f"{name}/layers/attention/bias" if stack.bias_per_layer else f"{name}/bias"
    return Entry(ours, theirs, "buckets heads")


def attention_entries(ours: str, theirs: str, kind: str) -> list[Entry]:
    """Entries of one attention layer.

    Args:
      ours: its path.
      theirs: name of the sublayer that has it.
      kind: its name there, "SelfAttention" or "EncDecAttention".
    """
    norm = Entry(f"{ours}/norm", f"{theirs}.layer_norm.weight", "norm")
    return [norm] + [
        Entry(f"{ours}/{name}", f"{theirs}.{kind}.{letter}.weight", axes)
        for name, (letter, axes) in PROJECTIONS.items()
    ]


def ignored(cfg: config.Model) -> tuple[str, ...]:
    """Tensors that cfg does not use, such as a bias of cross-attention that old files carry."""
    if cfg.decoder is None:
        return ("decoder.*", "lm_head.weight")
    return ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


def duplicates(cfg: config.Model) -> dict[str, str]:
    """Copies of the embedding table that some files carry."""
    if cfg.decoder is None:
        return {"encoder.embed_tokens.weight": "shared.weight"}
    names = ["encoder.embed_tokens", "decoder.embed_tokens", *(["lm_head"] if cfg.tied else [])]
    return {f"{name}.weight": "shared.weight" for name in names}


def config_json(cfg: config.Model) -> dict:
    """config.json of cfg; raises ValueError, naming the field, for a value that no T5 has."""
    if cfg.encoder is None:
        raise ValueError("T5 cannot express a Model without an encoder")
    check_expressible(cfg)
    stack, decoder = cfg.encoder, cfg.decoder or cfg.encoder
    inner = "gelu_new" if stack.activation == "gelu" and not stack.gated else stack.activation
    pair = cfg.decoder is not None
    model_type = "umt5" if stack.bias_per_layer else "t5"
    suffix = "ForConditionalGeneration" if pair else "EncoderModel"
    return {
        "model_type": model_type,
        "architectures": [model_type.upper() + suffix],
        "is_encoder_decoder": pair,
        "vocab_size": cfg.vocab,
        "d_model": stack.embed,
        "d_kv": stack.head_dim,
        "d_ff": stack.mlp,
        "num_layers": stack.layers,
        "num_decoder_layers": decoder.layers,
        "num_heads": stack.heads,
        "relative_attention_num_buckets": stack.buckets,
        "relative_attention_max_distance": stack.max_distance,
        "feed_forward_proj": f"gated-{inner}" if stack.gated else inner,
        "layer_norm_epsilon": stack.norm_epsilon,
        "dropout_rate": cfg.dropout,
        "decoder_start_token_id": cfg.decoder_start_token_id,
        "tie_word_embeddings": cfg.scale_logits,
        "scale_decoder_outputs": cfg.scale_logits,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def check_expressible(cfg: config.Model) -> None:
    """Raises ValueError, naming the first field of cfg that no T5 has."""
    stacks = [stack for stack in (cfg.encoder, cfg.decoder) if stack is not None]
    plain = dict(logits_softcap=None, scale_embedding=False, separate_embeddings=False, eoi=None)
    require_values(cfg, "T5", logits_bias=False, **plain)
    for stack in stacks:
        require_values(stack, "T5", kv_heads=(None, stack.heads))
        require_values(stack, "T5", **T5_STACK)
    require_equal(stacks[0], stacks[-1], "T5", *SHARED)
    sentence_t5.check_expressible(cfg)
