# SPDX-License-Identifier: Apache-2.0
"""Commands, fields and files that README and docs name exist."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from t5x_lite import config, sharding
from t5x_lite.config import gin_file

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# What a command derives from the checkpoint that its config names.
DERIVED = """
config.Model.vocab = 4096
config.Model.encoder = @encoder/config.Stack()
config.Model.decoder = @decoder/config.Stack()
config.Stack.layers = 1
config.Stack.embed = 8
config.Stack.heads = 1
config.Stack.head_dim = 8
config.Stack.mlp = 8
""".splitlines()


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
            parser.parse(arguments)
        assert end.value.code == 0
        return
    options = parser.parse(arguments)
    files, bindings = getattr(options, "gin_file", []), options.bindings
    if not files:
        return
    if gin_file.describes_run(files):
        lines = [line.text for path in files for line in gin_file.read_lines(path)]
        text = " ".join([*bindings, *lines])
        of_checkpoint = "INITIAL_CHECKPOINT_PATH" in text
        gin_file.load_run(files, bindings, defaults=DERIVED if of_checkpoint else [])
    else:
        gin_file.load_data(files, bindings)


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


def test_pages_that_list_the_axes_of_a_mesh_list_those_that_exist():
    axes = sharding.mesh_sizes(config.Mesh(data=1, fsdp=1, tensor=1, context=2), 2).keys()
    lists = 0
    for page in PAGES:
        for row in re.findall(r"`\w+`(?:(?:,| and| or)\s+`\w+`)+", page.read_text()):
            names = set(re.findall(r"\w+(?=`)", row))
            if len(names & axes) > 2:
                assert names == axes, f"{page.name}: {row}"
                lists += 1
    table = (ROOT / "docs" / "scaling.md").read_text()
    assert re.findall(r"^\| `config\.Mesh\.(\w+)`", table, re.M) == [
        axis for axis in config.Mesh.__dataclass_fields__ if axis in axes
    ]
    assert lists >= 2


def test_configs_in_the_documentation_load(tmp_path):
    whole = [text for _, text in blocks("") if "config.Run" in text or "runs/common.gin" in text]
    assert whole
    for number, text in enumerate(whole):
        path = tmp_path / f"{number}.gin"
        path.write_text(text)
        # The commands derive it from the vocabulary.
        run = gin_file.load_run([str(path)], defaults=["config.Model.vocab = 4096"])
        assert run.model.decoder is not None


@pytest.mark.slow
def test_the_site_builds_without_dead_links_and_has_a_page_for_each_room(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir"]
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rooms = {path.stem for path in (ROOT / "t5x_lite").glob("[a-z]*") if path.name != "configs"}
    pages = {path.stem for path in (tmp_path / "api").glob("*.html")}
    assert pages == {name for name in rooms if name != "py"}
    text = (tmp_path / "api" / "interactive.html").read_text()
    assert "t5x_lite.interactive.load" in text and "ValueError" in text
    assert "attend" in (tmp_path / "api" / "kernels.html").read_text()
