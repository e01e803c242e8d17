# SPDX-License-Identifier: Apache-2.0
"""What README and docs tell a reader to type, and to bind, is there."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from t5x_lite import config, config_file, gin_arguments
from t5x_lite.evaluation import options

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str):
    """(page, text) of every fenced block of a language."""
    for page in PAGES:
        for kind, text in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.M):
            if kind == language:
                yield page.name, text


def commands():
    """(page, words) of every `python -m t5x_lite...` in the bash blocks, comments aside."""
    for page, text in blocks("bash"):
        for line in text.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s[|;]\s", line):
                words = shlex.split(part, comments=True)
                if words[:2] == ["python", "-m"] and words[2].startswith("t5x_lite."):
                    yield page, tuple(words[2:])


COMMANDS = sorted(set(commands()))


def test_there_are_commands_to_test():
    assert len(COMMANDS) > 25


@pytest.mark.parametrize("page, words", COMMANDS, ids=lambda x: x if isinstance(x, str) else x[0])
def test_a_command_of_the_documentation_is_understood(page, words, capsys):
    name, *arguments = words
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    parser = module.parser()
    if "--help" in arguments:
        with pytest.raises(SystemExit) as end:
            parser.parse_args(arguments)
        assert end.value.code == 0
        return
    if isinstance(parser, options.Parser):
        plain, bindings = options.split_gin(arguments)
        given = parser.parse(plain)
    else:
        given, extra = parser.parse_known_args(arguments)
        bindings = gin_arguments.bindings(extra)
    files = getattr(given, "gin_file", None) or []
    if not files:
        return
    if config_file.describes_run(files):
        config_file.load(files, bindings)
    else:
        config_file.load_data(files, bindings)


def names_bound():
    """(page, Dataclass, field) wherever the documentation names config.Dataclass.field."""
    known = r"\b(?:config\.)?([A-Z][A-Za-z]+)\.([a-z_]+)\b"
    for page in PAGES:
        for kind, field in re.findall(known, page.read_text()):
            if hasattr(config, kind):
                yield page.name, kind, field


@pytest.mark.parametrize("page, kind, field", sorted(set(names_bound())))
def test_a_field_that_the_documentation_names_is_there(page, kind, field):
    assert field in {*getattr(config, kind).__dataclass_fields__, *vars(getattr(config, kind))}


def test_files_that_the_documentation_names_are_there():
    for page in PAGES:
        text = page.read_text()
        for path in re.findall(r"`((?:configs|benchmarks|launch|tests|docs)/[\w./*{}<>-]+)`", text):
            assert list(ROOT.glob(path.rstrip("/"))), f"{page.name} names {path}"
        for link in re.findall(r"\]\(([\w./-]+\.(?:md|ipynb))\)", text):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_configs_in_the_documentation_load(tmp_path):
    whole = [text for _, text in blocks("") if "config.Run" in text or "runs/common.gin" in text]
    assert whole
    for number, text in enumerate(whole):
        path = tmp_path / f"{number}.gin"
        path.write_text(text)
        assert config_file.load([str(path)]).model.decoder is not None


@pytest.mark.slow
def test_the_reference_has_a_page_for_each_module_with_its_docstrings(tmp_path):
    script = (ROOT / "launch" / "docs.sh").read_text()
    program = re.search(r"<<'PYTHON'\n(.*?)^PYTHON$", script, re.DOTALL | re.M)[1]
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    pages = {str(page.relative_to(tmp_path)) for page in tmp_path.rglob("*.html")}
    modules = ("interactive", "config", "kernels", "decoding", "training/loop", "plan")
    assert {f"t5x_lite/{name}.html" for name in modules} < pages
    assert not any(page.startswith("t5x_lite/t5x_lite") for page in pages)
    text = (tmp_path / "t5x_lite" / "interactive.html").read_text()
    assert "What the model writes" in text and "<strong>ValueError:</strong>" in text
