# SPDX-License-Identifier: Apache-2.0
"""Names and docstrings: nouns of the field, every parameter and field explained.

Tests keep their titles, and a helper without a docstring is explained by its test; a docstring that
is there follows the same rules, and names each parameter in its sentence or in an Args section.
"""

import ast
import collections
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for name in ("t5x_lite", "kernels") for path in sorted((ROOT / name).rglob("*.py"))]
TREES = {path: ast.parse(path.read_text()) for path in FILES}
TESTS = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "tests").rglob("*.py"))}
# Participles and adverbs that say nothing of a value.
EMPTY_NAMES = set("told asked given found made how own seen said setting taught held".split())
QUESTION = re.compile(r"(What|Where|How|Which|Who|Whether|If|Whose|When)\b")
PYTEST_FIXTURES = {"monkeypatch", "tmp_path", "capsys"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def definitions(tree: ast.Module) -> Iterator[Function | ast.ClassDef]:
    """Functions, classes and their methods; not what is defined inside functions."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef):
            yield node
        if isinstance(node, ast.ClassDef):
            yield from (method for method in node.body if isinstance(method, Function))


def parameters(function: Function) -> list[str]:
    """Names of the parameters of a function besides self and cls."""
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    names += [a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return [name for name in names if name not in ("self", "cls")]


def fields(node: ast.ClassDef) -> list[str]:
    """Names of the annotated fields of a class."""
    return [
        each.target.id
        for each in node.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    ]


def violations(check, trees: dict[Path, ast.Module] = TREES) -> list[str]:
    """Places of definitions in trees with what a check says of them."""
    return [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {text}"
        for path, tree in trees.items()
        for node in definitions(tree)
        if (text := check(node))
    ]


def unnamed(names: list[str], text: str) -> str:
    return ", ".join(name for name in names if not re.search(rf"(?<!\w){re.escape(name)}\b", text))


def test_no_class_name_occurs_twice():
    places = collections.defaultdict(list)
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_docstrings_begin_with_a_noun_or_a_verb():
    def check(node):
        return "a question word" if QUESTION.match(ast.get_docstring(node) or "") else ""

    trees = TREES | TESTS
    assert violations(check, trees) == []
    modules = {path: ast.get_docstring(tree) or "" for path, tree in trees.items()}
    assert [path for path, text in modules.items() if QUESTION.match(text)] == []


def test_functions_of_three_parameters_explain_each():
    def check(node):
        if isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            return ""
        text = ast.get_docstring(node) or ""
        names = parameters(node)
        if len(names) < 3:
            return ""
        return unnamed(names, text) or ("" if "Args:" in text else "no Args section")

    assert violations(check) == []


def test_docstrings_of_tests_name_the_parameters_of_their_helpers():
    def check(node):
        text = ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef) or node.name.startswith(("_", "test_")) or not text:
            return ""
        if any("fixture" in ast.unparse(decorator) for decorator in node.decorator_list):
            return ""
        names = [each for each in parameters(node) if each not in PYTEST_FIXTURES]
        return unnamed(names, text) if len(names) > 2 else ""

    assert violations(check, TESTS) == []


def test_classes_say_what_they_are_and_explain_their_fields():
    def check(node):
        if not isinstance(node, ast.ClassDef):
            return ""
        text = ast.get_docstring(node) or ""
        return unnamed(fields(node), text) if len(fields(node)) >= 3 else "" if text else "no text"

    assert violations(check, TREES | TESTS) == []


def test_values_have_names_of_the_field():
    def names(tree: ast.Module) -> set[str]:
        nodes = list(ast.walk(tree))
        stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        return stored | {n.arg for n in nodes if isinstance(n, ast.arg)}

    trees = TREES | TESTS
    empty = {str(path.relative_to(ROOT)): names(tree) & EMPTY_NAMES for path, tree in trees.items()}
    assert {path: words for path, words in empty.items() if words} == {}
