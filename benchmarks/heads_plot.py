# SPDX-License-Identifier: Apache-2.0
"""Tokens per call against the size of a block, one line per way to train the heads."""

from collections import defaultdict
from pathlib import Path

import report


def draw(rows: list[report.Row], path: str | Path) -> None:
    """Writes the picture to path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row.metric == "tokens per call after the first":
            lines[row.system][int(row.case.removeprefix("k = "))] = row.value
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for system, values in lines.items():
        blocks = sorted(values)
        axes.plot(blocks, [values[block] for block in blocks], marker="o", label=system)
    axes.set_xlabel("tokens in a block, k")
    axes.set_ylabel("tokens per call")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
