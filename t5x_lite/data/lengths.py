# SPDX-License-Identifier: Apache-2.0
"""How long examples and rows may be."""

from typing import NamedTuple


class Lengths(NamedTuple):
    """An example has at most `inputs` and `targets` tokens; a row of what is predicted has `row`.

    `layout` is that of config.Model: a decoder alone has inputs and targets in one row.
    """

    inputs: int
    targets: int
    layout: str

    @property
    def row(self) -> int:
        return self.inputs + self.targets if self.layout == "joined" else self.targets


def of(lengths: dict[str, int], layout: str) -> Lengths:
    """Data.lengths for a layout; without "inputs" there are none."""
    return Lengths(lengths.get("inputs", 0), lengths["targets"], layout)
