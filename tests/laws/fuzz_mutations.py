# SPDX-License-Identifier: Apache-2.0
"""Broken files from whole ones, by seed: bits, cuts, splices, huge numbers, wrong types, depth."""

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

TEXTS = ["", "\x00", "\ud800", "é\u202e\u2028ﬁ", "x" * 5000, "../../../etc/passwd", "/etc/passwd"]
NUMBERS = [0, -1, 1, 2**31, 2**32 - 1, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("inf")]
STRANGE = [*TEXTS, *NUMBERS, float("nan"), None, True, [], {}, [[]], [1, "a"], {"": None}]
WRITTEN = ["-1", "0", "1e999", "-1e-999", "NaN", "9" * 5000, "99999999999", "0x7f", "1.5", "1_0"]
# Whole numbers as files have them: the largest, the smallest, and powers around sizes of things.
FIELDS = [
    value.to_bytes(size, "little")
    for size in (1, 2, 4, 8)
    for value in (0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (8 * size - 1) - 1)
] + [(2**40).to_bytes(8, "little"), (2**24).to_bytes(4, "little"), (2**24).to_bytes(8, "little")]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """content with one to four things wrong; never content itself."""
    changed = content
    while changed == content:
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            kinds = [BYTES, BYTES, TEXT] if is_text(changed) else [BYTES]
            structured = json_of(changed)
            if structured is not None:
                kinds += 3 * [[lambda _, draw, tree=structured: changed_json(tree, draw)]]
            changed = draw.choice(draw.choice(kinds))(changed, draw)
    return changed


def is_text(content: bytes) -> bool:
    """True for content without a zero byte at its beginning."""
    return b"\x00" not in content[:4096] and len(content) > 0


def json_of(content: bytes) -> Any:
    """The object or list that content is as JSON, None if it is none."""
    if content[:1] not in (b"{", b"["):
        return None
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def span(content: bytes, draw: random.Random, most: int = 64) -> slice:
    """A part of content, rather near its beginning, where most files have their headers.

    Args:
      content: bytes of a file.
      draw: random generator.
      most: largest length.
    """
    reach = draw.choice((64, 512, len(content)))
    begin = draw.randrange(max(1, min(reach, len(content))))
    return slice(begin, min(len(content), begin + draw.randint(1, most)))


def replaced(content: bytes, where: slice, by: bytes) -> bytes:
    """Replaces a part of content.

    Args:
      content: bytes of a file.
      where: the part.
      by: its new bytes.
    """
    return content[: where.start] + by + content[where.stop :]


def flip(content: bytes, draw: random.Random) -> bytes:
    """Flips one or a few bits."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8)) if changed else 0):
        changed[span(content, draw).start] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(content: bytes, draw: random.Random) -> bytes:
    """Truncates content."""
    return content[: draw.choice((0, 1, draw.randrange(len(content) + 1), len(content) - 1))]


def remove(content: bytes, draw: random.Random) -> bytes:
    """Removes a part."""
    return replaced(content, span(content, draw), b"")


def insert(content: bytes, draw: random.Random) -> bytes:
    """Inserts random bytes."""
    at = span(content, draw).start
    return replaced(content, slice(at, at), draw.randbytes(draw.randint(1, 32)))


def splice(content: bytes, draw: random.Random) -> bytes:
    """Replaces a part by copies of another one."""
    there = span(content, draw, 256)
    return replaced(content, span(content, draw), content[there] * draw.choice((1, 1, 2, 30)))


def field(content: bytes, draw: random.Random) -> bytes:
    """Overwrites bytes with an integer that fields of headers use."""
    by, at = draw.choice(FIELDS), span(content, draw).start
    return replaced(content, slice(at, at + len(by)), by)


def token(content: bytes, draw: random.Random) -> bytes:
    """A number, a name or a quoted text replaced by another, or by what it cannot be."""
    tokens = list(re.finditer(rb'"[^"\n]*"|-?\d[\d.eE+-]*|\w+', content))
    if not tokens:
        return insert(content, draw)
    chosen = draw.choice(tokens)
    others = [draw.choice(tokens)[0], draw.choice(WRITTEN).encode()]
    others.append(json.dumps(draw.choice(STRANGE)).encode())
    return replaced(content, slice(*chosen.span()), draw.choice(others))


def line(content: bytes, draw: random.Random) -> bytes:
    """A line twice, gone, empty, or in another place."""
    lines = content.split(b"\n")
    at = draw.randrange(len(lines))
    taken = lines.pop(at)
    lines[at:at] = draw.choice(([], 2 * [taken], [b""], [taken.strip() + b" " + taken]))
    if draw.random() < 0.3:
        lines.insert(draw.randrange(len(lines) + 1), taken)
    return b"\n".join(lines)


def nest(content: bytes, draw: random.Random) -> bytes:
    """Inserts deeply nested brackets or quotes."""
    at, deep = span(content, draw).start, draw.choice((3, 200, 100_000))
    left, right = draw.choice(((b"[", b"]"), (b'{"a":', b"}"), (b"(", b")"), (b'"', b"")))
    return replaced(content, slice(at, at), deep * left + deep * draw.choice((right, b"")))


def unicode(content: bytes, draw: random.Random) -> bytes:
    """Inserts unusual Unicode texts or byte order marks."""
    at = span(content, draw).start
    strange = [text.encode("utf-8", "surrogatepass") for text in TEXTS]
    return replaced(content, slice(at, at), draw.choice([*strange, b"\xff\xfe", b"\xef\xbb\xbf"]))


BYTES = [flip, flip, cut, remove, insert, splice, field, field]
TEXT = [token, token, token, line, nest, unicode]


def nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a tree of JSON, as its container and the key or index in it."""
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from nodes(tree[key])


def changed_json(tree: Any, draw: random.Random) -> bytes:
    """A tree of JSON with one place gone, of another type, or elsewhere's value."""
    # What lies deep is most of a tokenizer; what lies near the root is most of what matters.
    top = [(tree, key) for key in tree] if isinstance(tree, dict) else []
    places = [place for _, place in zip(range(2000), nodes(tree), strict=False)]
    if not places:
        return json.dumps(draw.choice(STRANGE)).encode()
    owner, key = draw.choice(draw.choice([top or places, places]))
    kind = draw.randrange(6)
    if kind == 0:
        del owner[key]
    elif kind == 1:
        other, there = draw.choice(places)
        owner[key] = copy.deepcopy(other[there])
    elif kind == 2 and isinstance(owner, dict):
        owner[draw.choice([text for text in TEXTS if len(text) < 100])] = owner.pop(key)
    else:
        owner[key] = copy.deepcopy(draw.choice(STRANGE))
    return json.dumps(tree, ensure_ascii=draw.random() < 0.9).encode("utf-8", "surrogatepass")


def headed(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file with something wrong in its header, whose length fits."""
    length = int.from_bytes(content[:8], "little")
    header = mutated(content[8 : 8 + length], draw)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


Mutate = Callable[[bytes, random.Random], bytes]


def of_file(name: str) -> Mutate:
    """Mutation for a file of this name: safetensors in their headers too."""
    if not name.endswith(".safetensors"):
        return mutated
    return lambda content, draw: draw.choice((mutated, headed))(content, draw)
