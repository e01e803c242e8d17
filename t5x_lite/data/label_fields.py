# SPDX-License-Identifier: Apache-2.0
"""Fields of a record that are labels, numbers or spans, as the text of a target."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_lite.config.readout import BEGIN, INSIDE, OUTSIDE
from t5x_lite.data.fields import FieldError
from t5x_lite.tokenizers.labels import (
    LabelError,
    TextSpan,
    parse_number,
    parse_spans,
    write_labels,
    write_spans,
)
from t5x_lite.utils.text_lines import TextError, check_unicode

# A split without labels has this number in their place.
UNLABELED = -1


def write_target(kind: str, value: Any, names: Sequence[str], text: str) -> str:
    """Value of the field of the targets as the text of a target (`tokenizers.labels`).

    Args:
      kind: Readout.kind.
      value: the value.
      names: names of labels by number; none for a field that has no numbers.
      text: the inputs, for spans.

    Raises:
      FieldError: it is no such target; the message says of which form one is.
    """
    try:
        if kind == "classes":
            return label_name(value, names)
        if kind == "labels":
            items = value if isinstance(value, list) else split_cell(value)
            return write_labels([label_name(item, names) for item in items])
        if kind == "number":
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise FieldError(f"is {type(value).__name__}, no number")
            return repr(parse_number(str(value)))
        return write_spans(read_spans(value, names, text))
    except LabelError as error:
        raise FieldError(str(error)) from None


def label_name(value: Any, names: Sequence[str]) -> str:
    """A label by its name, its number, or true or false."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and names:
        if value == UNLABELED:
            raise FieldError(f"is {UNLABELED}: it has no label")
        if not 0 <= value < len(names):
            raise FieldError(f"is {value}, and there are {len(names)} names of labels")
        return names[value]
    if not isinstance(value, str | int) or value == "":
        raise FieldError(f"is {value!r:.40}, no label: a label is a text or an integer")
    try:
        check_unicode(str(value))
    except TextError as error:
        raise FieldError(f"is {error}") from None
    return str(value)


def split_cell(value: Any) -> list[str]:
    """Labels in a cell of a table: a JSON list, or names between commas."""
    if not isinstance(value, str):
        raise FieldError(f"is {type(value).__name__}, no list of labels")
    if value.lstrip().startswith("["):
        return parse_list(value)
    return [name.strip() for name in value.split(",") if name.strip()]


def parse_list(value: str) -> list[Any]:
    """A cell as a JSON list."""
    try:
        items = json.loads(value)
    except (ValueError, RecursionError):
        items = None
    if not isinstance(items, list):
        raise FieldError(f"is {value!r:.40}, no JSON list")
    return items


def read_spans(value: Any, names: Sequence[str], text: str) -> list[TextSpan]:
    """Spans of a text: as they are, or of a list with a tag for each word.

    Args:
      value: [[begin, end, name], ...], [{"start": 0, "end": 5, "label": "x"}, ...], or the tag of
        each word of the text, which stand between single spaces.
      names: names of labels by number.
      text: the text.
    """
    items = parse_list(value) if isinstance(value, str) else value
    if not isinstance(items, list):
        raise FieldError(f"is {type(items).__name__}, no list of spans")
    if items and all(isinstance(item, str | int) and not isinstance(item, bool) for item in items):
        return spans_of_words([label_name(item, names) for item in items], text)
    spans = [span_values(item) for item in items]
    return parse_spans(json.dumps(spans), len(text))


def span_values(item: Any) -> list[Any]:
    """A span as [begin, end, name]."""
    if isinstance(item, Mapping):
        missing = [name for name in ("start", "end", "label") if name not in item]
        if missing:
            raise FieldError(f"has a span without {missing[0]!r}")
        return [item["start"], item["end"], item["label"]]
    return item


def spans_of_words(tags: list[str], text: str) -> list[TextSpan]:
    """Spans of words with a tag each: "B-NAME", "I-NAME" and "O", or any name for one word."""
    words = text.split(" ")
    if len(words) != len(tags):
        raise FieldError(
            f"has {len(tags)} tags, but the inputs are {len(words)} words between single spaces"
        )
    chunked = all(tag == OUTSIDE or tag.startswith((BEGIN, INSIDE)) for tag in tags)
    spans: list[TextSpan] = []
    begin, before = 0, OUTSIDE
    for word, tag in zip(words, tags, strict=True):
        end = begin + len(word)
        name = tag[len(BEGIN) :] if chunked else tag
        if tag != OUTSIDE:
            goes_on = chunked and tag.startswith(INSIDE) and before[len(BEGIN) :] == name
            if goes_on and spans:
                spans[-1] = spans[-1]._replace(end=end)
            else:
                spans.append(TextSpan(begin, end, name))
        begin, before = end + 1, tag
    return spans
