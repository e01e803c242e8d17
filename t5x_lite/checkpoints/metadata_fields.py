# SPDX-License-Identifier: Apache-2.0
"""Types of the fields of a checkpoint's metadata, which may be a file from elsewhere: its checksum
shows damage, and anybody can compute one."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from t5x_lite.checkpoints import digests
from t5x_lite.config.checked import LARGEST_INT


def is_int(value: Any) -> bool:
    """True for an integer that a size or a digest may have; bool is none."""
    return type(value) is int and 0 <= value < 2**64


def is_number(value: Any) -> bool:
    """True for a number in the range of floats."""
    return isinstance(value, float) or (type(value) is int and value.bit_length() < 1000)


def is_text(value: Any) -> bool:
    """True for a text that UTF-8 can hold."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_array(value: Any) -> bool:
    """True for the description of an array: shape, dtype and digests."""
    if not isinstance(value, dict) or not isinstance(value.get("shape"), list):
        return False
    stored = [value[name] for name in (digests.MIXED, digests.LINEAR) if name in value]
    numbers = [*value["shape"], *stored]
    return bool(stored) and all(map(is_int, numbers)) and is_dtype(value.get("dtype"))


def is_dtype(value: Any) -> bool:
    """True for the name of a dtype of arrays."""
    try:
        dtype = np.dtype(value) if isinstance(value, str) else np.dtype(np.void)
    except (TypeError, ValueError):
        return False
    # Those of ml_dtypes are of kind V, and no records.
    return dtype.kind in "biufV" and dtype.type is not np.void


def is_dict_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A check of dictionaries whose values pass another one."""
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def is_best(value: Any) -> bool:
    """True for None, or the name of a metric and whether higher is better."""
    if value is None:
        return True
    return isinstance(value, list) and [type(each) for each in value] == [str, bool]


def has_items(value: Any) -> bool:
    """True for the arrays of the weights, and of what else a run saves."""
    return is_dict_of(is_dict_of(is_array))(value) and "params" in value


FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "step": lambda value: is_int(value) and value <= LARGEST_INT,
    "config": is_text,
    "data": lambda value: isinstance(value, dict),
    "metrics": is_dict_of(is_number),
    "totals": is_dict_of(is_number),
    "best": is_best,
    "arrays": has_items,
    "base": is_dict_of(is_int),
}
REQUIRED = ("step", "config", "arrays")


def check_fields(values: Mapping[str, Any]) -> None:
    """Raises ValueError, which names the field, where one is missing or of another type."""
    for name in REQUIRED:
        if name not in values:
            raise ValueError(f"it has no {name}")
    for name, value in values.items():
        if name in FIELDS and not FIELDS[name](value):
            raise ValueError(f"its {name} is {value!r:.80}, as no run writes it")
