# SPDX-License-Identifier: Apache-2.0
"""Labels and numbers as ids: the targets of a model with `Model.readout`.

A target is written as text: the name of a class, a JSON list of labels, a number, or a JSON list of
spans [begin, end, name] in characters of the input, whose tags stand one for each of its tokens.
"""

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from t5x_lite.config.readout import BEGIN, INSIDE, OUTSIDE
from t5x_lite.tokenizers.offsets import token_offsets
from t5x_lite.tokenizers.vocabulary import TextVocabulary
from t5x_lite.utils.nearest import suggest

# A number is an id: the bits of its float32 without the last, which cannot be negative.
NUMBERS = 2**31


class LabelError(ValueError):
    """A target is not what the readout says of a text; the message says why."""


class TextSpan(NamedTuple):
    """A named part of a text.

    Attributes:
      begin: its first character.
      end: the character after its last.
      name: its name.
    """

    begin: int
    end: int
    name: str


class LabelVocabulary:
    """The targets of a readout as ids.

    classes    the number of the label
    labels     1 or 0 for each label
    number     one id, which keeps 22 bits of the fraction
    tags       the number of the tag of each token of the input, 0 (OUTSIDE) for its end

    Attributes:
      outputs: Readout.kind.
      names: Readout.labels.
    """

    sentinels, pad, bos, ends = 0, 0, None, False
    sentinel_ids = np.zeros(0, np.int32)
    stops: tuple[int, ...] = ()

    def __init__(self, outputs: str, names: Sequence[str] = ()):
        self.outputs, self.names = outputs, tuple(names)
        self.ids = {name: number for number, name in enumerate(self.names)}
        # A text that is cut keeps its end, and with this eos its tags keep OUTSIDE.
        self.outside = self.ids.get(OUTSIDE, 0)
        self.eos = self.outside if outputs == "tags" else -1
        self.size = {"labels": 2, "number": NUMBERS}.get(outputs, len(self.names))

    def token(self, name: str) -> int | None:
        return self.ids.get(name)

    def encode(self, text: str) -> list[int]:
        """The ids of a target; those of tags need the input, see `encode_tags`.

        Raises:
          LabelError: it is not a target of this readout.
        """
        if self.outputs == "number":
            return [encode_number(parse_number(text))]
        if self.outputs == "labels":
            chosen = {self.find_label(name) for name in parse_labels(text)}
            return [int(number in chosen) for number in range(len(self.names))]
        return [self.find_label(text)]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self.encode(text), np.int32) for text in texts]

    def encode_tags(self, text: str, spans: str, vocabulary: TextVocabulary) -> np.ndarray:
        """The tag of every token of an input, as `vocabulary` reads it.

        Args:
          text: the input.
          spans: its spans, JSON.
          vocabulary: of the input.

        Raises:
          LabelError: a span has no token, an unknown name, or lies in another one.
        """
        offsets = token_offsets(vocabulary, text)
        tags = np.full(len(offsets), self.outside, np.int32)
        for span in parse_spans(spans, len(text)):
            begins, goes_on = self.find_tags(span.name)
            first = True
            for place, (begin, end) in enumerate(offsets):
                if begin < end and begin < span.end and end > span.begin:
                    if tags[place] != self.outside and first:
                        continue  # the token is the end of the span before
                    tags[place] = begins if first else goes_on
                    first = False
            if first:
                raise LabelError(
                    f"the span {span.begin} to {span.end} ({text[span.begin : span.end]!r:.40}) "
                    "has no token of its own"
                )
        return tags

    def find_label(self, name: str) -> int:
        """The number of a label; raises LabelError for an unknown one."""
        if name in self.ids:
            return self.ids[name]
        known = [name_of_tag(each) for each in self.names] if self.outputs == "tags" else self.names
        hint = suggest(name, dict.fromkeys(known))
        raise LabelError(f"{name!r:.60} is none of Model.readout's labels: {hint}")

    def find_tags(self, name: str) -> tuple[int, int]:
        """Numbers of the tags of a span's first token, and of its others."""
        if f"{BEGIN}{name}" in self.ids and f"{INSIDE}{name}" in self.ids:
            return self.ids[f"{BEGIN}{name}"], self.ids[f"{INSIDE}{name}"]
        return self.find_label(name), self.find_label(name)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The target of ids; of tags their names, between spaces."""
        ids = [int(token) for token in ids]
        if self.outputs == "number":
            return " ".join(repr(decode_number(token)) for token in ids)
        if self.outputs == "labels":
            return write_labels([name for name, flag in zip(self.names, ids, strict=False) if flag])
        return " ".join(self.names[token] for token in ids if 0 <= token < len(self.names))

    def description(self) -> dict:
        return {"kind": "labels", "outputs": self.outputs, "names": list(self.names)}

    def model_bytes(self) -> bytes | None:
        return None


def largest_id_count(pair: Sequence[TextVocabulary]) -> int:
    """Number of ids of the largest of the vocabularies of text: labels are not the model's ids."""
    return max(each.size for each in pair if not isinstance(each, LabelVocabulary))


def encode_number(value: float) -> int:
    """The id of a number.

    Raises:
      LabelError: it is no finite float32.
    """
    with np.errstate(over="ignore"):
        narrow = np.float32(value)
    if not math.isfinite(value) or not np.isfinite(narrow):
        raise LabelError(f"{value} is not a finite number of float32")
    bits = int(narrow.view(np.uint32))
    rounded = bits + 1 if bits & 3 == 3 and bits & 0x7FFFFFFF < 0x7F7FFFFF else bits
    return rounded >> 1


def decode_number(token: int) -> float:
    """The number of an id."""
    return float(np.uint32(token << 1).view(np.float32))


def parse_number(text: str) -> float:
    """A target as a number; raises LabelError if it is none."""
    try:
        return float(text)
    except ValueError:
        raise LabelError(f"{text!r:.60} is no number") from None


def parse_labels(text: str) -> list[str]:
    """A target as a list of labels; raises LabelError if it is none."""
    names = parse_json(text)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise LabelError(f"{text!r:.60} is no JSON list of labels")
    return names


def write_labels(names: Sequence[str]) -> str:
    """Labels as the text of a target."""
    return json.dumps(list(names), ensure_ascii=False)


def parse_spans(text: str, length: int) -> list[TextSpan]:
    """Spans of a target, in order; the text that they are in has `length` characters.

    Raises:
      LabelError: they are none, lie outside of the text, or overlap.
    """
    items, spans = parse_json(text), []
    if not isinstance(items, list):
        raise LabelError(f"{text!r:.60} is no JSON list of spans")
    for each in items:
        try:
            begin, end, name = each
            valid = type(begin) is int and type(end) is int and isinstance(name, str)
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise LabelError(f"{each!r:.60} is no span [begin, end, name]")
        if not 0 <= begin < end <= length:
            raise LabelError(f"the span {begin} to {end} is not in the {length} characters of text")
        spans.append(TextSpan(begin, end, name))
    spans.sort()
    for before, after in zip(spans, spans[1:], strict=False):
        if after.begin < before.end:
            raise LabelError(
                f"the spans {before.begin} to {before.end} and {after.begin} to {after.end} overlap"
            )
    return spans


def parse_json(text: str) -> object:
    """A target as JSON; raises LabelError if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise LabelError(f"{text!r:.60} is no JSON list") from None


def write_spans(spans: Sequence[TextSpan]) -> str:
    """Spans as the text of a target."""
    return json.dumps([list(span) for span in spans], ensure_ascii=False)


def name_of_tag(tag: str) -> str:
    """The name of the span that a tag is part of."""
    return tag[len(BEGIN) :] if tag.startswith((BEGIN, INSIDE)) else tag


def spans_of_tags(
    tags: Sequence[str], offsets: Sequence[tuple[int, int]], text: str
) -> list[tuple[TextSpan, list[int]]]:
    """Spans that tags mark, each with the places of its tokens.

    An inside tag that continues no span of its name begins one, as conlleval counts it.

    Args:
      tags: name of the tag of each token.
      offsets: characters of each token.
      text: the text.
    """
    groups: list[tuple[str, list[int]]] = []
    before = OUTSIDE
    for place, tag in enumerate(tags):
        name, empty = name_of_tag(tag), offsets[place][0] == offsets[place][1]
        if tag == OUTSIDE or empty:
            before = OUTSIDE
            continue
        if tag.startswith(BEGIN) or before == OUTSIDE or name_of_tag(before) != name:
            groups.append((name, []))
        groups[-1][1].append(place)
        before = tag
    spans = []
    for name, places in groups:
        begin, end = offsets[places[0]][0], offsets[places[-1]][1]
        inner = text[begin:end]
        begin += len(inner) - len(inner.lstrip())
        end = max(end - (len(inner) - len(inner.rstrip())), begin)
        if begin < end:
            spans.append((TextSpan(begin, end, name), places))
    return spans
