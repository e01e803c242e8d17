# SPDX-License-Identifier: Apache-2.0
"""Generated pages are up to date, and links of the documentation have targets."""

import dataclasses
import importlib.util
import inspect
import re
import tomllib
from pathlib import Path

import pytest

from t5x_lite import config

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]


def load_script(path: str):
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_config_reference_is_up_to_date():
    text = load_script("launch/pages.py").config_text()
    assert text == (DOCS / "reference/config.md").read_text(), "run: python launch/pages.py"


def test_the_config_reference_has_every_dataclass_and_describes_every_field():
    pages = load_script("launch/pages.py")
    listed = {name for names in pages.GROUPS.values() for name in names}
    kinds = {name for name, kind in vars(config).items() if dataclasses.is_dataclass(kind)}
    assert listed == kinds
    for name in kinds:
        kind = getattr(config, name)
        attributes = pages.split_docstring(inspect.getdoc(kind))[1]
        assert attributes.keys() == {field.name for field in dataclasses.fields(kind)}, name


def test_the_page_of_benchmarks_is_up_to_date():
    text = load_script("benchmarks/page.py").page_text()
    assert text == (DOCS / "benchmarks.md").read_text(), "run: python launch/pages.py"


def test_the_page_of_benchmarks_has_every_results_file():
    sections = tomllib.loads((ROOT / "benchmarks/notes.toml").read_text())["section"]
    listed = sorted(name for section in sections for name in section.get("results", ()))
    assert listed == sorted(path.stem for path in (ROOT / "benchmarks/results").glob("*.json"))


def anchors(text: str) -> set[str]:
    """Anchors of the headings of a Markdown text."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\s-]", "", head.lower()).strip().replace(" ", "-") for head in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_have_targets(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text()), f"{page.name} links to {link}"


def test_every_page_is_in_the_index_and_in_the_navigation():
    index, navigation = (DOCS / "index.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        name = str(page.relative_to(DOCS))
        assert name == "index.md" or f"]({name})" in index, name
        assert f": {name}\n" in navigation, name
