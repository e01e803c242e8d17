# SPDX-License-Identifier: Apache-2.0
"""A family's table: which weight of ours is which tensor of a checkpoint of another make."""

from typing import NamedTuple


class Entry(NamedTuple):
    """One weight of ours, and where and how it lies in a checkpoint of another make.

    `ours` is a path as in `model.axes`, "decoder/layers/attention/query". `theirs` is a tensor's
    name, "model.layers.{layer}.self_attn.q_proj.weight": {layer} where each layer has its own.

    `axes` says how theirs lies, in our axis names: "(heads head_dim) embed" are two axes, the first
    of them heads by head_dim. "layers" is among them where theirs is stacked. A "parts" axis means
    that several of ours lie side by side in one of theirs ("embed (parts heads head_dim)"), and
    `part` is the place of this one. `paired` means that the two halves that rotary positions turn
    together lie interleaved along head_dim in theirs.

    `optional`: theirs may be absent where the family's `duplicates` names one that it equals, which
    is then read in its place.
    """

    ours: str
    theirs: str
    axes: str
    part: int | None = None
    paired: bool = False
    optional: bool = False
