# SPDX-License-Identifier: Apache-2.0
"""Edits that know no format: of bytes (bits, cuts, splices, header fields) and of text (tokens,
lines, depth, Unicode). Each is a function of the content and a random generator."""

import json
import random
import re

TEXTS = ["", "\x00", "\ud800", "é\u202e\u2028ﬁ", "x" * 5000, "../../../etc/passwd", "/etc/passwd"]
NUMBERS = [0, -1, 1, 2**31, 2**32 - 1, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("inf")]
STRANGE = [*TEXTS, *NUMBERS, float("nan"), None, True, [], {}, [[]], [1, "a"], {"": None}]
# Numbers as people and programs write them, some of which no parser has to take.
NUMERALS = ["-1", "0", "1e999", "-1e-999", "NaN", "9" * 5000, "9" * 80_000, "99999999999", "0x7f"]
NUMERALS += ["1.5", "1_0", "-0", "007", "1e", "Infinity", "+1", "١٢", "4294967296", str(2**64)]
# Integers as binary headers have them: the largest, the smallest, and powers near sizes of things.
FIELDS = [
    value.to_bytes(size, order)
    for order in ("little", "big")
    for size in (1, 2, 4, 8)
    for value in (0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (8 * size - 1) - 1)
] + [(2**40).to_bytes(8, "little"), (2**24).to_bytes(4, "little"), (2**24).to_bytes(8, "little")]
ENCODINGS = ("utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8-sig", "utf-7", "cp1252")


def choose_span(content: bytes, draw: random.Random, longest: int = 64) -> slice:
    """A part of content, rather near its beginning, where most files have their headers.

    Args:
      content: bytes of a file.
      draw: random generator.
      longest: largest length.
    """
    reach = draw.choice((64, 512, len(content)))
    begin = draw.randrange(max(1, min(reach, len(content))))
    return slice(begin, min(len(content), begin + draw.randint(1, longest)))


def replace_span(content: bytes, where: slice, by: bytes) -> bytes:
    """Replaces a part of content.

    Args:
      content: bytes of a file.
      where: the part.
      by: its new bytes.
    """
    return content[: where.start] + by + content[where.stop :]


def flip_bits(content: bytes, draw: random.Random) -> bytes:
    """Flips one or a few bits."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8)) if changed else 0):
        changed[choose_span(content, draw).start] ^= 1 << draw.randrange(8)
    return bytes(changed)


def truncate(content: bytes, draw: random.Random) -> bytes:
    """Cuts content off."""
    return content[: draw.choice((0, 1, draw.randrange(len(content) + 1), len(content) - 1))]


def remove_span(content: bytes, draw: random.Random) -> bytes:
    """Removes a part."""
    return replace_span(content, choose_span(content, draw), b"")


def insert_noise(content: bytes, draw: random.Random) -> bytes:
    """Inserts random bytes."""
    at = choose_span(content, draw).start
    return replace_span(content, slice(at, at), draw.randbytes(draw.randint(1, 32)))


def splice(content: bytes, draw: random.Random) -> bytes:
    """Replaces a part by copies of another one."""
    copied = content[choose_span(content, draw, 256)] * draw.choice((1, 1, 2, 30))
    return replace_span(content, choose_span(content, draw), copied)


def overwrite_field(content: bytes, draw: random.Random) -> bytes:
    """Overwrites bytes with an integer that fields of headers use."""
    by, at = draw.choice(FIELDS), choose_span(content, draw).start
    return replace_span(content, slice(at, at + len(by)), by)


def replace_token(content: bytes, draw: random.Random) -> bytes:
    """Replaces a number, a name or a quoted text by another, or by what it cannot be."""
    tokens = list(re.finditer(rb'"[^"\n]*"|-?\d[\d.eE+-]*|\w+', content))
    if not tokens:
        return insert_noise(content, draw)
    chosen = draw.choice(tokens)
    others = [draw.choice(tokens)[0], draw.choice(NUMERALS).encode()]
    others.append(json.dumps(draw.choice(STRANGE)).encode())
    return replace_span(content, slice(*chosen.span()), draw.choice(others))


def move_line(content: bytes, draw: random.Random) -> bytes:
    """Repeats, removes, empties or moves a line."""
    lines = content.split(b"\n")
    at = draw.randrange(len(lines))
    line = lines.pop(at)
    lines[at:at] = draw.choice(([], 2 * [line], [b""], [line.strip() + b" " + line], 5000 * [b""]))
    if draw.random() < 0.3:
        lines.insert(draw.randrange(len(lines) + 1), line)
    return b"\n".join(lines)


def nest(content: bytes, draw: random.Random) -> bytes:
    """Inserts deeply nested brackets or quotes."""
    at, deep = choose_span(content, draw).start, draw.choice((3, 200, 100_000))
    left, right = draw.choice(((b"[", b"]"), (b'{"a":', b"}"), (b"(", b")"), (b'"', b"")))
    return replace_span(content, slice(at, at), deep * left + deep * draw.choice((right, b"")))


def insert_unicode(content: bytes, draw: random.Random) -> bytes:
    """Inserts unusual Unicode texts or byte order marks."""
    at = choose_span(content, draw).start
    strange = [text.encode("utf-8", "surrogatepass") for text in TEXTS]
    by = draw.choice([*strange, b"\xff\xfe", b"\xef\xbb\xbf", b"\xc0\x80", b"\xed\xa0\x80"])
    return replace_span(content, slice(at, at), by)


def change_encoding(content: bytes, draw: random.Random) -> bytes:
    """Writes the text, or a part of it, in another encoding."""
    where = draw.choice((slice(0, len(content)), choose_span(content, draw)))
    text = content[where].decode("utf-8", "replace")
    return replace_span(content, where, text.encode(draw.choice(ENCODINGS), "ignore"))


def change_newlines(content: bytes, draw: random.Random) -> bytes:
    """Ends lines otherwise, some of them or all."""
    ending = draw.choice((b"\r\n", b"\r", b"\n\r", b"\x0b", b"\x85", b"\n\n", b"", b"\x00"))
    return content.replace(b"\n", ending, draw.choice((1, -1)))


def insert_separators(content: bytes, draw: random.Random) -> bytes:
    """Inserts tabs, quotes and the like, which mean something in tables."""
    at = choose_span(content, draw).start
    by = draw.choice((b"\t", b'"', b'""', b"\t\t\t", b"'", b"\\", b",", b"\t" * 10_000, b'"\n"'))
    return replace_span(content, slice(at, at), by)


def lengthen(content: bytes, draw: random.Random) -> bytes:
    """Repeats a part until it has up to some million bytes."""
    where = choose_span(content, draw, draw.choice((1, 8, 64)))
    return replace_span(content, where, content[where] * draw.choice((100, 20_000)))


BYTES = [flip_bits, flip_bits, truncate, remove_span, insert_noise, splice, overwrite_field]
BYTES += [overwrite_field]
TEXT = [replace_token, replace_token, replace_token, move_line, nest, insert_unicode]
TEXT += [change_encoding, change_newlines, insert_separators, lengthen]
