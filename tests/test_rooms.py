# SPDX-License-Identifier: Apache-2.0
"""Rooms: imports point down, nothing stands at the root but what is listed, files stay small."""

import ast
import functools
import importlib.machinery
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "t5x_lite"
COMMANDS = {
    *("train", "eval", "infer", "convert", "average", "adapt", "distill", "plan", "compare"),
    *("tune", "serve"),
}
# From top to bottom: a room imports only rooms of the floors below its own.
FLOORS = (
    {"__main__"},
    COMMANDS,
    {"demo"},
    {"serving"},
    {"interactive", "comparison", "planning"},
    {"training", "analysis"},
    {"evaluation", "export"},
    {"adaptation"},
    {"data"},
    {"checkpoints", "decoding"},
    {"model"},
    {"tokenizers", "sharding"},
    {"cli"},
    {"kernels", "config", "batch", "processes"},
    {"utils", "compat"},
)
FLOOR = {room: number for number, floor in enumerate(reversed(FLOORS)) for room in floor}
MODULES_AT_ROOT = {
    "__init__",
    "__main__",
    "interactive",
    "batch",
    "sharding",
    "processes",
    "compat",
}
# The only files that import these libraries.
LIBRARIES = {
    "gin": ("config/gin_file.py", "config/gin_check.py"),
    "flax": ("model/*.py", "checkpoints/formats/t5x_files.py"),
    "tensorflow": ("data/seqio_*.py", "tokenizers/seqio_*.py"),
    "seqio": ("data/seqio_*.py", "tokenizers/seqio_*.py"),
}


def product() -> dict[str, Path]:
    """Files of the package by module name; kernels/ stands beside it."""
    files = {}
    for folder, above in ((PACKAGE, ()), (ROOT / "kernels", ("kernels",))):
        for path in folder.rglob("*.py"):
            parts = (*above, *path.relative_to(folder).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts = parts[:-1]
            files[".".join(("t5x_lite", *parts))] = path
    return files


FILES = product()


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Modules that a file imports, inside functions too, with the line of each import."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in FILES else node.module, node.lineno


def room(module: str) -> str:
    return (*module.split("."), "")[1]


def test_imports_point_down():
    upward = [
        f"{path.relative_to(ROOT)}:{line}: {room(module)} imports {name}"
        for module, path in FILES.items()
        for name, line in imported(path)
        if name in FILES and room(name) and room(name) != room(module)
        if FLOOR[room(name)] >= FLOOR[room(module)]
    ]
    assert not upward, "\n".join(upward)


def test_no_files_import_each_other_in_a_circle():
    left = {
        module: {name for name, _ in imported(path) if name in FILES and name != module}
        for module, path in FILES.items()
    }
    while free := {module for module, below in left.items() if not below & left.keys()}:
        left = {module: below for module, below in left.items() if module not in free}
    assert not left, f"in a circle, or above one: {sorted(left)}"


def test_the_root_holds_commands_rooms_and_few_modules():
    names = {path.stem for path in PACKAGE.glob("*.py")}
    assert names == COMMANDS | MODULES_AT_ROOT
    assert len(MODULES_AT_ROOT - {"__init__", "__main__"}) <= 5
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == FLOOR.keys() - names | {"configs"}


@pytest.mark.parametrize("name", ["kernels", "configs"])
def test_a_folder_at_the_top_is_linked_into_the_package(name):
    link = PACKAGE / name
    assert link.is_symlink() and link.readlink() == Path("..", name)


def test_no_folder_at_the_top_hides_an_installed_package():
    for folder in filter(Path.is_dir, ROOT.iterdir()):
        spec = importlib.machinery.PathFinder.find_spec(folder.name, [str(ROOT)])
        # A folder without __init__.py gives way to a package of that name.
        assert spec is None or folder == PACKAGE or spec.origin is None, f"{folder} has __init__.py"


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_by_its_own_files_only(library):
    users = {
        path.relative_to(PACKAGE)
        for path in FILES.values()
        for name, _ in imported(path)
        if name.partition(".")[0] == library
    }
    others = [path for path in users if not any(map(path.match, LIBRARIES[library]))]
    assert users and not others


def python_files() -> list[Path]:
    folders = "t5x_lite", "kernels", "tests", "benchmarks"
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_files_and_functions_are_short():
    long = []
    for path in python_files():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > 400:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > 50:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno}: {lines} lines")
    assert not long, "\n".join(long)


def test_names_of_test_files_are_unique():
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert len(names) == len(set(names))
