# SPDX-License-Identifier: Apache-2.0
"""Write the generated pages of docs/: reference/config.md and benchmarks.md.

python launch/pages.py
"""

import argparse
import dataclasses
import inspect
import re
import sys
import types
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import page as benchmarks_page  # noqa: E402

from t5x_lite import config  # noqa: E402
from t5x_lite.config.checked import Range  # noqa: E402

CONFIG_PAGE = ROOT / "docs" / "reference" / "config.md"

HEAD = """\
# Config reference

<!-- Written by launch/pages.py from the dataclasses of t5x_lite.config. -->

Every field that a `.gin` file can bind: `config.Stack.layers = 12`, or
`encoder/config.Stack.layers = 6` for one of several instances. `config.Run` is the root; a field
that holds another dataclass is bound as `@config.SpanCorruption()`. [Configs](../configs.md)
explains the syntax, and `--dry_run` prints the tree as it is resolved. "required" marks fields
without a default.
"""

# From the root down; a dataclass that is not listed here is missed by the test of this page.
GROUPS = {
    "A run": ("Run",),
    "Model": ("Model", "Stack", "RotaryScaling", "DraftHeads", "Canvas", "Readout"),
    "Data": ("Data", "Files", "HubDataset", "Mixture", "Vocabulary"),
    "Objectives": (
        "SpanCorruption",
        "PrefixLM",
        "CausalLM",
        "FillInTheMiddle",
        "MaskedNames",
        "NameTags",
        "Denoisers",
    ),
    "Training": ("Train", "Schedule", "Optimizer", "ParamGroup", "DraftHeadLoss", "LayerSkip")
    + ("WeightAverage", "Contrastive"),
    "Evaluation, checkpoints, decoding, devices": ("Evaluate", "Checkpoint", "Decode", "Mesh"),
    "Adapters, preferences, adaptation, distillation, comparison": (
        "Lora",
        "Preferences",
        "Grpo",
        "Adaptation",
        "Distillation",
        "Compare",
    ),
}


def type_text(kind) -> str:
    """A field's type as a reader writes it: int, Stack or None, "mean" or "first"."""
    if kind is type(None):
        return "None"
    if kind is Ellipsis:
        return "..."
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return range_text(*inner)
    if origin is Literal:
        return " or ".join(
            f'"{value}"' if isinstance(value, str) else str(value) for value in inner
        )
    if origin is types.UnionType or str(origin) == "typing.Union":
        return " or ".join(map(type_text, inner))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(type_text, inner))}]"
    return getattr(kind, "__name__", str(kind))


def range_text(kind: type, limits: object) -> str:
    """A number's type and its range: "int (at least 1)"; "path" for text that is one."""
    if kind is str:
        return "path"
    if callable(limits):
        return "text or dict"
    return kind.__name__ if limits == Range() else f"{kind.__name__} ({limits})"


def default_text(field: dataclasses.Field) -> str:
    """A field's default, or "required"."""
    if field.default is dataclasses.MISSING:
        return "required"
    if dataclasses.is_dataclass(field.default):
        return f"{type(field.default).__name__}()"
    return f"`{field.default!r}`".replace("'", '"')


def split_docstring(text: str) -> tuple[str, dict[str, str]]:
    """The description of a class, and the descriptions of its `Attributes:` by name."""
    description, _, section = text.partition("\nAttributes:\n")
    attributes: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        entry = re.match(r"  (\w+): (.*)", line)
        if entry:
            name = entry[1]
            attributes[name] = entry[2]
        elif line.strip() and name:
            attributes[name] += " " + line.strip()
    return description.strip(), attributes


def class_section(kind: type) -> str:
    """A heading, the description and the table of fields of a config dataclass."""
    description, attributes = split_docstring(inspect.getdoc(kind) or "")
    fields = dataclasses.fields(kind)
    rows = [
        (f"`{field.name}`", type_text(field.type), default_text(field), attributes[field.name])
        for field in fields
    ]
    table = benchmarks_page.table(("Field", "Type", "Default", "Meaning"), rows)
    return f"### {kind.__name__}\n\n{description}\n" + ("\n" + table if fields else "")


def config_text() -> str:
    """Text of docs/reference/config.md."""
    parts = [HEAD]
    for title, names in GROUPS.items():
        parts.append(f"## {title}\n")
        parts += [class_section(getattr(config, name)) for name in names]
    return "\n".join(parts)


def main() -> None:
    """Write both pages."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    CONFIG_PAGE.parent.mkdir(exist_ok=True)
    CONFIG_PAGE.write_text(config_text())
    benchmarks_page.main()


if __name__ == "__main__":
    main()
