# SPDX-License-Identifier: Apache-2.0
"""Makes the data of configs/runs/restore_lines.gin: lines of Python's standard library, corrupted.

An example is a few lines of a module, at most 160 bytes. In every second of them one character is
lost, doubled, exchanged with its neighbor or replaced; the target is what was there. Splits go by
module, as in the built-in tasks; the same library gives the same files.

  python benchmarks/restore_lines.py --out=data/restore
  python -m t5x_lite.train --gin_file=configs/runs/restore_lines.gin
"""

import argparse
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

from t5x_lite.data import corpora

BYTES = 160
EXAMPLES = {"train": 60_000, "validation": 500, "test": 500}
LETTERS = "abcdefghijklmnopqrstuvwxyz_(),.:=0123456789"


def windows(text: str) -> Iterator[str]:
    """Consecutive lines of a module, as many as fit; those too long are left out."""
    held: list[str] = []
    for line in text.splitlines():
        if sum(len(each) + 1 for each in held) + len(line) > BYTES:
            if held:
                yield "\n".join(held)
            held = []
        if line.strip() and line.isascii() and len(line) <= BYTES:
            held.append(line)


def corrupted(text: str, draw: random.Random) -> str:
    """text with one mistake in about half of its lines."""
    return "\n".join(
        mistaken(line, draw) if draw.random() < 0.5 else line for line in text.split("\n")
    )


def mistaken(line: str, draw: random.Random) -> str:
    """line with one character lost, doubled, exchanged with the next, or replaced."""
    first = len(line) - len(line.lstrip())
    place = draw.randrange(first, len(line))
    before, here, after = line[:place], line[place], line[place + 1 :]
    kind = draw.randrange(4)
    if kind == 0:
        return before + after
    if kind == 1:
        return before + here + here + after
    if kind == 2:
        return before + after[:1] + here + after[1:]
    return before + draw.choice(LETTERS) + after


def examples(split: str) -> list[dict[str, str]]:
    """The split's examples, in an order drawn once and for all."""
    draw = random.Random(f"restore lines {split}")
    texts = [text for row in corpora.stdlib_rows(split) for text in windows(row.targets)]
    draw.shuffle(texts)
    chosen = texts[: EXAMPLES[split]]
    return [{"corrupted": corrupted(text, draw), "original": text} for text in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("data/restore"), help="folder to write to")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for split in EXAMPLES:
        rows = examples(split)
        partial = folder / f"{split}.jsonl.partial"
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(partial, folder / f"{split}.jsonl")
        print(f"{folder / split}.jsonl: {len(rows):,} examples")


if __name__ == "__main__":
    main()
