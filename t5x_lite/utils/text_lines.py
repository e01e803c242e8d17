# SPDX-License-Identifier: Apache-2.0
"""Lines of a file as texts and as JSON objects, and the reason why one is neither.

Readers of training data and of a command's --input share it: a line that is broken for one is
broken for the other, in the same words.
"""

import json
import re
from typing import Any

from t5x_lite.utils.bounded_files import repeated_name

# Byte order mark: some editors begin a UTF-8 file with it.
MARK = b"\xef\xbb\xbf"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
UTF_32 = (b"\xff\xfe\0\0", b"\0\0\xfe\xff")
# Control characters but tab and line feed.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# A comma that ends a list of fields or items.
LAST_COMMA = re.compile(r",(\s*[}\]])")


def escape_controls(text: str) -> str:
    """A text for a terminal, which would obey the control characters of a name in somebody's file:
    they are escapes of Python; line ends and tabs stay."""
    return CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


class TextError(ValueError):
    """Bytes or a line are not the text that is expected; the message says why, not where."""


def decode_line(line: bytes, number: int, errors: str = "strict") -> str:
    """Decodes a line of a UTF-8 file, without the byte order mark.

    Args:
      line: its bytes.
      number: of the line, from 1.
      errors: handling of other bytes, as bytes.decode has it.

    Raises:
      TextError: it is not UTF-8 or has a NUL, and `errors` is "strict".
    """
    if number == 1:
        line = line.removeprefix(MARK)
    try:
        text = line.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 (byte {error.start + 1} is 0x{line[error.start]:02x})"
        if number == 1 and line.startswith(UTF_32):
            reason = "not UTF-8 but UTF-32 (iconv -f UTF-32 -t UTF-8 converts the file)"
        elif number == 1 and line.startswith(UTF_16):
            reason = "not UTF-8 but UTF-16 (iconv -f UTF-16 -t UTF-8 converts the file)"
        raise TextError(reason) from error
    if errors == "strict":
        check_nul(text)
    return text


def check_nul(text: str) -> None:
    """Raises TextError for a NUL: UTF-16 without a byte order mark has one in each letter."""
    place = text.find("\0")
    if place < 0:
        return
    if not text.strip("\0\r\n"):
        raise TextError("not text but NULs, as a crash leaves them: copy the file again")
    if 3 * text.count("\0") > len(text):
        order = "BE" if place == 0 else "LE"
        raise TextError(f"not UTF-8 but UTF-16 (iconv -f UTF-16{order} -t UTF-8 converts the file)")
    raise TextError(f"not text: character {place + 1} is a NUL (tr -d '\\0' takes them out)")


def parse_object(line: str) -> dict[str, Any]:
    """Parses a line as a JSON object.

    Raises:
      TextError: it is something else, or an object with a name twice.
    """
    try:
        content = json.loads(line, object_pairs_hook=unique_fields)
    except TextError:
        raise
    except (ValueError, RecursionError) as error:
        reason = describe_bracket(line) or describe_comma(line) or f"not JSON ({error})"
        raise TextError(reason) from error
    if isinstance(content, dict):
        return content
    if isinstance(content, list):
        raise TextError(describe_bracket("["))
    raise TextError("not a JSON object")


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of names and values; raises TextError for a name that is there twice."""
    twice = repeated_name(pairs)
    if twice is not None:
        raise TextError(f"field {twice!r} is there twice")
    return dict(pairs)


def describe_bracket(line: str) -> str:
    """Message for a line that begins a JSON value of several lines, or an array; "" for others."""
    if line.strip().startswith("["):
        return (
            "a JSON array, where each line should be one object (jq -c '.[]' FILE writes them so)"
        )
    if line.strip() == "{":
        return "an object over several lines, where each should be one object (jq -c . FILE)"
    return ""


def describe_comma(line: str) -> str:
    """Message for a line that would be JSON without a last comma; "" for others."""
    text = line.strip()
    if text.endswith(",") and is_json(text[:-1]):
        return "a comma after the object (sed 's/,[[:space:]]*$//' FILE takes it out)"
    if is_json(LAST_COMMA.sub(r"\1", text)):
        return "a comma before } or ], where JSON has none: take it out"
    return ""


def is_json(text: str) -> bool:
    """True for a text that is JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def check_unicode(text: str) -> None:
    """Raises TextError for half of a surrogate pair, which is not a character: a cut emoji in JSON
    leaves one, "\\ud83d"."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"not Unicode text: character {error.start + 1} is half of a surrogate pair "
            f"(\\u{ord(text[error.start]):04x})"
        ) from None
