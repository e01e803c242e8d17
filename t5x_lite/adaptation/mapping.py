# SPDX-License-Identifier: Apache-2.0
"""The origin of every weight of an adapted model, planned before a weight is read."""

from typing import Literal, NamedTuple

from t5x_lite import config
from t5x_lite.adaptation import arrangement
from t5x_lite.adaptation.arrangement import Side, Sides
from t5x_lite.checkpoints import matching
from t5x_lite.checkpoints.matching import Leaf
from t5x_lite.utils.not_none import not_none

SELF, CROSS = "layers/attention/", "layers/cross_attention/"
HEAD, EOI, READOUT = "head", "eoi_embedding", "readout"
# Which axes of a weight do not count ids or positions.
WIDTHS = {name: slice(1, None) for name in ("embedding", "encoder_embedding", "positions")}
WIDTHS |= {HEAD: slice(0, 1)}


class WeightOrigin(NamedTuple):
    """Origin of one weight of an adapted model.

    Attributes:
      kind: "copied" (unchanged), "grown" (with rows for new ids), "bias" (a table of relative
        positions, resampled by distance), "row" (the embedding of one id) or "new" (no origin).
      source: field of Adaptation that names the checkpoint.
      path: weight of the checkpoint.
      turned: True if the weight is transposed, [v d] for [d v].
      tied: weights (source, path, turned) that must have the same values, since the model has one
        weight for all of them.
      scale: factor of the weight.
      plus_one: the scale multiplies one plus the weight (a norm of kind "rms_plus_one").
    """

    kind: Literal["copied", "grown", "bias", "row", "new"]
    source: str = ""
    path: str = ""
    turned: bool = False
    tied: tuple[tuple[str, str, bool], ...] = ()
    scale: float = 1.0
    plus_one: bool = False


class AdaptationPlan(NamedTuple):
    """Origins of all weights of an adapted model.

    Attributes:
      model: config of the adapted model.
      sides: towers of the checkpoints, by tower of the model.
      leaves: shapes of the model's weights by path.
      origins: origin of each weight by path.
      unread: weights of the checkpoints that are unused, by (source, path).
      warnings: settings under which the same weights compute something else.
    """

    model: config.Model
    sides: Sides
    leaves: dict[str, Leaf]
    origins: dict[str, WeightOrigin]
    unread: dict[tuple[str, str], Leaf]
    warnings: list[str]

    @property
    def has_new_decoder(self) -> bool:
        """True if the decoder comes from no checkpoint."""
        return self.model.decoder is not None and "decoder" not in self.sides

    def side(self, path: str) -> Side:
        """The checkpoint's tower that a weight belongs to, or that embeds its ids with it."""
        part = path.partition("/")[0]
        if part in self.sides:
            return self.sides[part]
        reads = "encoder" if part == "encoder_embedding" else "decoder"
        return self.sides.get(reads) or self.sides["encoder"]


def plan_adaptation(
    cfg: config.Model,
    adaptation: config.Adaptation,
    source: config.Model,
    other: config.Model | None,
) -> AdaptationPlan:
    """Plans the weights of an adapted model.

    Args:
      cfg: config of the adapted model.
      adaptation: config of the adaptation.
      source: model of Adaptation.source.
      other: model of Adaptation.encoder_source; None without one.

    Raises:
      ValueError: the model cannot be adapted from these; the message has both values that
        contradict each other.
    """
    sides = arrangement.match_towers(cfg, adaptation, source, other)
    leaves = matching.model_leaves(cfg)
    there = {side.source: matching.model_leaves(side.model) for side in sides.values()}
    plan = AdaptationPlan(cfg, sides, leaves, {}, {}, arrangement.describe_differences(cfg, sides))
    for path in leaves:
        origin = find_origin(plan, adaptation, path, there)
        check_shape(plan, path, origin, there)
        plan.origins[path] = origin
    check_vocabulary(plan)
    config.require(
        adaptation.cross_scale == 1 or any(origin.scale != 1 for origin in plan.origins.values()),
        f"Adaptation.cross_scale is {adaptation.cross_scale}, but no cross-attention is made from "
        "self-attention or drawn anew: leave it out",
    )
    used = {(origin.source, origin.path) for origin in plan.origins.values()}
    used |= {twin[:2] for origin in plan.origins.values() for twin in origin.tied}
    unread = {
        (name, path): leaf
        for name, weights in there.items()
        for path, leaf in weights.items()
        if (name, path) not in used
    }
    return plan._replace(unread=unread)


def find_origin(
    plan: AdaptationPlan, adaptation: config.Adaptation, path: str, there: dict
) -> WeightOrigin:
    """Finds the origin of a weight.

    Args:
      plan: the plan, with its towers.
      adaptation: config of the adaptation.
      path: path of the model's weight.
      there: leaves of the checkpoints, by field of Adaptation and path.
    """
    side = plan.side(path)
    part, _, inside = path.partition("/")
    if part in plan.sides:
        if inside.startswith(CROSS):
            return cross_attention_origin(plan, adaptation, inside, side)
        is_bias = inside in ("bias", f"{SELF}bias")
        same = is_bias and has_equal_buckets(getattr(plan.model, part), part, side)
        kind = "bias" if is_bias and not same else "copied"
        return WeightOrigin(kind, side.source, f"{side.tower}/{inside}")
    if plan.has_new_decoder:
        if part == "decoder":
            return new_decoder_origin(not_none(plan.model.decoder), adaptation, inside)
        if path == HEAD or (path == "embedding" and plan.model.separate_embeddings):
            return WeightOrigin("new")
    if part == READOUT:
        known = path in there[side.source]
        return WeightOrigin("copied", side.source, path) if known else WeightOrigin("new")
    if path == EOI:
        if side.model.eoi == plan.model.eoi:
            return WeightOrigin("copied", side.source, path)
        known = plan.model.eoi is not None and plan.model.eoi < side.model.vocab
        return WeightOrigin("row", side.source, side.table) if known else WeightOrigin("new")
    if path == HEAD:
        return table_origin(plan, side, *logits_weight(side))
    return table_origin(plan, side, side.table, False)._replace(tied=tied_weights(plan, path, side))


def new_decoder_origin(
    stack: config.Stack, adaptation: config.Adaptation, inside: str
) -> WeightOrigin:
    """Origin of a weight of a decoder that is drawn anew.

    Args:
      stack: config of the decoder.
      adaptation: config of the adaptation.
      inside: path of the weight within the decoder.
    """
    origin = WeightOrigin("new")
    if not inside.startswith(CROSS):
        return origin
    return scale_output(origin, stack, adaptation.cross_scale, inside)


def has_equal_buckets(wanted: config.Stack, part: str, side: Side) -> bool:
    """True if the relative positions of a checkpoint's tower have the buckets of the model's.

    Args:
      wanted: config of the model's tower.
      part: name of the model's tower.
      side: tower of the checkpoint.
    """
    same_buckets = (wanted.buckets, wanted.max_distance) == (
        side.stack.buckets,
        side.stack.max_distance,
    )
    return part == side.tower and same_buckets


def cross_attention_origin(
    plan: AdaptationPlan, adaptation: config.Adaptation, inside: str, side: Side
) -> WeightOrigin:
    """Finds the origin of a weight of the decoder's cross-attention.

    Args:
      plan: the plan, with its towers.
      adaptation: config of the adaptation.
      inside: path of the weight within the decoder.
      side: tower of the checkpoint that becomes the decoder.

    Raises:
      ValueError: it is to be copied, but the encoder is of another width.
    """
    encoder, decoder = plan.model.encoder, plan.model.decoder
    assert encoder is not None and decoder is not None
    if adaptation.cross == "random":
        return scale_output(WeightOrigin("new"), decoder, adaptation.cross_scale, inside)
    width = encoder.embed
    read = side.model.encoder if side.crosses else side.stack
    assert read is not None
    there = read.embed
    config.require(
        width == there,
        f'Adaptation.cross = "copy", but the weights of Adaptation.{side.source} attend to '
        f"{there} features and the encoder's Stack.embed is {width}: bind Adaptation.cross = "
        '"random", and let Train.param_groups train it alone at first',
    )
    if side.crosses:
        return WeightOrigin("copied", side.source, f"{side.tower}/{inside}")
    copied = WeightOrigin("copied", side.source, f"{side.tower}/{inside.replace(CROSS, SELF)}")
    return scale_output(copied, decoder, adaptation.cross_scale, inside)


def scale_output(
    origin: WeightOrigin, stack: config.Stack, scale: float, inside: str
) -> WeightOrigin:
    """Adds the scale to the origin of a weight that the sublayer's output is linear in.

    Args:
      origin: origin of a weight of cross-attention.
      stack: config of the decoder.
      scale: Adaptation.cross_scale.
      inside: path of the weight within the decoder.
    """
    last = ("post_norm", "post_norm_bias") if stack.post_norms else ("out", "out_bias")
    name = inside.removeprefix(CROSS)
    if scale == 1 or name not in last:
        return origin
    plus_one = stack.norm == "rms_plus_one" and name == "post_norm"
    return origin._replace(scale=scale, plus_one=plus_one)


def logits_weight(side: Side) -> tuple[str, bool]:
    """Path of the checkpoint's output weight, and True if it is transposed, [v d]."""
    return ("embedding", True) if side.model.tied else (HEAD, False)


def table_origin(plan: AdaptationPlan, side: Side, path: str, turned: bool) -> WeightOrigin:
    """Origin of a weight with one row per id: copied, or grown for a larger vocabulary.

    Args:
      plan: the plan, with the model.
      side: tower of the checkpoint.
      path: path of the checkpoint's weight.
      turned: True if it is transposed.
    """
    same = plan.model.vocab == side.model.vocab
    return WeightOrigin("copied" if same else "grown", side.source, path, turned)


def tied_weights(plan: AdaptationPlan, path: str, side: Side) -> tuple:
    """Weights of the checkpoints that must equal the model's embedding, as they share it.

    Args:
      plan: the plan, with its towers.
      path: path of the model's weight.
      side: tower of the checkpoint that the embedding comes from.
    """
    if path != "embedding":
        return ()
    cfg, others = plan.model, []
    # An encoder's table that computes no logits does not have to equal the head.
    gives_logits = side.table == "embedding"
    if cfg.tied and not side.model.tied and gives_logits and not plan.has_new_decoder:
        others.append((side.source, HEAD, True))
    if cfg.layout == "encoder_decoder" and not cfg.separate_embeddings:
        reader = plan.sides["encoder"]
        if (reader.source, reader.table) != (side.source, side.table):
            others.append((reader.source, reader.table, False))
    return tuple(others)


def check_vocabulary(plan: AdaptationPlan) -> None:
    """Raises ValueError if the model has fewer ids than a checkpoint."""
    for side in plan.sides.values():
        config.require(
            plan.model.vocab >= side.model.vocab,
            f"Model.vocab is {plan.model.vocab}, but Adaptation.{side.source} has embeddings of "
            f"{side.model.vocab} ids: bind Model.vocab = {side.model.vocab} or more",
        )


def check_shape(plan: AdaptationPlan, path: str, origin: WeightOrigin, there: dict) -> None:
    """Raises ValueError if a checkpoint lacks the weight or has it in another shape.

    Args:
      plan: the plan, with the shapes of the model's weights.
      path: path of the model's weight.
      origin: its origin.
      there: leaves of the checkpoints, by field of Adaptation and path.
    """
    for source, name, turned in ((origin.source, origin.path, origin.turned), *origin.tied):
        if origin.kind in ("new", "row", "bias"):
            continue
        leaf = there[source].get(name)
        shape = None if leaf is None else leaf.shape[::-1] if turned else leaf.shape
        wanted = plan.leaves[path].shape
        # Rows of ids are added and positions cut: only the widths must agree.
        widths = WIDTHS.get(path.rpartition("/")[2], slice(None))
        fits = shape is not None and shape[widths] == wanted[widths]
        config.require(
            fits,
            f"{path} is {wanted} in the model, but {name} of Adaptation.{source} is {shape}: the "
            "two cannot be one weight",
        )
