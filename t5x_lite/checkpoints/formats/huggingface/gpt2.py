# SPDX-License-Identifier: Apache-2.0
"""GPT-2 as Hugging Face names it: queries, keys and values side by side, matrices lying in-out."""

from collections.abc import Collection

from t5x_lite import config
from t5x_lite.checkpoints.formats.huggingface import decoders, fields
from t5x_lite.checkpoints.transforms import Entry
from t5x_lite.utils.not_none import not_none

HEAD, TABLE = "lm_head.weight", "transformer.wte.weight"
# Fields that change what transformers computes, and the only values that are computed here.
KNOWN = {
    "scale_attn_by_inverse_layer_idx": (False, None),
    "reorder_and_upcast_attn": (False, None),
}


def parse_config(config_json: dict, names: Collection[str]) -> config.Model:
    """The Model of a GPT-2 with this config.json, whose files have tensors of these names.

    Raises:
      ValueError: a field is missing, or its value is not implemented.
    """
    decoders.refuse_unknown(config_json, KNOWN)
    width, heads = (decoders.require_count(config_json, name) for name in ("n_embd", "n_head"))
    if width % heads:
        raise ValueError(f"config.json: n_embd = {width} is not a multiple of n_head = {heads}")
    inner = config_json.get("n_inner") is not None
    scaled = config_json.get("scale_attn_weights", True)
    stack = config.Stack(
        layers=decoders.require_count(config_json, "n_layer"),
        embed=width,
        heads=heads,
        head_dim=width // heads,
        mlp=decoders.require_count(config_json, "n_inner") if inner else 4 * width,
        activation=fields.choose_value(
            config_json, "activation_function", decoders.ACTIVATIONS, "gelu_new"
        ),
        gated=False,
        norm="layer",
        norm_epsilon=config_json.get("layer_norm_epsilon", 1e-5),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        query_scale=(width // heads) ** -0.5 if scaled else 1.0,
        positions="learned",
        max_length=decoders.require_count(config_json, "n_positions"),
    )
    return config.Model(
        decoder=stack,
        tied=decoders.is_tied(config_json, names, default=True),
        dropout=config_json.get("resid_pdrop", 0.1),
        **decoders.model_fields(config_json),
    )


def canonical_name(name: str) -> str:
    """A tensor's name as `entries` has it: the released files leave out "transformer."."""
    outside = name.startswith(("h.", "wte.", "wpe.", "ln_f."))
    return "transformer." + name if outside else name


def entries(cfg: config.Model) -> list[Entry]:
    """Table of a GPT-2."""
    block, layers = "transformer.h.{layer}", "decoder/layers"
    table = [
        Entry("embedding", TABLE, "vocab embed"),
        Entry("decoder/positions", "transformer.wpe.weight", "positions embed"),
        *norm_entries("decoder/norm", "transformer.ln_f"),
        *norm_entries(f"{layers}/attention/norm", f"{block}.ln_1"),
        *norm_entries(f"{layers}/mlp/norm", f"{block}.ln_2"),
    ]
    if not cfg.tied:
        table.append(Entry("head", HEAD, "vocab embed"))
    for part, name in enumerate(("query", "key", "value")):
        heads = "heads" if name == "query" else "kv_heads"
        ours, theirs = f"{layers}/attention/{name}", f"{block}.attn.c_attn"
        axes = f"(parts {heads} head_dim)"
        table.append(Entry(ours, f"{theirs}.weight", f"embed {axes}", part))
        table.append(Entry(f"{ours}_bias", f"{theirs}.bias", axes, part))
    for ours, theirs, axes in (
        ("attention/out", "attn.c_proj", "(heads head_dim) embed"),
        ("mlp/gate", "mlp.c_fc", "embed mlp"),
        ("mlp/down", "mlp.c_proj", "mlp embed"),
    ):
        across = "mlp" if ours == "mlp/gate" else "norm"
        table.append(Entry(f"{layers}/{ours}", f"{block}.{theirs}.weight", axes))
        table.append(Entry(f"{layers}/{ours}_bias", f"{block}.{theirs}.bias", across))
    return table


def norm_entries(ours: str, theirs: str) -> list[Entry]:
    """A norm's scale and bias."""
    scale = Entry(ours, f"{theirs}.weight", "norm")
    return [scale, Entry(f"{ours}_bias", f"{theirs}.bias", "norm")]


def ignored(cfg: config.Model) -> tuple[str, ...]:
    """The causal masks that the released files carry as buffers."""
    return ("*.attn.bias", "*.attn.masked_bias")


def duplicates(cfg: config.Model) -> dict[str, str]:
    """A tied head, where the file has it."""
    return {HEAD: TABLE} if cfg.tied else {}


def config_json(cfg: config.Model) -> dict:
    """config.json of cfg; raises ValueError, naming the field, for a value that no GPT-2 has."""
    decoders.require_decoder_only(cfg, "gpt2")
    stack = not_none(cfg.decoder)
    if stack.max_length is None:
        raise ValueError(f"gpt2 cannot express Stack.positions = {stack.positions!r}")
    values = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": cfg.vocab,
        "n_positions": stack.max_length,
        "n_embd": stack.embed,
        "n_layer": stack.layers,
        "n_head": stack.heads,
        "n_inner": stack.mlp,
        "activation_function": "gelu_new" if stack.activation == "gelu" else stack.activation,
        "layer_norm_epsilon": stack.norm_epsilon,
        "initializer_range": cfg.embedding_std,
        "scale_attn_weights": stack.query_scale != 1.0,
        "resid_pdrop": cfg.dropout,
        "embd_pdrop": cfg.dropout,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": cfg.tied,
    }
    return decoders.check_round_trip(cfg, values | decoders.end_token_fields(cfg), parse_config)
