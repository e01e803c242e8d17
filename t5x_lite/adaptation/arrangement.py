# SPDX-License-Identifier: Apache-2.0
"""Towers of a checkpoint matched to the towers of an adapted model, with their differences."""

from typing import NamedTuple

from t5x_lite import config

# Fields that decide shapes or the meaning of weights: a copied tower agrees in all of them.
SHAPE = (
    "layers",
    "embed",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp",
    "activation",
    "gated",
    "norm",
    "norm_order",
    "embedding_norm",
    "post_norms",
    "qk_norm",
    "qkv_bias",
    "out_bias",
    "mlp_bias",
    "positions",
    "position_offset",
    "bias_per_layer",
    "bias_vectors",
)
# Fields that change what the same weights compute, which training can compensate: a warning names
# them. `sliding` is derived from `pattern`.
VALUES = {
    name: name
    for name in (
        "norm_epsilon",
        "query_scale",
        "softcap",
        "rotary_base",
        "rotary_scaling",
        "rotary_span",
        "interpolation",
        "segment_length",
        "chunk",
        "qkv_norm",
        "output_norm",
        "cross_rotary",
        "sinusoids",
        "window",
        "sliding_rotary_base",
    )
} | {"sliding": "pattern"}
READING = ("scale_embedding", "eoi")
WRITING = ("scale_logits", "logits_softcap")


class Side(NamedTuple):
    """A tower of a checkpoint.

    Attributes:
      source: the field of Adaptation that names the checkpoint: "source" or "encoder_source".
      model: model of the checkpoint.
      tower: "encoder" or "decoder".
    """

    source: str
    model: config.Model
    tower: str

    @property
    def stack(self) -> config.Stack:
        """Config of the tower."""
        return getattr(self.model, self.tower)

    @property
    def both_sides(self) -> bool:
        """True if attention is bidirectional."""
        return self.tower == "encoder" or not self.model.causal_decoder

    @property
    def table(self) -> str:
        """Path of the tower's token embedding."""
        separate = self.tower == "encoder" and self.model.separate_embeddings
        return "encoder_embedding" if separate else "embedding"

    @property
    def crosses(self) -> bool:
        """True if the tower has layers of cross-attention."""
        lone = self.model.layout != "encoder_decoder" or self.tower == "encoder"
        return not lone and not self.stack.merged


Sides = dict[str, Side]


def match_towers(
    cfg: config.Model,
    adaptation: config.Adaptation,
    source: config.Model,
    other: config.Model | None,
) -> Sides:
    """Matches each tower of cfg to the tower of a checkpoint that it is copied from.

    Args:
      cfg: config of the adapted model.
      adaptation: config of the adaptation.
      source: model of Adaptation.source.
      other: model of Adaptation.encoder_source; None without one.

    Raises:
      ValueError: Adaptation names a tower that does not exist or is unused, or a tower that cannot
        become the other; the message has both values.
    """
    sides: Sides = {}
    if cfg.decoder is not None and adaptation.decoder_from is not None:
        sides["decoder"] = Side("source", source, adaptation.decoder_from)
    if cfg.encoder is not None:
        name = "source" if other is None else "encoder_source"
        model = source if other is None else other
        tower = adaptation.encoder_from or ("decoder" if model.encoder is None else "encoder")
        sides["encoder"] = Side(name, model, tower)
    check_encoder_options(cfg, adaptation)
    if cfg.decoder is not None and adaptation.decoder_from is None:
        check_new_decoder(cfg, adaptation)
    for name, side in sides.items():
        check_tower(name, getattr(cfg, name), side)
    return sides


def check_encoder_options(cfg: config.Model, adaptation: config.Adaptation) -> None:
    """Raises ValueError if Adaptation configures a tower that the model lacks."""
    for field in ("encoder_source", "encoder_from"):
        config.require(
            cfg.encoder is not None or getattr(adaptation, field) is None,
            f"Adaptation.{field} is {getattr(adaptation, field)!r}, but the model has no encoder: "
            "leave it out, or bind Model.encoder",
        )
    config.require(
        cfg.decoder is not None or adaptation.encoder_source is None,
        f"The model is an encoder alone, so that nothing of Adaptation.source "
        f"({adaptation.source}) would be used: bind Adaptation.source = "
        f"{adaptation.encoder_source!r} and no encoder_source",
    )


def check_new_decoder(cfg: config.Model, adaptation: config.Adaptation) -> None:
    """Raises ValueError if nothing of Adaptation.source would be used beside a new decoder."""
    config.require(
        cfg.encoder is not None,
        "Adaptation.decoder_from is None, but the model has no encoder: nothing would be copied",
    )
    config.require(
        adaptation.encoder_source is None,
        f"Adaptation.decoder_from is None, so that nothing of Adaptation.source "
        f"({adaptation.source}) would be used: bind Adaptation.source = "
        f"{adaptation.encoder_source!r} and no encoder_source",
    )


def check_tower(name: str, wanted: config.Stack, side: Side) -> None:
    """Raises ValueError unless a checkpoint's tower can become the model's.

    Args:
      name: tower of the model: "encoder" or "decoder".
      wanted: config of that tower.
      side: tower of the checkpoint.
    """
    config.require(
        getattr(side.model, side.tower) is not None,
        f"Adaptation.{name}_from is {side.tower!r}, but Adaptation.{side.source} has no "
        f"{side.tower}: it is {side.model.layout}",
    )
    there = side.stack

    def value(stack: config.Stack, field: str) -> object:
        return stack.key_heads if field == "kv_heads" else getattr(stack, field)

    different = [
        f"Stack.{field} is {value(there, field)!r} there and {value(wanted, field)!r} here"
        for field in SHAPE
        if value(there, field) != value(wanted, field)
    ]
    config.require(
        not different,
        f"The {side.tower} of Adaptation.{side.source} cannot become the model's {name}: "
        f"{'; '.join(different)}. Bind the model's to what is there",
    )
    config.require(
        wanted.max_length is None or wanted.max_length <= (there.max_length or 0),
        f"{name}'s Stack.max_length is {wanted.max_length}, but Adaptation.{side.source} has "
        f"learned {there.max_length} positions: bind Stack.max_length = {there.max_length} or less",
    )


def describe_differences(cfg: config.Model, sides: Sides) -> list[str]:
    """Settings under which the same weights compute something else, one sentence each."""
    sentences = []
    for name, side in sides.items():
        wanted, there = getattr(cfg, name), side.stack
        pairs = [
            (f"Stack.{label}", getattr(there, label), getattr(wanted, label))
            for field, label in VALUES.items()
            if getattr(there, field) != getattr(wanted, field)
        ]
        if name == side.tower == "encoder" and there.window_form != wanted.window_form:
            pairs.append(("Stack.window_form", there.window_form, wanted.window_form))
        pairs += [
            (f"Model.{field}", getattr(side.model, field), getattr(cfg, field))
            for field in (READING if name == "encoder" else READING + WRITING)
            if getattr(side.model, field) != getattr(cfg, field)
        ]
        sentences += [
            f"{name}: {field} is {there!r} in Adaptation.{side.source} and {here!r} here"
            for field, there, here in pairs
            # An eoi row that the source lacks is scaled so that it computes the same.
            if (field, there) != ("Model.eoi", None)
        ]
    return sentences
