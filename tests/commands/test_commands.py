# SPDX-License-Identifier: Apache-2.0
"""Laws of all commands: one way to report mistakes and failures, help that teaches."""

import ast
import errno
import importlib
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

import t5x_lite
from t5x_lite import __main__ as front
from t5x_lite.cli import command as commands
from t5x_lite.cli import gin_arguments
from t5x_lite.cli.command import Command
from t5x_lite.cli.parser import Parser
from t5x_lite.config import gin_file
from t5x_lite.utils import exit_status

# Words of the command line that make each command complete, as far as they can be checked early.
GIN = ("--gin_file=configs/runs/quickstart.gin",)
COMPLETE = {
    "train": GIN,
    "eval": ("--checkpoint=nowhere",),
    "infer": ("--checkpoint=nowhere",),
    "convert": ("--from=nowhere", "--to=made"),
    "average": ("--from=nowhere", "--last=2", "--to=made"),
    "adapt": ("--source=nowhere", "--output=made"),
    "distill": ("generate", "--teacher=nowhere", "--output=made", f"--input={__file__}"),
    "data": GIN,
    "plan": (*GIN, "--chips=h100x8"),
    "compare": GIN,
    "tune": GIN,
    "serve": ("--checkpoint=nowhere", "--port=0"),
    "demo": ("--checkpoint=nowhere", "--port=0"),
}
# An option of each with a character missing, and the option.
NEAR = {
    "train": ("--dry_rn", "--dry_run"),
    "eval": ("--metrcs=per", "--metrics"),
    "infer": ("--beems=2", "--beams"),
    "convert": ("--dtyp=float32", "--dtype"),
    "average": ("--wights=1,2", "--weights"),
    "adapt": ("--sentinls=100", "--sentinels"),
    "distill": ("--techer=x", "--teacher"),
    "data": ("--previw=1", "--preview"),
    "plan": ("--serch", "--search"),
    "compare": ("--dryrun", "--dry_run"),
    "tune": ("--block", "--blocks"),
    "serve": ("--quue=1", "--queue"),
    "demo": ("--prt=1", "--port"),
}
READ_GIN = ["train", "eval", "distill", "data", "plan", "compare", "tune"]
READ_CHECKPOINTS = ["eval", "infer", "convert", "average", "adapt", "distill", "serve", "demo"]
HEAVY = {"jax", "flax", "numpy", "tensorflow", "seqio", "rich", "orbax", "gin", "uvicorn"}


def load(name: str):
    return importlib.import_module(front.COMMANDS[name][0])


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Runs a command that must end with status 2 and one line; returns the line's message."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "prepare_host", lambda: None)

    def run(name: str, *arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            load(name).main(list(arguments))
        output = capsys.readouterr()
        assert end.value.code == exit_status.MISTAKE and not output.out
        prefix = f"t5x_lite.{name}: error: "
        lines = output.err.splitlines()
        assert lines[-1].startswith(prefix) and output.err.count(prefix) == 1
        # Before it a command may say what it does, such as the name of a model that it loads.
        assert len(lines) == 1 or name in ("serve", "demo")
        assert not list(tmp_path.iterdir())
        return lines[-1].removeprefix(prefix)

    return run


def test_every_command_is_listed_and_has_a_law():
    root = Path(t5x_lite.__file__).parent
    modules = {path.stem for path in root.glob("*.py") if "COMMAND = Command(" in path.read_text()}
    packages = {path.parent.name for path in root.glob("*/__main__.py")}
    assert front.COMMANDS.keys() == modules | packages == COMPLETE.keys() == NEAR.keys()
    for name in front.COMMANDS:
        assert load(name).COMMAND.name == name and load(name).parser().command == name


@pytest.mark.parametrize("name", COMPLETE)
def test_a_misspelled_option_is_named_with_the_near_one_before_missing_ones(refused, name):
    wrong, right = NEAR[name]
    words = ["generate", wrong] if name == "distill" else [wrong]
    option = wrong.partition("=")[0]
    assert refused(name, *words) == f"unknown option {option}: did you mean {right}?"


@pytest.mark.parametrize("name", COMPLETE)
def test_an_option_like_no_other_is_refused(refused, name):
    assert refused(name, *COMPLETE[name], "--zzqqxx=3").startswith(
        "unknown option --zzqqxx (--help"
    )
    assert "unknown argument 'stray'" in refused(name, *COMPLETE[name], "stray")


@pytest.mark.parametrize("name", COMPLETE)
def test_what_is_required_is_named(refused, name):
    assert "required" in refused(name)


@pytest.mark.parametrize("name", READ_GIN)
def test_a_missing_config_file_is_named_with_few_near_ones(refused, name):
    first = ["answers"] if name == "distill" else []
    other = ["--chips=h100x8"] if name == "plan" else []
    other = ["--checkpoint=nowhere"] if name == "eval" else other
    message = refused(name, *first, *other, "--gin_file=runs/g2q.gin")
    assert message.startswith("No config file runs/g2q.gin: did you mean configs/runs/g2p.gin")
    message = refused(name, *first, *other, "--gin_file=nope.gin")
    assert message.count(".gin") == 1 and len(message) < 300


@pytest.mark.parametrize("name", READ_CHECKPOINTS)
def test_a_missing_checkpoint_is_named(refused, name):
    assert "nowhere" in refused(name, *COMPLETE[name])


@pytest.mark.parametrize("name", COMPLETE)
def test_a_missing_module_is_named(refused, name):
    message = refused(name, *COMPLETE[name], "--import=no_such_module")
    assert message == "--import=no_such_module: there is no such module here or installed"


def test_a_module_of_the_working_folder_is_imported_and_what_it_lacks_is_named(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "my_own_tasks.py").write_text("import no_such_module_either")
    with pytest.raises(ValueError, match="my_own_tasks: No module named 'no_such_module_either'"):
        gin_arguments.import_modules(["my_own_tasks"])
    (tmp_path / "my_other_tasks.py").write_text("VALUE = 3")
    gin_arguments.import_modules(["my_other_tasks"])
    assert sys.modules["my_other_tasks"].VALUE == 3


@pytest.mark.parametrize("name", COMPLETE)
def test_help_teaches_within_bounds(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        load(name).main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "examples:\n" in text and f"python -m t5x_lite.{name} " in text.split("examples:")[1]
    assert "--verbosity N" in text and "--import MODULE" in text
    assert "--pdb" not in text and "absl" not in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) <= 150


def test_bindings_are_read_in_one_word_or_two():
    words = ["--gin.A=3", "--dry_run", "--gin.config.Stack.layers", "4", "--gin.B==="]
    expected = ["--dry_run"], ["A=3", "config.Stack.layers=4", "B==="]
    assert gin_arguments.split_bindings(words) == expected
    with pytest.raises(ValueError, match="--gin.A needs a value: --gin.A=VALUE"):
        gin_arguments.split_bindings(["--gin.A"])


@pytest.mark.parametrize(
    "error, status, words",
    [
        (ValueError("a name"), 2, "error: a name"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 2, "No such file"),
        (OSError(errno.ENOSPC, "No space left"), 1, "No space left; nothing was written"),
        (gin_file.ConfigError("a binding"), 2, "a binding"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT; nothing was written"),
    ],
)
def test_the_status_says_whether_it_was_a_mistake(capsys, error, status, words):
    def work(options):
        raise error

    command = Command("some", lambda: Parser("some"), work, afterwards="nothing was written")
    if isinstance(error, KeyboardInterrupt):
        assert command.main([]) == status
    else:
        with pytest.raises(SystemExit) as end:
            command.main([])
        assert end.value.code == status
    line = capsys.readouterr().err
    assert line.startswith("t5x_lite.some: ") and words in line and line.count("\n") == 1


def test_an_error_in_the_code_keeps_its_traceback():
    def work(options):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        Command("some", lambda: Parser("some"), work).main([])


def test_failures_of_a_run_are_no_mistakes():
    from t5x_lite.checkpoints import checkpoint_io
    from t5x_lite.comparison.train_twins import TrainingFailed
    from t5x_lite.training.preemption import Interrupted
    from t5x_lite.training.reporting.metrics import Diverged

    statuses = {
        Diverged(""): 1,
        checkpoint_io.DamagedCheckpointError(""): 1,
        checkpoint_io.CheckpointWriteError(""): 1,
        checkpoint_io.CheckpointMismatchError(""): 2,
        Interrupted(signal.SIGTERM): 143,
        TrainingFailed(Path("x"), 75): 75,
        TrainingFailed(Path("x"), -9): 137,
        RuntimeError(""): 1,
    }
    for error, status in statuses.items():
        assert exit_status.exit_status(error) == status, repr(error)


def process(*words: str, code: str = "", **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, *(("-c", code) if code else ("-m",)), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


LISTED = """
import sys
heavy = {heavy!r}
try:
    from t5x_lite.__main__ import main
    main([{name!r}, "--help"])
except SystemExit as end:
    assert not end.code, end.code
found = sorted(heavy & set(sys.modules))
assert not found, found
"""


@pytest.mark.parametrize("name", ["train", "tune", "data"])
def test_help_of_a_process_imports_nothing_heavy(name):
    # numpy comes with the package t5x_lite.data, which the command is the front of.
    heavy = HEAVY - {"numpy"} if name == "data" else HEAVY
    done = process(code=LISTED.format(heavy=heavy, name=name))
    assert done.returncode == 0 and "examples:" in done.stdout, done.stderr


def test_all_other_commands_import_nothing_heavy_for_help():
    names = [name for name in COMPLETE if name not in ("train", "tune", "data")]
    code = (
        "import importlib, sys\nfrom t5x_lite.__main__ import COMMANDS\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(COMMANDS[name][0]).parser().format_help()\n"
        f"found = sorted({HEAVY!r} & set(sys.modules))\nassert not found, found"
    )
    done = process(code=code)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_else():
    code = (
        "import sys; before = set(sys.modules); import t5x_lite; print(set(sys.modules) - before)"
    )
    done = process(code=code)
    assert "absl" not in done.stdout and "t5x_lite.config" not in done.stdout


def test_a_process_ends_with_the_status_of_its_command(tmp_path):
    done = process("t5x_lite.eval", "--chckpoint=x", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "t5x_lite.eval: error: unknown option --chckpoint: did you mean --checkpoint?\n"
    )


FAILING = """
import os, signal, sys
from absl import logging
from t5x_lite.cli.command import Command
from t5x_lite.cli.parser import Parser

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # ignored already if the tests run in the background
HANDLERS = [signal.getsignal(number) for number in SIGNALS]

def work(options):
    import logging as standard
    standard.getLogger("another.package").info("an info")
    standard.getLogger("another.package").warning("a warning")
    logging.info("absl's info")
    assert [signal.getsignal(number) for number in SIGNALS] == HANDLERS
    print("done", flush=True)
    if "{how}" == "fail":
        raise KeyError("a bug")
    if "{how}" == "kill":
        os.kill(os.getpid(), signal.SIGTERM)
    return 7

Command("some", lambda: Parser("some"), work).start()
"""


def test_a_process_logs_warnings_plainly_and_more_if_asked():
    quiet = process(code=FAILING.replace("{how}", ""))
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (7, "done\n", "a warning\n")
    loud = process("--verbosity=0", code=FAILING.replace("{how}", ""))
    assert loud.returncode == 7 and "an info" in loud.stderr and "absl's info" in loud.stderr
    assert "a warning" in loud.stderr and loud.stderr.startswith("I")


def test_a_bug_or_a_signal_ends_a_process_as_python_does():
    bug = process(code=FAILING.replace("{how}", "fail"))
    assert bug.returncode == 1 and "KeyError: 'a bug'" in bug.stderr
    killed = process(code=FAILING.replace("{how}", "kill"))
    assert killed.returncode == -signal.SIGTERM and killed.stderr == "a warning\n"


def test_details_show_where_a_mistake_was_found():
    done = process("t5x_lite.train", "--gin_file=nope.gin", "--verbosity=1")
    assert done.returncode == 2 and "Traceback" in done.stderr and "gin_file.py" in done.stderr


def test_the_front_lists_commands_and_starts_them(capsys):
    for words in ([], ["--help"]):
        front.main(words)
        lines = capsys.readouterr().out.splitlines()
        for name in front.COMMANDS:
            assert sum(line.startswith(f"  {name} ") for line in lines) == 1
        assert max(map(len, lines)) <= 100
    front.main(["--version"])
    assert capsys.readouterr().out == f"t5x_lite {t5x_lite.__version__}\n"
    with pytest.raises(SystemExit) as end:
        front.main(["trian"])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "t5x_lite: error: unknown command trian: did you mean train?\n"
    )
    done = process("t5x_lite", "convert", "--from=nowhere")
    assert done.returncode == 2 and done.stderr.startswith("t5x_lite.convert: error: ")


def test_flags_of_libraries_do_not_meet_our_options():
    flags.DEFINE_integer("seed", 1, "of another package")
    try:
        options = load("infer").parser().parse(["--checkpoint=x", "--seed=3"])
        assert options.seed == 3 and flags.FLAGS["seed"].value == 1
    finally:
        delattr(flags.FLAGS, "seed")


def test_verbosity_that_is_no_number_is_refused(refused):
    assert "--verbosity" in refused("train", *GIN, "--verbosity=loud")
    assert logging.getLogger().level == logging.WARNING


def test_a_command_runs_by_python_values_as_by_its_words(monkeypatch, tmp_path, capsys):
    parsed = []
    doing = Command("train", importlib.import_module("t5x_lite.train").parser, parsed.append)
    assert doing.run("a.gin", {"MODEL_DIR": tmp_path, "TRAIN_STEPS": 5}, dry_run=True) == 0
    assert doing.run([Path("a.gin"), "b.gin"], profile=False, coordinator=None) == 0
    assert doing.run(tmp_path / "a.gin") == 0
    assert parsed.pop().gin_file == [str(tmp_path / "a.gin")]
    first, second = parsed
    assert first.gin_file == ["a.gin"] and first.dry_run
    assert first.bindings == [f"MODEL_DIR={str(tmp_path)!r}", "TRAIN_STEPS=5"]
    assert second.gin_file == ["a.gin", "b.gin"] and not second.profile and not second.dry_run
    for options, words in (({"dry_rn": True}, "did you mean --dry_run"), ({}, "--gin_file")):
        with pytest.raises(ValueError, match=words):
            doing.run(**options)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "value",
    ["runs/a b", "", "it's", 3, 1e-4, True, None, (1, 2), {"inputs": 32}, ("a",)],
)
def test_a_python_value_reaches_the_config_as_it_is(value):
    written = commands.write_value({"x": value})
    assert ast.literal_eval(written) == {"x": value}
    bound = gin_file.load_run(
        GIN[0].partition("=")[2], [f"MODEL_DIR={commands.write_value('r u n')}"]
    )
    assert bound.model_dir == "r u n"
    assert commands.write_value("@config.Data()") == "@config.Data()"
