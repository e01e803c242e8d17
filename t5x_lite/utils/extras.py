# SPDX-License-Identifier: Apache-2.0
"""Commands that install an extra; the package is on no index, so its name alone is not enough."""

import importlib.metadata
import re
from pathlib import Path

NAME = "t5x_lite"
ROOT = Path(__file__).resolve().parents[2]


def install_command(extra: str) -> str:
    """The pip command that installs an extra: of the clone, or what the installed package requires.

    Args:
      extra: name of the extra, such as "plan".
    """
    if (ROOT / "pyproject.toml").exists():
        return f"pip install '{ROOT}[{extra}]'"
    return "pip install " + " ".join(f"'{each}'" for each in extra_requirements(extra))


def extra_requirements(extra: str) -> list[str]:
    """Requirements of an extra by the metadata of the installed package, without their markers."""
    wanted = []
    for requirement in importlib.metadata.requires(NAME) or []:
        what, _, marker = requirement.partition(";")
        if re.search(rf"""extra == ['"]{re.escape(extra)}['"]""", marker):
            wanted.append(what.strip())
    return wanted
