# SPDX-License-Identifier: Apache-2.0
"""Law of messages: a flag, a field or a macro that the product names is there to be used."""

import argparse
import ast
import dataclasses
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from t5x_lite import __main__ as front
from t5x_lite import config, interactive
from t5x_lite.cli import options
from t5x_lite.config import gin_check, gin_file

ROOT = Path(__file__).resolve().parents[2]
FILES = [path for name in ("t5x_lite", "kernels") for path in sorted((ROOT / name).rglob("*.py"))]
# Flags are defined there, or are old ones.
DEFINITIONS = ("t5x_lite/cli/", "t5x_lite/config/aliases.py")
# The commands whose flags other files name in messages. A message that other commands print too
# names the command with the flag: "python -m t5x_lite.convert --allow=X".
REACHED_BY = {
    "t5x_lite/__main__.py": [],
    "t5x_lite/adaptation/derive_config.py": ["adapt"],
    "t5x_lite/adaptation/teacher_logits.py": ["distill"],
    "t5x_lite/checkpoints/formats/t5x.py": ["convert"],
    "t5x_lite/checkpoints/kinds.py": ["infer"],
    "t5x_lite/checkpoints/opening.py": ["convert", "infer"],
    "t5x_lite/checkpoints/outputs.py": ["convert"],
    "t5x_lite/checkpoints/peft_output.py": ["convert"],
    "t5x_lite/checkpoints/selection.py": ["train"],
    "t5x_lite/checkpoints/tensors.py": ["infer"],
    "t5x_lite/checkpoints/text_settings.py": ["adapt", "convert"],
    "t5x_lite/comparison/train_twins.py": ["train"],
    "t5x_lite/config/training_run.py": ["train"],
    "t5x_lite/demo/": ["demo"],
    "t5x_lite/evaluation/draft_report.py": ["infer"],
    "t5x_lite/evaluation/drafting.py": ["infer"],
    "t5x_lite/evaluation/lengths.py": ["eval"],
    "t5x_lite/evaluation/lm_harness.py": ["eval"],
    "t5x_lite/evaluation/superglue.py": ["eval"],
    "t5x_lite/export/": ["convert"],
    "t5x_lite/model/adapters.py": ["train"],
    "t5x_lite/model/quantization.py": ["eval", "infer"],
    "t5x_lite/planning/": ["plan"],
    "t5x_lite/processes.py": ["train"],
    "t5x_lite/sharding.py": ["eval", "infer"],
    "t5x_lite/serving/": ["serve"],
    "t5x_lite/training/optimizer/param_groups.py": ["train"],
    "t5x_lite/training/preflight.py": ["train"],
    "t5x_lite/training/write_teacher_logits.py": ["distill"],
    "t5x_lite/utils/hub_upload.py": ["convert"],
    "t5x_lite/utils/paths.py": ["infer"],
}
GENERAL = {"gin", "help", "import", "verbosity", "version"}
FLAG = re.compile(r"(?<![\w-])--([A-Za-z]\w*)(?![\w{-])")
# Folders of the clone, which an installed package does not have; its configs it has.
CLONE = re.compile(r"(?<![\w.-])(?:docs|launch|benchmarks|tests)/\w")
SHIPPED = re.compile(r"(?<![\w/])configs/[\w/]+\.gin\b")
COMMAND = re.compile(r"\bt5x_lite[. ](\w+)")


@functools.cache
def flags_of(command: str) -> frozenset[str]:
    parser = importlib.import_module(front.COMMANDS[command][0]).parser()
    return frozenset(name.lstrip("-") for name in parser.option_names())


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Strings of a file besides docstrings; what stands in braces of an f-string is `{}`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings, inside = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.add(node.value)
        if isinstance(node, ast.JoinedStr):
            inside.update(ast.walk(node))
            inside.discard(node)
    for node in ast.walk(tree):
        if node in docstrings or node in inside:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        if isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)
            yield node.lineno, "".join(parts)


def commands_of(name: str, text: str) -> list[str]:
    """The commands that a message of a file speaks to."""
    named = [each for each in COMMAND.findall(text) if each in front.COMMANDS]
    if named:
        return named
    for command, (module, *_) in front.COMMANDS.items():
        if name == f"{module.replace('.', '/')}.py":
            return [command]
    return next((each for prefix, each in REACHED_BY.items() if name.startswith(prefix)), [])


def test_every_flag_in_a_message_is_one_of_the_command_that_prints_it():
    wrong = []
    for path in FILES:
        name = str(path.relative_to(ROOT))
        if name.startswith(DEFINITIONS):
            continue
        for line, text in texts(path):
            for flag in set(FLAG.findall(text)) - GENERAL:
                commands = commands_of(name, text)
                if not commands or not any(flag in flags_of(each) for each in commands):
                    wrong.append(f"{name}:{line} --{flag} of {' '.join(commands) or 'no command'}")
    assert wrong == []


def test_every_file_that_a_message_names_is_in_an_installed_package():
    shipped = set(gin_file.shipped_configs())
    for path in FILES:
        for line, text in texts(path):
            assert not CLONE.search(text), f"{path}:{line}: {text[:80]}"
            missing = set(SHIPPED.findall(text)) - shipped
            assert not missing, f"{path}:{line}: {missing}"


def test_every_field_that_the_product_names_exists():
    classes = {name: getattr(config, name) for name in gin_check.dataclass_names()}
    pattern = re.compile(rf"(?<![\w./])({'|'.join(classes)})\.([a-z]\w*)(?![\w(])")
    wrong = []
    for path in FILES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for owner, name in pattern.findall(line):
                fields = {field.name for field in dataclasses.fields(classes[owner])}
                if name not in fields and not hasattr(classes[owner], name):
                    wrong.append(f"{path.relative_to(ROOT)}:{number} {owner}.{name}")
    assert wrong == []


def test_every_macro_that_a_message_binds_is_one_that_runs_have():
    folder = gin_file.configs_folder()
    shipped = [folder / path.removeprefix("configs/") for path in gin_file.shipped_configs()]
    used = {name for path in shipped for name in re.findall(r"%([A-Z][A-Z_]+)", path.read_text())}
    named = {
        name
        for path in FILES
        for _, text in texts(path)
        for name in re.findall(r"--gin\.([A-Z][A-Z_]+)", text)
    }
    assert named - used == {"NAME", "MACRO"} and "MODEL_DIR" in named


@pytest.mark.parametrize("name", front.COMMANDS)
def test_every_number_of_a_command_line_has_a_range_and_blames_its_option(name, capsys):
    parser = importlib.import_module(front.COMMANDS[name][0]).parser()
    # `processes` stands below the config's ranges, and checks both numbers itself.
    ours = {"--process", "--processes"}
    for action in parser._actions:
        assert action.type not in (int, float) or set(action.option_strings) <= ours
        read = getattr(action.type, "__qualname__", "")
        if not read.startswith("number_parser"):
            continue
        for text in ("-12345678", "many", "nan", "1e999"):
            with pytest.raises(SystemExit) as end:
                parser.parse([f"{action.option_strings[0]}={text}"])
            message = capsys.readouterr().err
            start = f"t5x_lite.{name}: error: {'/'.join(action.option_strings)} must be "
            assert end.value.code == 2 and message.startswith(start), message


def test_a_field_of_decoding_that_an_option_sets_is_named_by_the_option():
    session = interactive.Session(None, config.Decode())
    parser = argparse.ArgumentParser()
    options.add_decode(parser)
    arguments = parser.parse_args(["--beams=2", "--n_best=3"])
    with pytest.raises(ValueError, match=r"^--n_best 3 needs as many --beams \(now 2\)"):
        options.configure_session(session, arguments)
