# SPDX-License-Identifier: Apache-2.0
"""Table of measured latencies in the user's cache: rows of seconds, or of their ratios, by key."""

import contextlib
import json
import math
import os
from pathlib import Path

from t5x_lite.utils import bounded_files
from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.paths import cache_folder, local_path

VARIABLE = "T5X_LITE_COSTS"


def cache_path() -> Path:
    """Path of the table: T5X_LITE_COSTS in the environment, or in the user's cache."""
    named = os.environ.get(VARIABLE)
    return local_path(named) if named else cache_folder() / "costs.json"


def read_table(path: Path) -> dict[str, list[float]]:
    """Returns the latencies by key; none from a file that is missing or damaged."""
    try:
        table = bounded_files.read_json_object(path)
    except (OSError, ValueError):
        return {}

    def is_valid(row):
        return isinstance(row, list) and all(
            isinstance(x, float) and math.isfinite(x) and x > 0 for x in row
        )

    return {name: row for name, row in table.items() if is_valid(row)}


def save_row(path: Path, name: str, seconds: list[float]) -> dict[str, list[float]]:
    """Adds a row to the table, and replaces its file in one move.

    Args:
      path: the file; one that cannot be written is left as it is.
      name: key of the row.
      seconds: the row.

    Returns:
      The table with the row.
    """
    table = read_table(path) | {name: seconds}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(table, indent=1) + "\n")
    return table
