# SPDX-License-Identifier: Apache-2.0
"""Tensors under the names of a family's table, whichever of several their files have."""

from types import ModuleType

import numpy as np

from t5x_lite.conversion.sources import Source, SourceError


class Renamed:
    """A source whose tensors have other names, of which `plain` makes the table's.

    Raises:
      SourceError: two tensors would have the same name.
    """

    def __init__(self, source: Source, plain):
        self.source = source
        self.theirs: dict[str, str] = {}
        for name in source.names:
            first = self.theirs.setdefault(plain(name), name)
            if first != name:
                raise SourceError(f"{first} and {name} are two names of one weight: remove one")
        self.names = {ours: source.names[name] for ours, name in self.theirs.items()}

    def read(self, name: str, *at: tuple[int, int]) -> np.ndarray:
        return self.source.read(self.theirs[name], *at)


def renamed(source: Source, family: ModuleType) -> Source:
    """source with the names that the family's table has."""
    plain = getattr(family, "plain", None)
    return source if plain is None else Renamed(source, plain)
