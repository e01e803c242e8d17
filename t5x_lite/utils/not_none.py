# SPDX-License-Identifier: Apache-2.0
"""Optional values that are known to be there, for the type checker."""

from typing import TypeVar

T = TypeVar("T")


def not_none(value: T | None) -> T:
    """Returns value, asserting that it is not None."""
    assert value is not None
    return value
