# SPDX-License-Identifier: Apache-2.0
"""Mapping of another library's tensors to weights of ours, complete before a number is read.

A `ConversionPlan` has a mapping for every weight and layer. A tensor that is unused, one that is
missing, and one of another shape are `problems`: each is an error unless its name is allowed.
"""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from t5x_lite import config, model, sharding
from t5x_lite.checkpoints import transforms
from t5x_lite.checkpoints.transforms import STACKED, Entry
from t5x_lite.checkpoints.weight_paths import flatten_tree

SHOWN = 12

Names = Mapping[str, tuple[tuple[int, ...], np.dtype]]


class MatchError(ValueError):
    """Theirs and ours do not fit together; every tensor that does not is named."""


class Leaf(NamedTuple):
    """Axis names and shape of one weight of ours; with "layers" first, all layers of it."""

    axes: str
    shape: tuple[int, ...]

    @property
    def layers(self) -> int | None:
        return self.shape[0] if self.axes.split()[0] == STACKED else None


class WeightMapping(NamedTuple):
    """One weight of one layer, and the tensor that holds it.

    Attributes:
      entry: line of the family's table.
      theirs: name of the tensor.
      stack_position: axis of the layers in the tensor, and the layer; None if it is not a stack.
      layer: the layer of ours; None for a weight that is not stacked.
      axes: axis names of ours without layers.
      sizes: size of every named axis.
      tensor_shape: shape of the tensor, all layers of a stack included.
    """

    entry: Entry
    theirs: str
    stack_position: tuple[int, int] | None
    layer: int | None
    axes: str
    sizes: dict[str, int]
    tensor_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.sizes[name] for name in self.axes.split())

    @property
    def layer_entry(self) -> Entry:
        """The entry as one layer of the tensor is stored."""
        names = " ".join(
            group[0] if len(group) == 1 else f"({' '.join(group)})"
            for group in transforms.axis_groups(self.entry.axes)
            if group != [STACKED]
        )
        return self.entry._replace(axes=names)


# Ends a message about embeddings of another number of ids.
MORE_IDS = "python -m t5x_lite.adapt adds ids to a checkpoint by --names and --sentinels"


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    """The source of every weight, and the use of every tensor.

    Attributes:
      leaves: axis names and shape of every weight of ours.
      mappings: tensors for weights, one for each layer.
      new: mappings whose tensors are missing and may be: these weights are drawn.
      skipped: tensors that are not read, with the reason.
      problems: what does not fit, by name of a tensor or weight; empty where everything fits.
    """

    leaves: dict[str, Leaf]
    mappings: list[WeightMapping]
    new: list[WeightMapping]
    skipped: dict[str, str]
    problems: dict[str, str]

    def check(self, location: str) -> None:
        """Raises MatchError if there are problems; `location` is the checkpoint's path."""
        if not self.problems:
            return
        lines = [f"  {name}: {problem}" for name, problem in self.problems.items()]
        rest = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise MatchError(
            "\n".join(
                [
                    f"{location} does not fit the model in {len(lines)} places:",
                    *lines[:SHOWN],
                    *rest,
                    f"python -m t5x_lite.convert --from={location} --to=FOLDER --dry_run prints "
                    "all of it, and its --allow=PATTERN names what may be missing or left over.",
                ]
            )
        )


@functools.lru_cache(maxsize=16)
def model_leaves(cfg: config.Model) -> dict[str, Leaf]:
    """Every weight of ours by its path, "decoder/layers/attention/query"."""
    with sharding.one_device_mesh():
        boxed = flatten_tree(model.abstract(cfg), "/", model.is_partitioned)
    return {path: Leaf(leaf.axes, leaf.value.shape) for path, leaf in boxed.items()}


def map_weights(
    cfg: config.Model, entries: Iterable[Entry], leaves: Mapping[str, Leaf]
) -> list[WeightMapping]:
    """Mappings of a table, line by line and layer by layer.

    Args:
      cfg: config of the model.
      entries: the family's table.
      leaves: the weights of ours.

    Raises:
      MatchError: the table names a weight that the model does not have, or other axes than it has.
    """
    entries = list(entries)
    parts: dict[str, int] = {}
    for entry in entries:
        if entry.part is not None:
            parts[entry.theirs] = max(parts.get(entry.theirs, 0), entry.part + 1)
    mappings = []
    for entry in entries:
        if entry.ours not in leaves:
            raise MatchError(f"The table has {entry.ours}, which the model does not have")
        mappings += map_entry(cfg, entry, leaves[entry.ours], parts.get(entry.theirs, 1))
    return mappings


def map_entry(cfg: config.Model, entry: Entry, leaf: Leaf, parts: int) -> list[WeightMapping]:
    """Mappings of one entry. One of ours that all layers of theirs repeat is in each of them.

    Args:
      cfg: config of the model.
      entry: line of the family's table.
      leaf: the weight of ours.
      parts: number of weights of ours that lie side by side in the tensor.
    """
    names = leaf.axes.split()
    sizes = dict(zip(names, leaf.shape, strict=True)) | {transforms.PARTS: parts}
    stored = transforms.axis_groups(entry.axes)
    inside = {name for group in stored for name in group} - {transforms.PARTS, STACKED}
    if inside != set(names) - {STACKED}:
        raise MatchError(
            f"The table has {entry.axes!r} for {entry.ours}, whose axes are {leaf.axes!r}"
        )
    stacked, many = [STACKED] in stored, "{layer}" in entry.theirs
    axes = " ".join(name for name in names if name != STACKED)
    if stacked or many:
        sizes[STACKED] = leaf.layers or getattr(cfg, entry.ours.partition("/")[0]).layers
    shape = transforms.grouped_shape(entry.axes, sizes)
    if not stacked and not many:
        return [WeightMapping(entry, entry.theirs, None, None, axes, sizes, shape)]
    return [
        WeightMapping(
            entry,
            theirs=entry.theirs.replace("{layer}", str(layer)),
            stack_position=(stored.index([STACKED]), layer) if stacked else None,
            layer=layer if leaf.layers else None,
            axes=axes,
            sizes=sizes,
            tensor_shape=shape,
        )
        for layer in range(sizes[STACKED])
    ]


def plan_conversion(
    names: Names,
    cfg: config.Model,
    entries: Iterable[Entry],
    *,
    ignored: Sequence[str] = (),
    duplicates: Mapping[str, str] | None = None,
    allow: Sequence[str] = (),
) -> ConversionPlan:
    """Finds the tensor of every weight.

    Args:
      names: shape and dtype of every tensor.
      cfg: config of the model.
      entries: the family's table.
      ignored: patterns of tensors that are not weights.
      duplicates: name of a tensor, and name of the one that it repeats.
      allow: patterns of names, on either side, that may be left out.
    """
    leaves, duplicates = model_leaves(cfg), duplicates or {}
    all_mappings = map_weights(cfg, entries, leaves)
    mappings, new, problems = [], [], {}

    def is_allowed(*names: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in allow)

    for mapping in all_mappings:
        mapping = mapping._replace(theirs=resolve_duplicate(mapping.theirs, names, duplicates))
        misfit = describe_misfit(mapping, names)
        if misfit is None:
            mappings.append(mapping)
        elif is_allowed(mapping.theirs, mapping.entry.ours):
            new.append(mapping)
        else:
            problems[mapping.theirs] = misfit
    for path in leaves.keys() - {mapping.entry.ours for mapping in all_mappings}:
        problems[path] = "a weight of ours that the table does not have"
    skipped = {}
    for name in names.keys() - {mapping.theirs for mapping in mappings} - problems.keys():
        reason = reason_to_skip(name, ignored, duplicates, is_allowed)
        if reason is None:
            problems[name] = f"no weight of ours {format_shape(names[name][0])}"
        else:
            skipped[name] = reason
    skipped, problems = dict(sorted(skipped.items())), dict(sorted(problems.items()))
    return ConversionPlan(leaves, mappings, new, skipped, problems)


def resolve_duplicate(name: str, names: Names, duplicates: Mapping[str, str]) -> str:
    """The tensor to read for a name.

    Args:
      name: name of a tensor.
      names: the tensors of the checkpoint.
      duplicates: name of a tensor, and name of the one that it repeats.

    Returns:
      `name`, or where it is absent a tensor that repeats it or that it repeats.
    """
    if name in names:
        return name
    same = [duplicates[name]] if name in duplicates else []
    same += [other for other, repeated in duplicates.items() if repeated in (name, *same)]
    return next((other for other in same if other in names), name)


def describe_misfit(mapping: WeightMapping, names: Names) -> str | None:
    """The reason why the tensor cannot be the weight; None where it can."""
    wanted = f"{mapping.entry.ours} {format_shape(mapping.tensor_shape)}"
    if mapping.theirs not in names:
        return f"missing; it should be {wanted}"
    shape, dtype = names[mapping.theirs]
    if shape != mapping.tensor_shape:
        more = f" ({MORE_IDS})" if "vocab" in mapping.axes.split() else ""
        return f"has shape {format_shape(shape)}; it should be {wanted}{more}"
    if np.dtype(dtype).itemsize == 1 or not is_float(dtype):
        return f"is {dtype}; weights are read as float64, float32, float16 or bfloat16"
    return None


def is_float(dtype: np.dtype) -> bool:
    """True for floating-point dtypes, those of ml_dtypes included."""
    return jax.numpy.issubdtype(dtype, np.floating)


def reason_to_skip(
    name: str,
    ignored: Sequence[str],
    duplicates: Mapping[str, str],
    is_allowed: Callable[[str], bool],
) -> str | None:
    """The reason why a tensor may be left unused; None where it may not.

    Args:
      name: name of the tensor.
      ignored: patterns of tensors that are not weights.
      duplicates: name of a tensor, and name of the one that it repeats.
      is_allowed: True for names that the user allows to be left over.
    """
    if name in duplicates:
        return f"repeats {duplicates[name]}"
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored):
        return "no weight"
    return "left out, as allowed" if is_allowed(name) else None


def format_shape(shape: tuple[int, ...]) -> str:
    """A shape as tables have it, "[32, 8]"."""
    return f"[{', '.join(map(str, shape))}]"


def format_plan(plan: ConversionPlan, names: Names) -> str:
    """The plan as aligned text: theirs, ours, shape and what happens; then what does not fit."""
    rows = [("theirs", "ours", "shape", "how")]
    listed = set()
    for mapping in plan.mappings:
        if mapping.entry in listed:
            continue
        listed.add(mapping.entry)
        steps = transforms.describe_transform(mapping.entry, plan.leaves[mapping.entry.ours].axes)
        many = mapping.sizes.get(STACKED) if "{layer}" in mapping.entry.theirs else None
        name = mapping.entry.theirs if many else mapping.theirs
        count = f" x {many}" if many else ""
        rows.append((name, mapping.entry.ours, format_shape(mapping.tensor_shape) + count, steps))
    rows += [(each.theirs, each.entry.ours, "", "new, as allowed") for each in plan.new]
    rows += [
        (name, "-", format_shape(names[name][0]), reason) for name, reason in plan.skipped.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, *(f"! {name}: {text}" for name, text in plan.problems.items())])


def count_parameters(leaves: Mapping[str, Leaf]) -> int:
    """Number of parameters of all weights together."""
    return sum(math.prod(leaf.shape) for leaf in leaves.values())


def list_differences(theirs: config.Model, ours: config.Model) -> str:
    """Fields of two models on which logits depend and in which they differ, with `theirs`' values.

    Fields that shapes of weights show are left out: they are compared with the weights.
    """
    different = []
    for name in ("scale_embedding", "scale_logits", "logits_softcap", "logits_bias", "prefix_lm"):
        if getattr(theirs, name) != getattr(ours, name):
            different.append(f"Model.{name} = {getattr(theirs, name)}")
    for name in ("encoder", "decoder"):
        stacks = getattr(theirs, name), getattr(ours, name)
        if None not in stacks:
            different += [
                f"{name}'s Stack.{field.name} = {getattr(stacks[0], field.name)}"
                for field in dataclasses.fields(config.Stack)
                if field.name not in ("bias_std", "kv_heads", "pattern")
                and getattr(stacks[0], field.name) != getattr(stacks[1], field.name)
            ]
    return ", ".join(different)
