# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs.yml: API pages, one per room and root module, and the notebooks."""

import atexit
import re
import shutil
import tempfile
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "t5x_lite"
# A folder of .gin files, and the list of commands.
SKIPPED = {"configs", "__main__", "__init__"}
# Imports TensorFlow's types.
SEQIO = "seqio_"


def api_modules() -> list[tuple[str, str]]:
    """(page title, module) of every page of the API reference."""
    names = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    shown = sorted(name for name in names - SKIPPED if not name.startswith(("_", ".")))
    return [(name, f"t5x_lite.{name}") for name in shown]


def page_text(module: str) -> str:
    """Markdown of an API page: one directive for each module of a room."""
    folder = PACKAGE / module.partition(".")[2]
    if not folder.is_dir():
        return f"# {module}\n\n::: {module}\n"
    names = [module] if (folder / "__init__.py").exists() else []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if path.name.startswith(("_", SEQIO)):
            continue
        names.append(".".join((module, *parts)))
    directives = "\n".join(
        f"::: {name}\n    options:\n      show_submodules: false\n" for name in names
    )
    return f"# {module}\n\n{directives}"


def copy_package() -> str:
    """Folder with a copy of the package in which t5x_lite/kernels is a folder, removed at exit.

    The reader of docstrings follows neither links nor folders without __init__.py.
    """
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    copy = Path(folder) / "t5x_lite"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("configs", "__pycache__", "*.gin"))
    (copy / "kernels" / "__init__.py").touch()
    return folder


@event_priority(100)  # before mkdocstrings reads its options
def on_config(config):
    """Read docstrings from a copy of the package, and add the API pages to the navigation."""
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [copy_package()]
    pages = [{title: f"api/{title}.md"} for title, _ in api_modules()]
    next(entry for entry in config.nav if "Reference" in entry)["Reference"].append({"API": pages})
    return config


def on_files(files, config):
    """Add the API pages and the notebooks to the site."""
    for title, module in api_modules():
        files.append(File.generated(config, f"api/{title}.md", content=page_text(module)))
    for path in sorted((ROOT / "launch" / "colab").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links to notebooks at their copies in the site.

    Args:
      markdown: text of the page.
      page: the page.
      config: options of the site.
      files: files of the site.

    Returns:
      The text with these links.
    """
    return re.sub(r"\]\(\.\./launch/colab/", "](notebooks/", markdown)
