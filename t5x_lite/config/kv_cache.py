# SPDX-License-Identifier: Apache-2.0
"""Names of the forms in which a cache holds keys and values (`Decode.kv_cache`)."""

from typing import NamedTuple

from t5x_lite.config.checked import require

BITS = {"auto": None, "int8": 8, "int4": 4}


class CacheFormat(NamedTuple):
    """Form in which caches hold keys and values, of the decoder and of cross-attention.

    Attributes:
      key_bits: bits of a number of the keys, 8 or 4; None for the dtype of computation.
      value_bits: of the values.
      block: tokens of the widest block, for layers with a window: they hold the window and a block
        alone. 0 holds every token in every layer.
    """

    key_bits: int | None = None
    value_bits: int | None = None
    block: int = 0

    @property
    def bits(self) -> tuple[int | None, int | None]:
        """Bits of keys and of values."""
        return self.key_bits, self.value_bits


def parse_kv_cache(name: str) -> CacheFormat:
    """Parses "auto", "int8" or "int8:int4": the form of keys, then that of values.

    Raises:
      ValueError: it is none of these.
    """
    keys, colon, values = name.partition(":")
    values = values if colon else keys
    require(
        keys in BITS and values in BITS,
        f"Decode.kv_cache {name!r} is not one of {', '.join(BITS)}, or two of them for keys and "
        "values, such as int8:int4",
    )
    return CacheFormat(BITS[keys], BITS[values])
