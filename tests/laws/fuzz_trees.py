# SPDX-License-Identifier: Apache-2.0
"""Edits of parsed content: a tree of dicts, lists and scalars with one place changed.

Every structured format is mutated alike: its codec (`fuzz_formats`) parses bytes to such a tree,
`change_tree` edits it, and the codec writes it again with lengths and checksums that fit.
"""

import copy
import random
import string
from collections.abc import Iterator
from typing import Any

from fuzz_grammars import change_template
from fuzz_mutations import NUMBERS, STRANGE, TEXT, TEXTS

# Looking at more places takes longer than the reader does.
MOST_PLACES = 3000
# A tokenizer's file has patterns, some of which take for ever.
PATTERNS = ["(a+)+$", "(o|o)*!", "(", "(?<=o+)d", "\\p{Nope}", "a{1000000}", "(?i)" * 500, "", "."]
# Longer files are not worth their time.
MOST_COPIES = 20_000


class Repeated(dict):
    """A dict that is written with one of its keys twice."""

    def __init__(self, content: dict, key: Any, value: Any):
        super().__init__(content)
        self.pair = key, value

    def items(self):
        return [*super().items(), self.pair]


def list_places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a tree, as its container and the key or index in it."""
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from list_places(tree[key])


def change_tree(tree: Any, draw: random.Random) -> Any:
    """Changes one place of a tree, and returns the tree or what stands in its place."""
    # What lies deep is most of a tokenizer; what lies near the root is most of what matters.
    top = [(tree, key) for key in tree] if isinstance(tree, dict) else []
    places = [place for _, place in zip(range(MOST_PLACES), list_places(tree), strict=False)]
    if not places:
        return draw.choice(STRANGE)
    owner, key = draw.choice(draw.choice([top or places, places]))
    kind = draw.randrange(12)
    if kind == 0:
        del owner[key]
    elif kind == 1:
        other, there = draw.choice(places)
        owner[key] = copy.deepcopy(other[there])
    elif kind == 2 and isinstance(owner, dict):
        owner[draw.choice([text for text in TEXTS if len(text) < 100])] = owner.pop(key)
    elif kind == 3 and isinstance(owner, dict):
        replace_dict(tree, owner, Repeated(owner, key, draw.choice([owner[key], *STRANGE])))
    elif kind == 4 and isinstance(owner, list):
        owner[key:key] = [copy.deepcopy(owner[key])] * draw.choice((1, 2, MOST_COPIES))
    elif kind == 5 and isinstance(owner, list):
        other = draw.randrange(len(owner))
        owner[key], owner[other] = owner[other], owner[key]
    elif kind in (6, 7):
        owner[key] = copy.deepcopy(draw.choice(STRANGE))
    else:
        owner[key] = change_value(owner[key], draw)
    return tree


def replace_dict(tree: Any, old: dict, new: dict) -> None:
    """Puts `new` where a tree has `old`; at the root nothing can be replaced.

    Args:
      tree: dicts and lists.
      old: the dict to replace, by identity.
      new: the dict in its place.
    """
    for owner, key in list_places(tree):
        if owner[key] is old:
            owner[key] = new
            return


def change_value(value: Any, draw: random.Random) -> Any:
    """A value near another one, or of another type."""
    if draw.random() < 0.25:
        wrapped = [[value], {"a": value}, str(value)[:MOST_COPIES], [value, value], None]
        return draw.choice(wrapped)
    match value:
        case bool():
            return draw.choice((not value, int(value), str(value)))
        case int() | float():
            return change_number(value, draw)
        case str():
            return change_string(value, draw)
        case bytes():
            return draw.choice(TEXT)(value, draw)
        case list() if value:
            return draw.choice((value[::-1], value[: len(value) // 2], value + value, []))
        case dict() if value:
            name, other = draw.choice(list(value.items()))
            return draw.choice((value | {f"{name}_": other}, {name: other}, list(value)))
    return draw.choice(STRANGE)


def change_number(value: float, draw: random.Random) -> Any:
    """A number near another one, far from it, or of another type."""
    near = [value + 1, value - 1, 2 * value, -value, value / 2, float(value), str(value)]
    powers = [2 ** draw.randrange(70), 10 ** draw.randrange(20), -(2 ** draw.randrange(40))]
    return draw.choice([*near, *powers, *NUMBERS])


def change_string(text: str, draw: random.Random) -> str:
    """A text near another one; a chat template stays one."""
    if "{%" in text or "{{" in text:
        return change_template(text.encode("utf-8", "surrogatepass"), draw).decode(errors="replace")
    words = [text[::-1], text * 2, text * 5000, text[: len(text) // 2], f" {text}\n", text.upper()]
    words += [draw.choice(string.printable) * draw.choice((1, 40, 100_000)), *TEXTS]
    words += PATTERNS
    return draw.choice(words)
