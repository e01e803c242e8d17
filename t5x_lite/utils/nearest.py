# SPDX-License-Identifier: Apache-2.0
"""Suggestions for an unknown name."""

import difflib
from collections.abc import Iterable

# The most names listed in a message.
MOST = 5
# Least similarity (difflib's ratio, 0 to 1) of a suggestion, and its greatest distance from the
# nearest name.
SIMILAR, MARGIN = 0.5, 0.1


def near_names(name: str, known: Iterable[str], similar: float = SIMILAR) -> list[str]:
    """Returns at most five names that are similar to `name`, the nearest first.

    Args:
      name: the unknown name.
      known: the names that exist.
      similar: least similarity, from 0 (anything) to 1 (the same name).
    """
    matcher = difflib.SequenceMatcher(b=name.lower())
    scores = {}
    for each in known:
        matcher.set_seq1(each.lower())
        scores[each] = matcher.ratio()
    least = max(similar, max(scores.values(), default=0.0) - MARGIN)
    near = [each for each in scores if scores[each] >= least]
    return sorted(near, key=lambda each: (-scores[each], each))[:MOST]


def suggest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Ends a message about an unknown name: "did you mean train or trained?".

    Args:
      name: the unknown name.
      known: the names that exist.
      otherwise: the end if no name is similar; if empty, it lists the first five that exist.
    """
    known = list(known)
    near = near_names(name, known)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return otherwise or f"known: {listed(known)}"


def listed(names: list[str]) -> str:
    """The first five names, and the number of the others."""
    more = len(names) - MOST
    shown = ", ".join(names[:MOST])
    return f"{shown} and {more} more" if more > 0 else shown or "none"
