# SPDX-License-Identifier: Apache-2.0
"""Files as lines of text, one example to a line."""

from collections.abc import Iterator
from pathlib import Path

from t5x_lite.utils.packed_files import open_binary
from t5x_lite.utils.text_lines import TextError, decode_line

# Of one example. A packed file unpacks to a thousand times its size, and may be one line.
MOST_BYTES = 2**28


def check_size(path: Path, place: str, content: bytes | str) -> None:
    """Checks the size of one example.

    Args:
      path: file of the example.
      place: line or row, for the message.
      content: the example.

    Raises:
      ValueError: it is larger than MOST_BYTES.
    """
    if len(content) > MOST_BYTES:
        raise ValueError(
            f"{path}, {place} has more than {MOST_BYTES:,} bytes: no example is so long. Is it "
            "text, one example to a line?"
        )


def decoded_lines(path: Path, errors: str = "strict") -> Iterator[tuple[str, str | TextError]]:
    """Yields numbered lines, or the error of a line that is not UTF-8.

    Raises ValueError for a file whose lines end in CR alone: it would be one line.
    """
    with open_binary(path) as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MOST_BYTES + 1), b""), 1):
            place = f"line {number}"
            check_size(path, place, line)
            if number == 1 and b"\r" in line.rstrip(b"\r\n") and not lines.peek(1):
                raise ValueError(
                    f"{path}: its lines end in CR alone, as those of old Macs; end them in LF: "
                    "tr '\\r' '\\n' < OLD > NEW"
                )
            try:
                yield place, decode_line(line, number, errors)
            except TextError as error:
                yield place, error
