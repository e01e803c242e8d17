# SPDX-License-Identifier: Apache-2.0
"""BART, mBART, M2M100 (and NLLB), Marian and Pegasus, whose weights Hugging Face names alike.

They differ in the order of norms and in positions. `final_logits_bias` belongs to a model whose
file has it: transformers reads a file without it as one of zeros.
"""

import dataclasses
from collections.abc import Collection
from typing import Any, NamedTuple

from t5x_lite import config
from t5x_lite.checkpoints.formats.huggingface import decoders, fields
from t5x_lite.checkpoints.transforms import Entry
from t5x_lite.utils.not_none import not_none


class Kind(NamedTuple):
    """Facts about every model of a model_type.

    Attributes:
      stack: fields of both stacks.
      kind: beginning of the names of its classes in transformers.
      pad: id of padding; None where it is the first id of a decoder (Marian).
      eos: id that ends a text.
    """

    stack: dict[str, Any]
    kind: str
    pad: int | None = 1
    eos: int = 2


LEARNED = dict(positions="learned", position_offset=2, embedding_norm=True)
SINUSOIDAL = dict(positions="sinusoidal", sinusoids="vaswani")
FAIRSEQ = dict(positions="sinusoidal", sinusoids="tensor2tensor", position_offset=2)
KINDS = {
    "bart": Kind(LEARNED | dict(norm_order="post"), "BartForConditionalGeneration"),
    "mbart": Kind(LEARNED | dict(norm_order="pre"), "MBartForConditionalGeneration"),
    "m2m_100": Kind(FAIRSEQ | dict(norm_order="pre"), "M2M100ForConditionalGeneration"),
    "marian": Kind(SINUSOIDAL | dict(norm_order="post"), "MarianMTModel", None, 0),
    "pegasus": Kind(SINUSOIDAL | dict(norm_order="pre"), "PegasusForConditionalGeneration", 0, 1),
}
# Of transformers: "gelu" is the exact one in these families.
ACTIVATIONS = {
    "gelu": "gelu_exact",
    "relu": "relu",
    "swish": "silu",
    "silu": "silu",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
}
# Fields that change what transformers computes, and the only values that are computed here.
KNOWN = {"share_encoder_decoder_embeddings": (True, None), "quantization_config": (None,)}
TABLE, HEAD, BIAS = "model.shared.weight", "lm_head.weight", "final_logits_bias"
EMBEDDED = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
NORM_EPSILON = 1e-5
# Our name of a projection -> theirs.
PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
# Fields on which no logit depends.
NOT_COMPARED = ("dtype", "dropout", "embedding_std")


def parse_config(config_json: dict, names: Collection[str]) -> config.Model:
    """The Model of a checkpoint with this config.json, whose files have tensors of these names.

    Raises:
      ValueError: a field is missing, or its value is not implemented.
    """
    for name, known in KNOWN.items():
        fields.choose_value(config_json, name, dict.fromkeys(known), known[0])
    vocab = decoders.require_count(config_json, "vocab_size")
    fields.choose_value(config_json, "decoder_vocab_size", {vocab: vocab, None: vocab})
    kind = KINDS[config_json["model_type"]]
    start = config_json.get("decoder_start_token_id")
    return config.Model(
        vocab=vocab,
        encoder=parse_stack(config_json, "encoder", kind),
        decoder=parse_stack(config_json, "decoder", kind),
        tied=decoders.is_tied(config_json, names, default=True),
        logits_bias=BIAS in names and kind is not KINDS["m2m_100"],
        scale_embedding=config_json.get("scale_embedding", kind is KINDS["m2m_100"]),
        decoder_start_token_id=kind.eos if start is None else start,
        dropout=config_json.get("dropout", 0.1),
        embedding_std=config_json.get("init_std", 0.02),
    )


def parse_stack(config_json: dict, name: str, kind: Kind) -> config.Stack:
    """One stack.

    Args:
      config_json: the file.
      name: "encoder" or "decoder".
      kind: what the model_type says.

    Raises:
      ValueError: a field is missing, or its value is not implemented.
    """
    width = decoders.require_count(config_json, "d_model")
    heads = decoders.require_count(config_json, f"{name}_attention_heads")
    if width % heads:
        raise ValueError(
            f"config.json: d_model = {width} is not a multiple of {name}_attention_heads = {heads}"
        )
    stack = dict(kind.stack)
    if stack["positions"] == "learned":
        stack["max_length"] = decoders.require_count(config_json, "max_position_embeddings")
    elif kind is KINDS["m2m_100"]:
        pad = config_json.get("pad_token_id")
        stack["position_offset"] = 1 + (1 if pad is None else pad)
    default = "relu" if kind is KINDS["m2m_100"] else "gelu"
    return config.Stack(
        layers=decoders.require_count(config_json, f"{name}_layers"),
        embed=width,
        heads=heads,
        head_dim=width // heads,
        mlp=decoders.require_count(config_json, f"{name}_ffn_dim"),
        activation=fields.choose_value(config_json, "activation_function", ACTIVATIONS, default),
        gated=False,
        norm="layer",
        norm_epsilon=NORM_EPSILON,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        query_scale=(width // heads) ** -0.5,
        **stack,
    )


def canonical_name(name: str) -> str:
    """A tensor's name as `entries` has it: files of a bare model leave out "model."."""
    outside = name.startswith(("shared.", "encoder.", "decoder."))
    return "model." + name if outside else name


def entries(cfg: config.Model) -> list[Entry]:
    """Table of the weights of all these families."""
    table = [Entry("embedding", TABLE, "vocab embed")]
    if not cfg.tied:
        table.append(Entry("head", HEAD, "vocab embed"))
    if cfg.logits_bias:
        table.append(Entry("logits_bias", BIAS, "() vocab"))
    for name in ("encoder", "decoder"):
        table += stack_entries(name, not_none(getattr(cfg, name)))
    return table


def stack_entries(name: str, stack: config.Stack) -> list[Entry]:
    """Entries of one stack.

    Args:
      name: "encoder" or "decoder".
      stack: its config.
    """
    theirs, ours = f"model.{name}", f"{name}/layers"
    table = []
    if stack.positions == "learned":
        places = "positions embed"
        table.append(Entry(f"{name}/positions", f"{theirs}.embed_positions.weight", places))
    if stack.embedding_norm:
        table += vector_entries(f"{name}/embedding_norm", f"{theirs}.layernorm_embedding")
    if stack.norm_order == "pre":
        table += vector_entries(f"{name}/norm", f"{theirs}.layer_norm")
    layer = f"{theirs}.layers.{{layer}}"
    sublayers = {"attention": "self_attn", "cross_attention": "encoder_attn", "mlp": "final"}
    if name == "encoder":
        del sublayers["cross_attention"]
    for sublayer, prefix in sublayers.items():
        # A post-norm layer owns the norms; otherwise the sublayer does.
        norm = f"{sublayer}_norm" if stack.norm_order == "post" else f"{sublayer}/norm"
        table += vector_entries(f"{ours}/{norm}", f"{layer}.{prefix}_layer_norm")
        if sublayer != "mlp":
            source = "encoder_embed" if sublayer == "cross_attention" else "embed"
            table += attention_entries(f"{ours}/{sublayer}", f"{layer}.{prefix}", source)
    for part, linear, axes in (("gate", "fc1", "mlp embed"), ("down", "fc2", "embed mlp")):
        table.append(Entry(f"{ours}/mlp/{part}", f"{layer}.{linear}.weight", axes))
        across = "mlp" if part == "gate" else "norm"
        table.append(Entry(f"{ours}/mlp/{part}_bias", f"{layer}.{linear}.bias", across))
    return table


def vector_entries(ours: str, theirs: str) -> list[Entry]:
    """A norm's scale and bias."""
    scale = Entry(ours, f"{theirs}.weight", "norm")
    return [scale, Entry(f"{ours}_bias", f"{theirs}.bias", "norm")]


def attention_entries(ours: str, theirs: str, source: str) -> list[Entry]:
    """The four projections of an attention layer, with biases.

    Args:
      ours: its path.
      theirs: its name there.
      source: axis of what keys and values read.
    """
    table = []
    for name, projection in PROJECTIONS.items():
        heads = "heads head_dim" if name in ("query", "out") else "kv_heads head_dim"
        axes = f"({heads}) {'embed' if name == 'query' else source}"
        weight, bias = f"{theirs}.{projection}.weight", f"{theirs}.{projection}.bias"
        axes = f"embed ({heads})" if name == "out" else axes
        table.append(Entry(f"{ours}/{name}", weight, axes))
        table.append(Entry(f"{ours}/{name}_bias", bias, "norm" if name == "out" else f"({heads})"))
    return table


def ignored(cfg: config.Model) -> tuple[str, ...]:
    """Tensors that are computed here (sinusoidal positions), and versions in the oldest files."""
    versions = ("model.encoder.version", "model.decoder.version")
    if not_none(cfg.encoder).positions == "learned":
        return versions
    return (*versions, "model.*coder.embed_positions.weight*")


def duplicates(cfg: config.Model) -> dict[str, str]:
    """Copies of the embedding table that some files carry."""
    return dict.fromkeys((*EMBEDDED, *([HEAD] if cfg.tied else [])), TABLE)


def config_json(cfg: config.Model) -> dict:
    """config.json of cfg; raises ValueError, naming the field, for a value that no family has."""
    encoder, decoder = cfg.encoder, cfg.decoder
    if encoder is None or decoder is None:
        raise ValueError("bart cannot express a Model that is not an encoder-decoder")
    model_type = choose_model_type(encoder)
    # transformers 5 reads an untied file as one with three tables of embeddings.
    fields.require_values(cfg, model_type, tied=True)
    kind = KINDS[model_type]
    pad = cfg.decoder_start_token_id if kind.pad is None else kind.pad
    if model_type == "m2m_100":
        pad = encoder.position_offset - 1
    names = {activation: name for name, activation in reversed(ACTIVATIONS.items())}
    values = {
        "model_type": model_type,
        "architectures": [kind.kind],
        "is_encoder_decoder": True,
        "vocab_size": cfg.vocab,
        "d_model": encoder.embed,
        "activation_function": names[encoder.activation],
        "scale_embedding": cfg.scale_embedding,
        # transformers knows them by the family; CTranslate2 reads them.
        "normalize_before": encoder.norm_order == "pre",
        "normalize_embedding": encoder.embedding_norm,
        "decoder_start_token_id": cfg.decoder_start_token_id,
        "dropout": cfg.dropout,
        "init_std": cfg.embedding_std,
        "tie_word_embeddings": cfg.tied,
        "pad_token_id": pad,
        "eos_token_id": kind.eos,
        # None forces no last token: a text may be cut off.
        "forced_eos_token_id": None,
    }
    for name, stack in (("encoder", encoder), ("decoder", decoder)):
        values |= {
            f"{name}_layers": stack.layers,
            f"{name}_attention_heads": stack.heads,
            f"{name}_ffn_dim": stack.mlp,
        }
    if encoder.max_length is not None:
        values["max_position_embeddings"] = encoder.max_length
    if model_type == "mbart":
        # Without it CTranslate2 takes the model for an mBART-25, which begins with a language.
        values["tokenizer_class"] = "MBart50Tokenizer"
    check_round_trip(cfg, values)
    return values


def choose_model_type(stack: config.Stack) -> str:
    """The family whose norms and positions a stack has.

    Raises:
      ValueError: there is none.
    """
    for model_type, kind in KINDS.items():
        names = [name for name in kind.stack if name != "position_offset"]
        if all(getattr(stack, name) == kind.stack[name] for name in names):
            return model_type
    raise ValueError(
        f"bart, mbart, m2m_100, marian and pegasus cannot express Stack.norm_order = "
        f"{stack.norm_order!r} with Stack.positions = {stack.positions!r} and "
        f"Stack.embedding_norm = {stack.embedding_norm!r}"
    )


def check_round_trip(cfg: config.Model, values: dict) -> None:
    """Checks that an exported config.json, read again, is a Model with the same logits.

    Args:
      cfg: config of the model that is exported.
      values: the file.

    Raises:
      ValueError: it is another model; names the fields that the family cannot express.
    """
    names = [BIAS] if cfg.logits_bias else []
    reread = parse_config(values, names)
    lost = [
        f"{kind} = {value!r}"
        for one, other, kind in (
            (cfg, reread, "Model"),
            (cfg.encoder, reread.encoder, "Stack"),
            (cfg.decoder, reread.decoder, "Stack"),
        )
        for kind, value in differences(one, other, kind)
    ]
    if lost:
        raise ValueError(
            f"{values['model_type']} cannot express {', '.join(dict.fromkeys(lost))}; choose "
            "another family to export to"
        )


def differences(one: Any, other: Any, kind: str) -> list[tuple[str, Any]]:
    """Fields on which logits depend and in which two configs differ, with the values of the first.

    Args:
      one: a Model or a Stack.
      other: another one.
      kind: name of their class, for the names of the fields.
    """
    stacks, idle = ("encoder", "decoder", "kv_heads"), ("bias_std", "buckets", "max_distance")
    skipped = (
        *stacks,
        *idle,
        "rotary_base",
        "bias_per_layer",
        "random_positions",
        "add_bos",
        *NOT_COMPARED,
    )
    pairs = [
        (f"{kind}.{field.name}", getattr(one, field.name), getattr(other, field.name))
        for field in dataclasses.fields(one)
        if field.name not in skipped
    ]
    if isinstance(one, config.Stack):
        pairs.append(("Stack.kv_heads", one.key_heads, other.key_heads))
    return [(name, mine) for name, mine, theirs in pairs if not decoders.nearly_equal(mine, theirs)]
