# SPDX-License-Identifier: Apache-2.0
"""Laws that keep the code apart from any one version of its dependencies."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("t5x_lite", "kernels", "benchmarks", "tests")
# The one module whose job it is, and this law.
EXEMPT = {ROOT / "t5x_lite" / "compat.py", Path(__file__).resolve()}
DEPENDENCIES = {"jax", "jaxlib", "flax", "optax", "orbax", "numpy", "transformers", "tokenizers"}
SOURCES = sorted({path for name in FOLDERS for path in (ROOT / name).rglob("*.py")} - EXEMPT)

TREES = {path: ast.parse(path.read_text()) for path in SOURCES}


def dotted(node: ast.AST) -> str:
    """The dotted name that an expression spells ("jax._src.core"), or an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (start := dotted(node.value)):
        return f"{start}.{node.attr}"
    return ""


def private_names(tree: ast.AST) -> list[str]:
    """Names of dependencies with a part that begins with one underscore."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names.append(dotted(node).replace("jnp.", "jax.numpy.", 1).replace("np.", "numpy.", 1))
    parts = {name: name.split(".") for name in names if name}
    return [
        name
        for name, (first, *rest) in parts.items()
        if first in DEPENDENCIES
        and any(part.startswith("_") and not part.startswith("__") for part in rest)
    ]


def test_only_compat_uses_private_names_of_dependencies():
    names = {str(path.relative_to(ROOT)): private_names(TREES[path]) for path in SOURCES}
    assert {path: lines for path, lines in names.items() if lines} == {}


def test_the_law_finds_private_names():
    text = (
        "import jax\nfrom jax._src import distributed\njax._src.core.Tracer\njax.numpy.__version__"
    )
    assert {"jax._src.distributed", "jax._src.core"} < set(private_names(ast.parse(text)))
    assert private_names(ast.parse("import jax\njax.numpy.__version__")) == []


def test_nothing_takes_uninitialized_memory_for_zeros():
    """jnp.empty and empty_like are no longer zero since jax 0.11."""
    banned = {
        f"{module}.{name}" for module in ("jnp", "jax.numpy") for name in ("empty", "empty_like")
    }
    for path in SOURCES:
        assert not {dotted(node) for node in ast.walk(TREES[path])} & banned, path
