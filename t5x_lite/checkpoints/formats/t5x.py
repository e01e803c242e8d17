# SPDX-License-Identifier: Apache-2.0
"""T5X's names of weights: examples/t5 and decoder_only, and scalable_t5 with stacked layers.

  per layer   encoder/layers_0/attention/query/kernel [embed, heads * head_dim]; one relpos_bias for
              each tower
  scanned     encoder/encoder/attention/query/kernel [embed, layers, heads, head_dim]; relpos_bias
              in every layer. Where our model has one for all layers it is repeated in each.

scalable_t5 with scan_layers = False is per layer with scanned's biases and shapes.
"""

import re
from collections.abc import Mapping

import numpy as np

from t5x_lite import config
from t5x_lite.checkpoints.formats.huggingface import t5
from t5x_lite.checkpoints.formats.huggingface.fields import (
    require_usual_causality,
    require_values,
)
from t5x_lite.checkpoints.transforms import Entry
from t5x_lite.config import gin_file
from t5x_lite.tokenizers.errors import SourceError
from t5x_lite.utils.not_none import not_none

Names = Mapping[str, tuple[tuple[int, ...], np.dtype]]

# Fields of every T5, and those that T5X fixes in its code.
T5X_STACK = t5.T5_STACK | dict(norm_epsilon=1e-6, buckets=32, max_distance=128)
NORMS = {
    ("encoder", "attention"): "pre_attention_layer_norm",
    ("decoder", "attention"): "pre_self_attention_layer_norm",
    ("decoder", "cross_attention"): "pre_cross_attention_layer_norm",
}
ATTENTIONS = {
    ("encoder", "attention"): "attention",
    ("decoder", "attention"): "self_attention",
    ("decoder", "cross_attention"): "encoder_decoder_attention",
}


def check_expressible(cfg: config.Model) -> None:
    """Raises ValueError, naming the field, if T5X's T5 cannot express cfg."""
    require_values(
        cfg, "T5X", logits_softcap=None, scale_embedding=False, separate_embeddings=False
    )
    require_values(cfg, "T5X", eoi=None, logits_bias=False)
    require_usual_causality(cfg, "T5X")
    require_values(cfg, "T5X", scale_logits=cfg.tied and cfg.decoder is not None)
    if cfg.decoder is None:
        raise ValueError("T5X's T5 has a decoder; this Model lacks one: export to Hugging Face")
    for stack in filter(None, (cfg.encoder, cfg.decoder)):
        require_values(stack, "T5X", **T5X_STACK)
        require_values(stack, "T5X", kv_heads=(None, stack.heads))


def is_scanned(names: Names) -> bool:
    """True if a checkpoint with these names has its layers stacked."""
    return any(re.match(r"(encoder|decoder)/\1/", name) for name in names)


def has_separate_heads(names: Names) -> bool:
    """True if kernels of attention have heads and head_dim as two axes."""
    ranks = {
        len(shape) - name.startswith(("encoder/encoder/", "decoder/decoder/"))
        for name, (shape, _) in names.items()
        if name.endswith("/query/kernel")
    }
    return ranks == {3}


def t5x_entries(cfg: config.Model, scan: bool, separate: bool) -> list[Entry]:
    """Table of a T5X checkpoint.

    Args:
      cfg: config of the model.
      scan: layers are stacked.
      separate: heads and head_dim are two axes.
    """
    embedder = "token_embedder" if cfg.encoder else "decoder/token_embedder"
    table = [Entry("embedding", f"{embedder}/embedding", "vocab embed")]
    if not cfg.tied:
        table.append(Entry("head", "decoder/logits_dense/kernel", "embed vocab"))
    for tower in ("encoder", "decoder"):
        stack = getattr(cfg, tower)
        if stack is not None:
            cross = tower == "decoder" and cfg.encoder is not None
            table += tower_entries(tower, stack, cross, scan, separate)
    return table


def tower_entries(
    tower: str, stack: config.Stack, cross: bool, scan: bool, separate: bool
) -> list[Entry]:
    """Entries of one tower.

    Args:
      tower: "encoder" or "decoder".
      stack: its config.
      cross: it has cross-attention.
      scan: layers are stacked.
      separate: heads and head_dim are two axes.
    """
    block = f"{tower}/{tower}" if scan else f"{tower}/layers_{{layer}}"
    layers = f"{tower}/layers"
    table = [Entry(f"{tower}/norm", f"{tower}/{tower}_norm/scale", "norm")]
    table.append(bias_entry(tower, stack, block, scan))
    for kind in ("attention", "cross_attention") if cross else ("attention",):
        theirs = f"{block}/{ATTENTIONS[tower, kind]}"
        norm = f"{block}/{NORMS[tower, kind]}/scale"
        table.append(Entry(f"{layers}/{kind}/norm", norm, with_layers("norm", scan)))
        source = "encoder_embed" if kind == "cross_attention" else "embed"
        for name, (before, heads, after) in {
            "query": ("embed", "heads head_dim", ""),
            "key": (source, "kv_heads head_dim", ""),
            "value": (source, "kv_heads head_dim", ""),
            "out": ("", "heads head_dim", "embed"),
        }.items():
            joined = heads if separate else f"({heads})"
            axes = with_layers(f"{before} {joined} {after}".strip(), scan)
            table.append(Entry(f"{layers}/{kind}/{name}", f"{theirs}/{name}/kernel", axes))
    parts = {"gate": "wi_0", "up": "wi_1"} if stack.gated else {"gate": "wi"}
    norm = f"{block}/pre_mlp_layer_norm/scale"
    table.append(Entry(f"{layers}/mlp/norm", norm, with_layers("norm", scan)))
    for ours, theirs in parts.items():
        axes = with_layers("embed mlp", scan)
        table.append(Entry(f"{layers}/mlp/{ours}", f"{block}/mlp/{theirs}/kernel", axes))
    axes = with_layers("mlp embed", scan)
    return [*table, Entry(f"{layers}/mlp/down", f"{block}/mlp/wo/kernel", axes)]


def with_layers(axes: str, scan: bool) -> str:
    """Axes with layers second, where a scan puts them (param_scan_axis = 1)."""
    if not scan:
        return axes
    first = not_none(re.match(r"\([^)]*\)|\S+", axes))[0]
    return f"{first} layers{axes[len(first) :]}"


def bias_entry(tower: str, stack: config.Stack, block: str, scan: bool) -> Entry:
    """Entry of a tower's relative position bias.

    Args:
      tower: "encoder" or "decoder".
      stack: its config.
      block: path of its layers.
      scan: layers are stacked.
    """
    ours = f"{tower}/layers/attention/bias" if stack.bias_per_layer else f"{tower}/bias"
    inside = scan or stack.bias_per_layer
    theirs = f"{block if inside else tower}/relpos_bias/rel_embedding"
    return Entry(ours, theirs, with_layers("heads buckets", scan))


def infer_model(names: Names) -> tuple[config.Model, str]:
    """The model that a checkpoint's shapes allow, and facts that they do not say and are assumed.

    Raises:
      SourceError: they are not the weights of a T5 by T5X.
    """
    try:
        towers = {
            tower: infer_stack(tower, names)
            for tower in ("encoder", "decoder")
            if any(name.startswith(f"{tower}/{tower}_norm") for name in names)
        }
        pair = "encoder" in towers
        embedder = "token_embedder" if pair else "decoder/token_embedder"
        vocab = names[f"{embedder}/embedding"][0][0]
        tied = "decoder/logits_dense/kernel" not in names
        cfg = config.Model(
            vocab=vocab,
            encoder=towers.get("encoder"),
            decoder=towers["decoder"],
            tied=tied,
            scale_logits=tied,
        )
    except (KeyError, IndexError, ZeroDivisionError, ValueError) as error:
        raise SourceError(
            f"The names and shapes are not those of a T5 by T5X ({error}): give its config with "
            "--model=FILE.gin"
        ) from error
    gated = {stack.gated for stack in towers.values()}
    assumed = " and ".join(sorted("gelu (gated)" if each else "relu (not gated)" for each in gated))
    return cfg, f"activation {assumed}, 32 buckets up to distance 128"


def infer_stack(tower: str, names: Names) -> config.Stack:
    """Config of a tower by its shapes."""
    scan = is_scanned(names)
    block = f"{tower}/{tower}" if scan else f"{tower}/layers_0"

    def shape(name: str) -> list[int]:
        return list(names[f"{block}/{name}"][0])

    query = shape(f"{ATTENTIONS[tower, 'attention']}/query/kernel")
    table = f"{block}/relpos_bias/rel_embedding"
    per_layer = table in names
    bias_shape = names[table if per_layer else f"{tower}/relpos_bias/rel_embedding"][0]
    heads = bias_shape[0]
    if scan:
        layers = query.pop(1)
    else:
        layers = len({n.split("/")[1] for n in names if n.startswith(f"{tower}/layers_")})
    gated = f"{block}/mlp/wi_0/kernel" in names
    return config.Stack(
        layers=layers,
        embed=query[0],
        heads=heads,
        head_dim=int(np.prod(query[1:])) // heads,
        mlp=shape(f"mlp/{'wi_0' if gated else 'wi'}/kernel")[-1],
        activation="gelu" if gated else "relu",
        gated=gated,
        bias_per_layer=per_layer,
    )


def entries_to_read(cfg: config.Model, names: Names) -> list[Entry]:
    """Table of a checkpoint with tensors of these names."""
    return t5x_entries(cfg, is_scanned(names), has_separate_heads(names))


def entries_to_write(cfg: config.Model, scan: bool) -> list[Entry]:
    """Table to export cfg with; raises ValueError, naming the field, if T5X cannot express it."""
    check_expressible(cfg)
    towers = filter(None, (cfg.encoder, cfg.decoder))
    # Biases in every layer are scalable_t5's, which keeps heads apart.
    return t5x_entries(cfg, scan, scan or any(stack.bias_per_layer for stack in towers))


def read_gin_model(path: str) -> config.Model:
    """The Model that a .gin file describes: a preset, or the config of a run."""
    lines = gin_file.read_lines(path)
    if not any("config.Run." in line.text for line in lines):
        bindings = ("config.Run.model_dir = 'none'", "config.Run.model = @config.Model()")
        lines += [gin_file.Line(binding, path) for binding in bindings]
    return gin_file.parse_lines(lines, []).model
