# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that travel with the package, by their names: --checkpoint=g2p."""

import sys
from pathlib import Path

# A Hugging Face folder for each, with its model card.
FOLDER = Path(__file__).resolve().parents[1] / "checkpoints" / "packaged"


def packaged_names() -> list[str]:
    """Names of the packaged checkpoints."""
    return sorted(config.parent.name for config in FOLDER.glob("*/config.json"))


def find_packaged(text: str) -> Path | None:
    """The folder of the packaged checkpoint that a source names; None for another source.

    A local file or folder of that name wins, which one line on stderr says.
    """
    if text not in packaged_names():
        return None
    folder = FOLDER / text
    if Path(text).exists():
        print(
            f"{text} is the folder here; the packaged checkpoint {text} is {folder}",
            file=sys.stderr,
        )
        return None
    return folder
