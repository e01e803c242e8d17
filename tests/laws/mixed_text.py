# SPDX-License-Identifier: Apache-2.0
"""A thousand lines of all kinds: source code, manuals in other languages, and drawn scripts."""

import gzip
import itertools
import random
import sysconfig
from pathlib import Path

# Where letters of Cyrillic, Greek, Arabic, Devanagari, Thai, Georgian, Hangul, kana, Han, combining
# marks, emoji and mathematics begin.
SCRIPTS = (
    0x400,
    0x370,
    0x620,
    0x905,
    0xE01,
    0x10A0,
    0xAC00,
    0x3042,
    0x4E00,
    0x300,
    0x1F600,
    0x1D400,
)
PHRASES = (
    "don't",
    "I'LL",
    "we've",
    "naïve",
    "½",
    "x²",
    "x_y=3;",
    "//",
    "…",
    "#!/bin/sh",
    "a\u00a0b",
)
MANUALS = Path("/usr/share/man")


def lines(count: int = 1000) -> list[str]:
    """count lines, the same ones on one machine; at least half of them are drawn by seed."""
    draw = random.Random(0)
    lines = [*itertools.islice(code(), 300), *itertools.islice(manuals(), 200)]
    return [*lines, *(drawn(draw) for _ in range(count - len(lines)))]


def code():
    """Every third line of some modules of the standard library."""
    for name in (
        "argparse.py",
        "decimal.py",
        "html/entities.py",
        "json/decoder.py",
        "idlelib/help.py",
    ):
        path = Path(sysconfig.get_paths()["stdlib"]) / name
        if path.exists():
            text = path.read_text(encoding="utf-8").splitlines()
            yield from itertools.islice(text, 0, 240, 3)


def manuals():
    """Lines of translated manual pages, where the system has them."""
    pages = [MANUALS / language / "man1" for language in ("ja", "ru", "de", "fr", "ko", "zh_CN")]
    for folder in filter(Path.is_dir, pages):
        for page in sorted(folder.glob("*.gz"))[:4]:
            text = gzip.decompress(page.read_bytes()).decode("utf-8", "ignore")
            yield from text.splitlines()[20:40]


def drawn(draw: random.Random) -> str:
    """Words of every script, numbers and runs of spaces in any order."""
    parts = []
    for _ in range(draw.randrange(1, 12)):
        kind = draw.randrange(5)
        if kind == 0:
            parts.append(draw.choice((" ", "  ", "    ", "\t", " " * draw.randrange(1, 20))))
        elif kind == 1:
            parts.append(str(draw.randrange(10 ** draw.randrange(1, 14))))
        elif kind == 2:
            first = draw.choice(SCRIPTS)
            parts += [chr(first + draw.randrange(50)) for _ in range(draw.randrange(1, 7))]
        elif kind == 3:
            parts.append(draw.choice(PHRASES))
        else:
            parts.append(" " + "".join(draw.choices("etaoinshrdlu", k=draw.randrange(1, 8))))
    return "".join(parts)
