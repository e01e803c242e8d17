# SPDX-License-Identifier: Apache-2.0
"""Where every weight of an adapted model comes from, settled before one of them is read."""

from typing import Literal, NamedTuple

from t5x_lite import config
from t5x_lite.adaptation import towers
from t5x_lite.adaptation.towers import Side, Sides
from t5x_lite.conversion import matching
from t5x_lite.conversion.matching import Leaf

SELF, CROSS = "layers/attention/", "layers/cross_attention/"
HEAD, EOI, PROJECTION = "head", "eoi_embedding", "projection"
# Which axes of a weight do not count ids or positions.
WIDTHS = {name: slice(1, None) for name in ("embedding", "encoder_embedding", "positions")}
WIDTHS |= {HEAD: slice(0, 1)}


class Piece(NamedTuple):
    """One weight and where it comes from: the weight `path` of the checkpoint `source`.

    copied is as it is; grown has rows for new ids too; bias is a table of relative positions, read
    by distance; row is the embedding of one id; new comes from nowhere. `turned` is [v d] for
    [d v]. `twins` are weights (source, path, turned) that must hold the same values, since the
    model has one weight for both. `scale` multiplies a weight, or one plus it if it is `plus_one`.
    """

    how: Literal["copied", "grown", "bias", "row", "new"]
    source: str = ""
    path: str = ""
    turned: bool = False
    twins: tuple[tuple[str, str, bool], ...] = ()
    scale: float = 1.0
    plus_one: bool = False


class Plan(NamedTuple):
    """The pieces of all weights of `model`, and which weights of the sources nobody reads."""

    model: config.Model
    sides: Sides
    leaves: dict[str, Leaf]
    pieces: dict[str, Piece]
    unread: dict[tuple[str, str], Leaf]
    warnings: list[str]

    def side(self, path: str) -> Side:
        """The tower whose weight that is, or that reads with it."""
        part = path.partition("/")[0]
        if part in self.sides:
            return self.sides[part]
        reads = "encoder" if part == "encoder_embedding" else "decoder"
        return self.sides.get(reads) or self.sides["encoder"]


def plan(
    cfg: config.Model, how: config.Adaptation, source: config.Model, other: config.Model | None
) -> Plan:
    """How the weights of cfg are made of those of `source` and `other`, Adaptation's checkpoints.

    Raises:
      ValueError: they cannot be; both values that contradict each other are named.
    """
    made = towers.sides(cfg, how, source, other)
    leaves = matching.leaves(cfg)
    there = {side.source: matching.leaves(side.model) for side in made.values()}
    found = Plan(cfg, made, leaves, {}, {}, towers.differences(cfg, made))
    for path in leaves:
        piece = piece_of(found, how, path, there)
        check_shape(found, path, piece, there)
        found.pieces[path] = piece
    check_vocabulary(found)
    config.require(
        how.cross_scale == 1 or any(piece.scale != 1 for piece in found.pieces.values()),
        f"Adaptation.cross_scale is {how.cross_scale}, but no cross-attention is made from "
        "self-attention or drawn anew: leave it out",
    )
    used = {(piece.source, piece.path) for piece in found.pieces.values()}
    used |= {twin[:2] for piece in found.pieces.values() for twin in piece.twins}
    unread = {
        (name, path): leaf
        for name, weights in there.items()
        for path, leaf in weights.items()
        if (name, path) not in used
    }
    return found._replace(unread=unread)


def piece_of(found: Plan, how: config.Adaptation, path: str, there: dict) -> Piece:
    """Where the weight of that path comes from."""
    side = found.side(path)
    part, _, inside = path.partition("/")
    if part in found.sides:
        if inside.startswith(CROSS):
            return cross(found, how, inside, side)
        is_bias = inside in ("bias", f"{SELF}bias")
        same = is_bias and alike(getattr(found.model, part), part, side)
        kind = "bias" if is_bias and not same else "copied"
        return Piece(kind, side.source, f"{side.tower}/{inside}")
    if path == PROJECTION:
        known = path in there[side.source]
        return Piece("copied", side.source, path) if known else Piece("new")
    if path == EOI:
        if side.model.eoi == found.model.eoi:
            return Piece("copied", side.source, path)
        known = found.model.eoi < side.model.vocab
        return Piece("row", side.source, side.table) if known else Piece("new")
    if path == HEAD:
        return grown(found, side, *logits_of(side))
    return grown(found, side, side.table, False)._replace(twins=twins(found, path, side))


def alike(wanted: config.Stack, part: str, side: Side) -> bool:
    """Whether the relative positions of `side` have the buckets that the model's tower has."""
    buckets = lambda stack: (stack.buckets, stack.max_distance)
    return part == side.tower and buckets(wanted) == buckets(side.stack)


def cross(found: Plan, how: config.Adaptation, inside: str, side: Side) -> Piece:
    """The piece of a weight of the decoder's cross-attention.

    Raises:
      ValueError: it is to be copied, but the encoder is of another width.
    """
    if how.cross == "random":
        return scaled(Piece("new"), found.model.decoder, how.cross_scale, inside)
    width = found.model.encoder.embed
    there = side.model.encoder.embed if side.crosses else side.stack.embed
    config.require(
        width == there,
        f'Adaptation.cross = "copy", but the weights of Adaptation.{side.source} attend to '
        f"{there} features and the encoder's Stack.embed is {width}: bind Adaptation.cross = "
        '"random", and let Train.parts train it alone at first',
    )
    if side.crosses:
        return Piece("copied", side.source, f"{side.tower}/{inside}")
    copied = Piece("copied", side.source, f"{side.tower}/{inside.replace(CROSS, SELF)}")
    return scaled(copied, found.model.decoder, how.cross_scale, inside)


def scaled(piece: Piece, stack: config.Stack, scale: float, inside: str) -> Piece:
    """The piece, with the scale if the sublayer's output is linear in it."""
    last = ("post_norm", "post_norm_bias") if stack.post_norms else ("out", "out_bias")
    name = inside.removeprefix(CROSS)
    if scale == 1 or name not in last:
        return piece
    plus_one = stack.norm == "rms_plus_one" and name == "post_norm"
    return piece._replace(scale=scale, plus_one=plus_one)


def logits_of(side: Side) -> tuple[str, bool]:
    """The weight that the checkpoint's logits are read through, and whether it is [v d]."""
    return ("embedding", True) if side.model.tied else (HEAD, False)


def grown(found: Plan, side: Side, path: str, turned: bool) -> Piece:
    same = found.model.vocab == side.model.vocab
    return Piece("copied" if same else "grown", side.source, path, turned)


def twins(found: Plan, path: str, side: Side) -> tuple:
    """What else the one table of the model has to serve as."""
    if path != "embedding":
        return ()
    cfg, made = found.model, []
    # An encoder's table that never gave logits is no twin of the one that did.
    gives_logits = side.table == "embedding"
    if cfg.tied and not side.model.tied and gives_logits:
        made.append((side.source, HEAD, True))
    if cfg.layout == "pair" and not cfg.separate_embeddings:
        reader = found.sides["encoder"]
        if (reader.source, reader.table) != (side.source, side.table):
            made.append((reader.source, reader.table, False))
    return tuple(made)


def check_vocabulary(found: Plan) -> None:
    for side in found.sides.values():
        config.require(
            found.model.vocab >= side.model.vocab,
            f"Model.vocab is {found.model.vocab}, but Adaptation.{side.source} has embeddings of "
            f"{side.model.vocab} ids: bind Model.vocab = {side.model.vocab} or more",
        )


def check_shape(found: Plan, path: str, piece: Piece, there: dict) -> None:
    """Raises ValueError where the weight is not there, or of another shape than it should be."""
    for source, name, turned in ((piece.source, piece.path, piece.turned), *piece.twins):
        if piece.how in ("new", "row", "bias"):
            continue
        leaf = there[source].get(name)
        shape = None if leaf is None else leaf.shape[::-1] if turned else leaf.shape
        wanted = found.leaves[path].shape
        # Rows of ids are grown, and positions cut: only their widths must agree.
        widths = WIDTHS.get(path.rpartition("/")[2], slice(None))
        fits = shape is not None and shape[widths] == wanted[widths]
        config.require(
            fits,
            f"{path} is {wanted} in the model, but {name} of Adaptation.{source} is {shape}: the "
            "two cannot be one weight",
        )
