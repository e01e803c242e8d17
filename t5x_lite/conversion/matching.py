# SPDX-License-Identifier: Apache-2.0
"""Which tensor of theirs is which weight of ours, settled before a single number is read.

A `Plan` has a piece for every weight and layer. What a checkpoint has and nobody asks for, what is
asked for and missing, and what has another shape are `problems`: each is an error unless its name
is allowed.
"""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from t5x_lite import config, model, sharding
from t5x_lite.conversion import transforms
from t5x_lite.conversion.tables import Entry
from t5x_lite.conversion.transforms import STACKED

SHOWN = 12

Names = Mapping[str, tuple[tuple[int, ...], np.dtype]]


class MatchError(ValueError):
    """Theirs and ours do not fit together; every tensor that does not is named."""


class Leaf(NamedTuple):
    """One weight of ours; where its axes begin with "layers", all layers of it."""

    axes: str
    shape: tuple[int, ...]

    @property
    def layers(self) -> int | None:
        return self.shape[0] if self.axes.split()[0] == STACKED else None


class Piece(NamedTuple):
    """One weight of one layer, and where it lies: in tensor `theirs`, at `at` if that is a stack.

    `axes` and `shape` are of ours without layers, `whole` is the shape of all of theirs.
    """

    entry: Entry
    theirs: str
    at: tuple[int, int] | None
    layer: int | None
    axes: str
    sizes: dict[str, int]
    whole: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.sizes[name] for name in self.axes.split())

    @property
    def lies(self) -> Entry:
        """The entry as one layer of it lies."""
        names = " ".join(
            f"({' '.join(group)})" if len(group) > 1 else group[0]
            for group in transforms.groups(self.entry.axes)
            if group != [STACKED]
        )
        return self.entry._replace(axes=names)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What goes where. `fresh` are pieces that theirs lacks with leave, `skipped` tensors that are
    not read, with the reason; `problems` is empty where everything fits.
    """

    leaves: dict[str, Leaf]
    pieces: list[Piece]
    fresh: list[Piece]
    skipped: dict[str, str]
    problems: dict[str, str]

    def check(self, where: str) -> None:
        """Raises MatchError if there are problems."""
        if not self.problems:
            return
        lines = [f"  {name}: {trouble}" for name, trouble in self.problems.items()]
        rest = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise MatchError(
            "\n".join(
                [
                    f"{where} does not fit the model in {len(lines)} places:",
                    *lines[:SHOWN],
                    *rest,
                    "--dry_run prints all of it; what may be left out is named by --allow=PATTERN.",
                ]
            )
        )


@functools.lru_cache(maxsize=16)
def leaves(cfg: config.Model) -> dict[str, Leaf]:
    """Every weight of ours by its path, "decoder/layers/attention/query"."""
    mesh = jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        found = flat(model.abstract(cfg), model.is_named)
    return {path: Leaf(leaf.axes, leaf.value.shape) for path, leaf in found.items()}


def flat(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of params by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def pieces(cfg: config.Model, entries: Iterable[Entry], ours: dict[str, Leaf]) -> list[Piece]:
    """A table line by line and layer by layer.

    Raises:
      MatchError: the table names a weight that the model does not have, or other axes than it has.
    """
    entries = list(entries)
    parts: dict[str, int] = {}
    for entry in entries:
        if entry.part is not None:
            parts[entry.theirs] = max(parts.get(entry.theirs, 0), entry.part + 1)
    made = []
    for entry in entries:
        if entry.ours not in ours:
            raise MatchError(f"The table has {entry.ours}, which the model does not have")
        made += layered(cfg, entry, ours[entry.ours], parts.get(entry.theirs, 1))
    return made


def layered(cfg: config.Model, entry: Entry, leaf: Leaf, parts: int) -> list[Piece]:
    """The pieces of one entry. One of ours that all layers of theirs repeat is in each of them."""
    names = leaf.axes.split()
    sizes = dict(zip(names, leaf.shape, strict=True)) | {transforms.PARTS: parts}
    there = transforms.groups(entry.axes)
    inside = {name for group in there for name in group} - {transforms.PARTS, STACKED}
    if inside != set(names) - {STACKED}:
        raise MatchError(
            f"The table has {entry.axes!r} for {entry.ours}, whose axes are {leaf.axes!r}"
        )
    stacked, many = [STACKED] in there, "{layer}" in entry.theirs
    axes = " ".join(name for name in names if name != STACKED)
    if not stacked and not many:
        return [Piece(entry, entry.theirs, None, None, axes, sizes, whole(entry, sizes))]
    sizes[STACKED] = leaf.layers or getattr(cfg, entry.ours.partition("/")[0]).layers
    axis = there.index([STACKED]) if stacked else None
    return [
        Piece(
            entry,
            entry.theirs.replace("{layer}", str(layer)),
            (axis, layer) if stacked else None,
            layer if leaf.layers else None,
            axes,
            sizes,
            whole(entry, sizes),
        )
        for layer in range(sizes[STACKED])
    ]


def whole(entry: Entry, sizes: dict[str, int]) -> tuple[int, ...]:
    return transforms.shape(entry.axes, sizes)


def plan(
    names: Names,
    cfg: config.Model,
    entries: Iterable[Entry],
    *,
    ignored: Sequence[str] = (),
    duplicates: Mapping[str, str] | None = None,
    allow: Sequence[str] = (),
) -> Plan:
    """Where every weight of cfg comes from among the tensors `names`.

    `ignored` are patterns of tensors that are no weights, `duplicates` says which repeat another
    one, `allow` are patterns of names, on either side, that may be left out.
    """
    ours, duplicates = leaves(cfg), duplicates or {}
    wanted = pieces(cfg, entries, ours)
    found, fresh, problems = [], [], {}
    allowed = lambda *given: any(fnmatch.fnmatchcase(n, p) for n in given for p in allow)
    for piece in wanted:
        piece = piece._replace(theirs=present(piece.theirs, names, duplicates))
        trouble = misfit(piece, names)
        if trouble is None:
            found.append(piece)
        elif allowed(piece.theirs, piece.entry.ours):
            fresh.append(piece)
        else:
            problems[piece.theirs] = trouble
    for path in ours.keys() - {piece.entry.ours for piece in wanted}:
        problems[path] = "a weight of ours that the table does not have"
    skipped = {}
    for name in names.keys() - {piece.theirs for piece in found} - problems.keys():
        reason = reason_to_skip(name, ignored, duplicates, allowed)
        if reason is None:
            problems[name] = f"no weight of ours {size(names[name][0])}"
        else:
            skipped[name] = reason
    return Plan(ours, found, fresh, dict(sorted(skipped.items())), dict(sorted(problems.items())))


def present(name: str, names: Names, duplicates: Mapping[str, str]) -> str:
    """name, or where that is absent the tensor that repeats it or that it repeats."""
    if name in names:
        return name
    same = [duplicates[name]] if name in duplicates else []
    same += [other for other, repeated in duplicates.items() if repeated in (name, *same)]
    return next((other for other in same if other in names), name)


def misfit(piece: Piece, names: Names) -> str | None:
    """Why theirs cannot be this piece; None where it can."""
    wanted = f"{piece.entry.ours} {size(piece.whole)}"
    if piece.theirs not in names:
        return f"missing; it should be {wanted}"
    shape, dtype = names[piece.theirs]
    if shape != piece.whole:
        return f"has shape {size(shape)}; it should be {wanted}"
    if np.dtype(dtype).itemsize == 1 or not is_float(dtype):
        return f"is {dtype}; weights are read as float64, float32, float16 or bfloat16"
    return None


def is_float(dtype: np.dtype) -> bool:
    return jax.numpy.issubdtype(dtype, np.floating)


def reason_to_skip(name: str, ignored, duplicates, allowed) -> str | None:
    if name in duplicates:
        return f"repeats {duplicates[name]}"
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored):
        return "no weight"
    return "left out, as allowed" if allowed(name) else None


def size(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def table(plan: Plan, names: Names) -> str:
    """The plan as aligned text: theirs, ours, shape and what happens; then what does not fit."""
    rows = [("theirs", "ours", "shape", "how")]
    told = set()
    for piece in plan.pieces:
        if piece.entry in told:
            continue
        told.add(piece.entry)
        how = transforms.described(piece.entry, plan.leaves[piece.entry.ours].axes)
        many = piece.sizes.get(STACKED) if "{layer}" in piece.entry.theirs else None
        name = piece.entry.theirs if many else piece.theirs
        count = f" x {many}" if many else ""
        rows.append((name, piece.entry.ours, size(piece.whole) + count, how))
    rows += [(piece.theirs, piece.entry.ours, "", "new, as allowed") for piece in plan.fresh]
    rows += [(name, "-", size(names[name][0]), why) for name, why in plan.skipped.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, *(f"! {name}: {why}" for name, why in plan.problems.items())])


def count(ours: dict[str, Leaf]) -> int:
    """How many numbers the weights are."""
    return sum(math.prod(leaf.shape) for leaf in ours.values())
