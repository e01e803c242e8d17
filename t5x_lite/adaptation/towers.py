# SPDX-License-Identifier: Apache-2.0
"""Which tower of a checkpoint becomes which tower of a model, and whether it can."""

from typing import NamedTuple

from t5x_lite import config

# On these the weights or their meaning depend: a tower that is copied agrees in all of them.
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
    "post_norms",
    "qk_norm",
    "qkv_bias",
    "out_bias",
    "mlp_bias",
    "positions",
    "bias_per_layer",
)
# These change what the same weights compute, which training can make up for: a warning tells them.
# `sliding` is what a pattern comes to.
VALUES = {
    name: name
    for name in (
        "norm_epsilon",
        "query_scale",
        "softcap",
        "rotary_base",
        "rotary_scaling",
        "window",
        "sliding_rotary_base",
    )
} | {"sliding": "pattern"}
READING = ("scale_embedding", "eoi")
WRITING = ("scale_logits", "logits_softcap")


class Side(NamedTuple):
    """A tower of a checkpoint: `source` is the field of Adaptation that names the checkpoint."""

    source: str
    model: config.Model
    tower: str

    @property
    def stack(self) -> config.Stack:
        return getattr(self.model, self.tower)

    @property
    def both_sides(self) -> bool:
        return self.tower == "encoder"

    @property
    def table(self) -> str:
        """The embedding that the tower reads its ids with."""
        separate = self.tower == "encoder" and self.model.separate_embeddings
        return "encoder_embedding" if separate else "embedding"

    @property
    def crosses(self) -> bool:
        """Whether it has layers of cross-attention."""
        lone = self.model.layout != "pair" or self.tower == "encoder"
        return not lone and not self.stack.merged


Sides = dict[str, Side]


def sides(
    cfg: config.Model, how: config.Adaptation, source: config.Model, other: config.Model | None
) -> Sides:
    """Where each tower of cfg comes from; `other` is the model of `encoder_source`.

    Raises:
      ValueError: Adaptation names a tower that is not there or that nobody asks for, or a tower
        that cannot become the other; both values are named.
    """
    made: Sides = {}
    if cfg.decoder is not None:
        made["decoder"] = Side("source", source, how.decoder_from)
    if cfg.encoder is not None:
        name = "source" if other is None else "encoder_source"
        model = source if other is None else other
        tower = how.encoder_from or ("decoder" if model.encoder is None else "encoder")
        made["encoder"] = Side(name, model, tower)
    check_asked(cfg, how)
    for name, side in made.items():
        check_tower(name, getattr(cfg, name), side)
    return made


def check_asked(cfg: config.Model, how: config.Adaptation) -> None:
    """Raises ValueError where Adaptation says something of a tower that the model lacks."""
    for field in ("encoder_source", "encoder_from"):
        config.require(
            cfg.encoder is not None or getattr(how, field) is None,
            f"Adaptation.{field} is {getattr(how, field)!r}, but the model has no encoder: leave "
            "it out, or bind Model.encoder",
        )
    config.require(
        cfg.decoder is not None or how.encoder_source is None,
        f"The model is an encoder alone, so that nothing of Adaptation.source ({how.source}) would "
        f"be used: bind Adaptation.source = {how.encoder_source!r} and no encoder_source",
    )


def check_tower(name: str, wanted: config.Stack, side: Side) -> None:
    """Raises ValueError unless `side` has the shape of the model's tower `name`."""
    config.require(
        getattr(side.model, side.tower) is not None,
        f"Adaptation.{name}_from is {side.tower!r}, but Adaptation.{side.source} has no "
        f"{side.tower}: it is {side.model.layout}",
    )
    there = side.stack
    value = lambda stack, field: stack.key_heads if field == "kv_heads" else getattr(stack, field)
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
        wanted.max_length is None or wanted.max_length <= there.max_length,
        f"{name}'s Stack.max_length is {wanted.max_length}, but Adaptation.{side.source} has "
        f"learned {there.max_length} positions: bind Stack.max_length = {there.max_length} or less",
    )


def differences(cfg: config.Model, made: Sides) -> list[str]:
    """What the same weights will compute otherwise, one sentence each."""
    told = []
    for name, side in made.items():
        wanted, there = getattr(cfg, name), side.stack
        pairs = [
            (f"Stack.{said}", getattr(there, said), getattr(wanted, said))
            for field, said in VALUES.items()
            if getattr(there, field) != getattr(wanted, field)
        ]
        if name == side.tower == "encoder" and there.window_form != wanted.window_form:
            pairs.append(("Stack.window_form", there.window_form, wanted.window_form))
        pairs += [
            (f"Model.{field}", getattr(side.model, field), getattr(cfg, field))
            for field in (READING if name == "encoder" else READING + WRITING)
            if getattr(side.model, field) != getattr(cfg, field)
        ]
        told += [
            f"{name}: {field} is {there!r} in Adaptation.{side.source} and {here!r} here"
            for field, there, here in pairs
            # An end of images that the source lacks is made to compute the same.
            if (field, there) != ("Model.eoi", None)
        ]
    return told
