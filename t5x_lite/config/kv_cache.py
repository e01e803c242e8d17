# SPDX-License-Identifier: Apache-2.0
"""Names of the forms in which a cache holds keys and values (`Decode.kv_cache`)."""

import re
from typing import NamedTuple

from t5x_lite.config.checked import require

BITS = {"auto": None, "int8": 8, "int4": 4}
CHECKPOINTS = re.compile(r"checkpoints:(\d{1,6}):(\d{1,6})")


class CacheFormat(NamedTuple):
    """Form in which caches hold keys and values, of the decoder and of cross-attention.

    Attributes:
      key_bits: bits of a number of the keys, 8 or 4; None for the dtype of computation.
      value_bits: of the values.
      block: tokens of the widest block, for layers with a window: they hold the window and a block
        alone. 0 holds every token in every layer.
      segment: tokens of a segment that is kept as one checkpoint; 0 for none.
      recent: tokens that are kept one by one besides.
    """

    key_bits: int | None = None
    value_bits: int | None = None
    block: int = 0
    segment: int = 0
    recent: int = 0

    @property
    def bits(self) -> tuple[int | None, int | None]:
        """Bits of keys and of values."""
        return self.key_bits, self.value_bits


def parse_kv_cache(name: str) -> CacheFormat:
    """Parses "int8", "int8:int4" (keys, then values), "checkpoints:16:512" or both, with a plus.

    Raises:
      ValueError: it is none of these.
    """
    bits, _, rest = name.partition("+")
    if bits.startswith("checkpoints"):
        bits, rest = "auto", name
    compressed = CHECKPOINTS.fullmatch(rest)
    segment, recent = (int(number) for number in compressed.groups()) if compressed else (0, 0)
    require(
        not rest and "+" not in name or (2 <= segment <= recent and recent >= 64),
        f"Decode.kv_cache {name!r}: checkpoints:SEGMENT:RECENT has segments of 2 tokens and more, "
        "and 64 recent tokens and more, such as checkpoints:16:512",
    )
    keys, colon, values = bits.partition(":")
    values = values if colon else keys
    require(
        keys in BITS and values in BITS,
        f"Decode.kv_cache {name!r} is not one of {', '.join(BITS)}, or two of them for keys and "
        "values, such as int8:int4; or checkpoints:16:512, also after one of them and a plus",
    )
    return CacheFormat(BITS[keys], BITS[values], segment=segment, recent=recent)
