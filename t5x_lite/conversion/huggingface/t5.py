# SPDX-License-Identifier: Apache-2.0
"""T5 1.0 and 1.1, Flan-T5, mT5, umT5, ByT5, UL2 and lone T5 encoders, as Hugging Face names them.

Whether the head is tied is read off the file: transformers 5 writes tie_word_embeddings = true
for all of them. Whether logits are scaled stands in scale_decoder_outputs, and before transformers
5 in tie_word_embeddings. transformers 5.23 divides the logits of every umT5 by sqrt(d_model), also
of the released ones (tie_word_embeddings = false) that were trained without: here they are not.
"""

from collections.abc import Collection

from t5x_lite import config
from t5x_lite.conversion.huggingface import sentence_t5
from t5x_lite.conversion.huggingface.fields import demand, demand_same, one_of
from t5x_lite.conversion.tables import Entry

ACTIVATIONS = {"relu": "relu", "silu": "silu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
# What every T5 is, and what its config.json says once for both towers.
PLAIN = dict(
    norm="rms",
    post_norms=False,
    qk_norm=False,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    query_scale=1.0,
    softcap=None,
    merged=False,
    positions="relative",
    window=None,
)
SHARED = ("embed", "heads", "head_dim", "mlp", "activation", "gated", "norm_epsilon", "buckets")
SHARED += ("max_distance", "bias_per_layer")
# Our name of a projection -> theirs and how it lies.
PROJECTIONS = {
    "query": ("q", "(heads head_dim) embed"),
    "key": ("k", "(kv_heads head_dim) embed"),
    "value": ("v", "(kv_heads head_dim) embed"),
    "out": ("o", "embed (heads head_dim)"),
}

# Keys and values of cross-attention read the encoder's width.
CROSSED = "kv_heads head_dim) encoder_embed"


def model(config_json: dict, names: Collection[str]) -> config.Model:
    """The Model of a T5 with this config.json, whose files have tensors of these names."""
    stack = tower(config_json)
    pooling = sentence_t5.pooling(config_json)
    pair = pooling is None and any(name.startswith("decoder.") for name in names)
    layers = config_json.get("num_decoder_layers")
    decoder = stack | {"layers": stack["layers"] if layers is None else layers}
    return config.Model(
        vocab=config_json["vocab_size"],
        encoder=config.Stack(**stack),
        decoder=config.Stack(**decoder) if pair else None,
        tied=not pair or "lm_head.weight" not in names,
        scale_logits=pair and scaled(config_json),
        start=config_json.get("decoder_start_token_id") or 0,
        dropout=config_json.get("dropout_rate", 0.1),
        pooling=None if pair else pooling or config.Pooling(),
    )


def tower(config_json: dict) -> dict:
    """The fields of the encoder's Stack."""
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
    """Activation and whether it is gated: "gated-gelu", "relu", "gated-silu" ..."""
    default = "relu" if config_json["model_type"] == "t5" else "gated-gelu"
    kind = config_json.get("feed_forward_proj", default)
    gate, _, inner = kind.rpartition("-")
    if gate not in ("", "gated"):
        raise ValueError(f"config.json: feed_forward_proj = {kind!r} is not implemented")
    # "gated-gelu" means the tanh form; plain "gelu" is the exact one, which no T5 has.
    inner = "gelu_new" if kind == "gated-gelu" else inner
    activation = config_json.get("dense_act_fn", inner)
    activation = one_of({"dense_act_fn": activation}, "dense_act_fn", ACTIVATIONS)
    return activation, config_json.get("is_gated_act", gate == "gated")


def scaled(config_json: dict) -> bool:
    """Whether hidden states are multiplied by d_model ** -0.5 before the logits."""
    if config_json["model_type"] == "mt5":
        return False
    tied = config_json.get("tie_word_embeddings") is not False
    return config_json.get("scale_decoder_outputs", tied)


def entries(cfg: config.Model) -> list[Entry]:
    """Where every weight of a T5 lies."""
    table = [Entry("embedding", "shared.weight", "vocab embed")]
    if cfg.decoder is not None and not cfg.tied:
        table.append(Entry("head", "lm_head.weight", "vocab embed"))
    for name in ("encoder", "decoder"):
        stack = getattr(cfg, name)
        if stack is not None:
            table += tower_entries(name, stack, cross=name == "decoder")
    return table + sentence_t5.entries(cfg)


def tower_entries(name: str, stack: config.Stack, cross: bool) -> list[Entry]:
    block = f"{name}.block.{{layer}}.layer"
    table = [Entry(f"{name}/norm", f"{name}.final_layer_norm.weight", "norm")]
    table.append(bias_entry(name, stack))
    table += attention(f"{name}/layers/attention", f"{block}.0", "SelfAttention")
    if cross:
        crossed = attention(f"{name}/layers/cross_attention", f"{block}.1", "EncDecAttention")
        from_encoder = lambda axes: axes.replace("kv_heads head_dim) embed", CROSSED)
        table += [entry._replace(axes=from_encoder(entry.axes)) for entry in crossed]
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


def attention(ours: str, theirs: str, kind: str) -> list[Entry]:
    norm = Entry(f"{ours}/norm", f"{theirs}.layer_norm.weight", "norm")
    return [norm] + [
        Entry(f"{ours}/{name}", f"{theirs}.{kind}.{letter}.weight", axes)
        for name, (letter, axes) in PROJECTIONS.items()
    ]


def ignored(cfg: config.Model) -> tuple[str, ...]:
    """Tensors that mean nothing to cfg: a bias of cross-attention that old files carry, unused."""
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
    """config.json of cfg; ValueError names a field that no T5 has."""
    if cfg.encoder is None:
        raise ValueError("T5 cannot express a Model without an encoder")
    check(cfg)
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
        "decoder_start_token_id": cfg.start,
        "tie_word_embeddings": cfg.scale_logits,
        "scale_decoder_outputs": cfg.scale_logits,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def check(cfg: config.Model) -> None:
    """ValueError names the first field of cfg that no T5 has."""
    stacks = [stack for stack in (cfg.encoder, cfg.decoder) if stack is not None]
    plain = dict(logits_softcap=None, scale_embedding=False, separate_embeddings=False, eoi=None)
    demand(cfg, "T5", **plain)
    for stack in stacks:
        demand(stack, "T5", kv_heads=(None, stack.heads))
        demand(stack, "T5", **PLAIN)
    demand_same(stacks[0], stacks[-1], "T5", *SHARED)
