# SPDX-License-Identifier: Apache-2.0
"""JSON schemas of public tools: the files that Python packages ship, and their named parts."""

import importlib.util
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Folders of packages, each with the pattern of its files.
SOURCES = (
    ("check_jsonschema", "builtin_schemas", "*.json"),
    ("validate_pyproject_schema_store", "resources", "*.json"),
    ("nbformat", "", "*.schema.json"),
    ("debugpy", "_vendored", "*.json"),
    ("jsonschema_specifications", "schemas", "*"),
)
PARTS = ("definitions", "$defs")
MOST_OF_FILE = 12  # so that no tool makes up most of them


class NamedSchema(NamedTuple):
    """A schema with its file and part."""

    name: str
    schema: dict[str, Any]


def schema_files() -> list[Path]:
    """Files of all sources, in order."""
    files = []
    for package, folder, pattern in SOURCES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{package} is not installed: its schemas are measured")
        paths = (Path(spec.origin).parent / folder).rglob(pattern)
        files += sorted(path for path in paths if path.is_file())
    return files


def list_schemas() -> list[NamedSchema]:
    """Schemas of all files: each as a whole, and its parts that are objects of two properties or
    more, with the parts that these refer to."""
    schemas = []
    for path in schema_files():
        try:
            root = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(root, dict):
            schemas += itertools.islice(file_schemas(path.stem, root), MOST_OF_FILE)
    return schemas


def file_schemas(name: str, root: dict[str, Any]) -> Iterator[NamedSchema]:
    """Yields the schema of a file and those of its parts."""
    yield NamedSchema(name, root)
    for key in PARTS:
        for part, schema in root.get(key, {}).items():
            if isinstance(schema, dict) and len(schema.get("properties", ())) > 1:
                draft = {"$schema": root["$schema"]} if "$schema" in root else {}
                yield NamedSchema(f"{name}#{part}", draft | schema | {key: root[key]})
