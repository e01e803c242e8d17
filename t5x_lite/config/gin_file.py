# SPDX-License-Identifier: Apache-2.0
""".gin text to the tree of `config.Run`, and back. Only this and `gin_check` import gin.

A run file fills `config.Run` by macros in T5X's names and by bindings; `include` finds presets in
the folder of the file, in the working folder and in the configs that the package ships. What a
file can import and name is limited to the dataclasses of `t5x_lite.config` (`gin_check`): it is
data, not code.
"""

import contextlib
import dataclasses
import re
import sys
import tokenize
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from t5x_lite import config
from t5x_lite.config import aliases, gin_aliases, gin_bindings
from t5x_lite.config.gin_check import HEADER, check_source
from t5x_lite.utils.nearest import suggest
from t5x_lite.utils.not_none import not_none
from t5x_lite.utils.paths import parse_path

# A resolved config has some hundred lines; ours include three files deep.
MOST_LINES = 20_000
DEEPEST = 10
MOST_BYTES = 2**20


class ConfigError(ValueError):
    """A config that cannot be used; the message names the binding and the remedy."""


def load_run(
    paths: str | Sequence[str], bindings: Sequence[str] = (), defaults: Sequence[str] = ()
) -> config.Run:
    """Reads a run.

    Args:
      paths: .gin file, or several that are read one after the other.
      bindings: bindings on top, such as "TRAIN_STEPS=100". A value that is not a Python literal is
        a string: MODEL_DIR=/tmp/x needs no quotes.
      defaults: lines of gin for fields that neither binds.

    Raises:
      ConfigError: a file is missing or does not parse, a name is unknown, a value has the wrong
        type, or two values contradict each other.
    """
    paths = [paths] if isinstance(paths, str) else paths
    lines = [line for path in paths for line in read_lines(path)]
    if not lines:
        raise ConfigError(f"No config.Run in the config: {' and '.join(paths)} is empty")
    lines = [*(Line(text, "a default") for text in defaults), *lines]
    below = flag_lines(bindings)
    try:
        return parse_lines(lines, below)
    except ConfigError as error:
        if any(line.origin in str(error) for line in (*lines, *below)):
            raise
        raise ConfigError(f"{error}\nThat is of {' and '.join(paths)}") from error


def bound_fields(
    paths: str | Sequence[str], bindings: Sequence[str]
) -> dict[tuple[str, str, str], str]:
    """Origins of the fields that files (`paths`) or command line (`bindings`) bind, by scope,
    dataclass and name."""
    paths = [paths] if isinstance(paths, str) else paths
    lines = [line for path in paths for line in read_lines(path)]
    every = rename_lines([*lines, *flag_lines(bindings)])
    header = len(HEADER.splitlines())
    with config_errors(every, []):
        text = HEADER + "\n".join(line.text for line in every)
        bound = gin_bindings.read_bindings(check_source(text))
    return {(e.scope, e.owner, e.name): every[e.row - header - 1].origin for e in bound if e.owner}


# What eval needs of a config: a file of configs/data says no more than this leaves open.
DATA = """
config.Run.model_dir = "unused"
config.Run.model = @config.Model()
config.Run.data = @config.Data()
config.Data.task = %MIXTURE_OR_TASK_NAME
config.Data.lengths = %TASK_FEATURE_LENGTHS
config.Model.vocab = 2
config.Model.decoder = @config.Stack()
config.Stack.layers = 1
config.Stack.embed = 2
config.Stack.heads = 1
config.Stack.head_dim = 2
config.Stack.mlp = 2
"""


RUN = re.compile(r"^[^\S\n]*(?:\w+/)*config\.Run\.", re.MULTILINE)  # \s* would be quadratic


def describes_run(paths: list[str]) -> bool:
    """Returns whether the files describe a whole run, and not config.Data alone."""
    return any(RUN.search(line.text) for path in paths for line in read_lines(path))


def load_data(paths: list[str], bindings: Sequence[str] = ()) -> config.Data:
    """Reads the data of a run, or of files that bind config.Data alone.

    Raises:
      ConfigError: as `load_run`.
    """
    stub = [Line(line, "config.Data") for line in DATA.splitlines()]
    # A file of data may be part of a run that reads more of it.
    files = [line._replace(source="text") for path in paths for line in read_lines(path)]
    return not_none(parse_lines(stub + files, flag_lines(bindings)).data)


def from_text(text: str) -> config.Run:
    """Reads a resolved config of `to_text`; one of an earlier version means what it meant then."""
    lines = [Line(line, "the saved config") for line in aliases.former_bindings(text)]
    lines += [Line(line, f"line {i}") for i, line in enumerate(text.splitlines(), 1)]
    lines += [Line(line, "the saved config") for line in gin_bindings.drop_idle_filters(text)]
    return parse_lines(lines, [])


class Line(NamedTuple):
    """A line of a config.

    Attributes:
      text: the line.
      origin: "FILE:LINE" or "--gin.BINDING".
      source: a user's "file", an "include" of it, a "flag" of the command line; bindings there
        that nothing reads are reported. Else "text": a shipped file, or a saved config.
    """

    text: str
    origin: str
    source: Literal["file", "include", "flag", "text"] = "text"


def read_lines(path: str, above: tuple[Path, ...] = ()) -> list[Line]:
    """Reads a .gin file with its includes in place.

    Args:
      path: the file; a shipped one by its path in configs/.
      above: the files that include this one, the outermost first.

    Raises:
      ConfigError: there is no such file, it is not text, or files include each other endlessly.
    """
    file = find_config(path)
    if file is None:
        raise ConfigError(f"No config file {path}: {suggest_file(path)}")
    if file.resolve() in above:
        raise ConfigError(f"{file} includes itself, by way of {above[-1]}")
    if len(above) > DEEPEST:
        raise ConfigError(f"{file}: files include each other more than {DEEPEST} deep")
    shipped = configs_folder() in file.resolve().parents
    source = "text" if shipped else "include" if above else "file"
    lines = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        include = re.fullmatch(r"""\s*include\s+(["'])(.+)\1\s*(?:#.*)?""", line)
        # The line itself stays, empty: includes count, even of empty files.
        lines.append(Line("" if include else line, f"{file}:{number}", source))
        if include:
            lines += read_include(include[2], lines[-1].origin, (*above, file.resolve()))
        if len(lines) > MOST_LINES:
            raise ConfigError(f"{file}:{number}: more than {MOST_LINES:,} lines with the includes")
    return lines


def read_include(name: str, origin: str, above: tuple[Path, ...]) -> list[Line]:
    """Reads a file that another one includes.

    Args:
      name: what the include names: a path beside the file, in the working folder, or in configs/.
      origin: file and line of the include.
      above: the files that include this one, the outermost first.
    """
    if not name.endswith(".gin"):
        # Messages quote what does not parse: no other file's content may get out so.
        raise ConfigError(f"{origin}: an include names a .gin file; found {name!r}")
    neighbor = above[-1].parent / name
    path = str(neighbor) if neighbor.is_file() else name
    if find_config(path) is None:
        raise ConfigError(f"{origin}: no config file {name}: {suggest_file(name)}")
    return read_lines(path, above)


def read_text(path: Path) -> str:
    """Reads a .gin file; ConfigError where it is too large, or not text."""
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ConfigError(f"{path} has {size:,} bytes; no .gin file has more than {MOST_BYTES:,}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text: byte {error.start:,} is not UTF-8") from error


def configs_folder() -> Path:
    """Folder of the shipped .gin files: inside the package, where a clone has a link to it."""
    return (Path(__file__).parents[1] / "configs").resolve()


def find_config(path: str) -> Path | None:
    """The file at path, or the shipped one; a folder of configs/ may have its old name."""
    for name in dict.fromkeys((path, aliases.rename_folder(path))):
        inside = re.sub(r"^(\./)?configs/", "", name)
        for candidate in (parse_path(name), configs_folder() / inside):
            if candidate.is_file():
                if name != path:
                    aliases.notify([aliases.Renamed(path, name)])
                return candidate
    return None


def shipped_configs() -> list[str]:
    """Paths of the .gin files that the package ships: configs/runs/g2p.gin ..."""
    folder = configs_folder()
    return sorted(f"configs/{path.relative_to(folder)}" for path in folder.rglob("*.gin"))


def flag_lines(bindings: Sequence[str]) -> list[Line]:
    """Lines of the bindings of the command line, which are quoted where they need it."""
    lines = []
    for each in bindings:
        try:
            text = gin_bindings.quote_value(each)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        lines += [Line(part, f"--gin.{each:.200}", "flag") for part in text.splitlines()]
    return lines


def parse_lines(lines: list[Line], below: Sequence[Line] = ()) -> config.Run:
    """Reads the run that lines describe.

    Args:
      lines: those of files.
      below: those of the command line, which come last.

    Raises:
      ConfigError: as `load_run`.
    """
    import gin

    every = rename_lines([*lines, *below])
    source = HEADER + "\n".join(line.text for line in every)
    if not RUN.search(source):
        where = f" ({lines[-1].origin})" if lines else ""
        raise ConfigError(
            f"No config.Run in the config{where}: begin with a file of configs/runs, or bind "
            "config.Run"
        )
    bindings: list[gin_bindings.Binding] = []
    try:
        with config_errors(every, bindings):
            bindings += gin_bindings.read_bindings(check_source(source))
            check_all_read(every, bindings)
            gin.parse_config(source)
            return plain_dataclass(gin.get_configurable("t5x_lite.config.Run")())
    finally:
        gin.clear_config()


def rename_lines(lines: list[Line]) -> list[Line]:
    """Replaces old names (`aliases`) in lines, and leaves out the imports that `HEADER` has."""
    every = [line._replace(text=without_header(line.text)) for line in lines]
    if not every:
        return []
    header = len(HEADER.splitlines())
    with config_errors(every, []):
        source = HEADER + "\n".join(line.text for line in every)
        renamed = gin_aliases.rename(source, lambda row: every[row - header - 1].origin)
    texts = renamed.split("\n")[header:]
    return [line._replace(text=text) for line, text in zip(every, texts, strict=True)]


def check_all_read(lines: list[Line], bindings: list[gin_bindings.Binding]) -> None:
    """Refuses a binding of the command line or of the run's own file that nothing reads.

    A binding of a file that a value on top of it has put out of use is no mistake; nor is more in
    a file that several runs include, which a line on stderr mentions.
    """
    header = len(HEADER.splitlines())
    for source in ("flag", "file", "include"):
        rows = {row for row, line in enumerate(lines, header + 1) if line.source == source}
        unread = gin_bindings.unread_binding(bindings, rows, overridden=source != "flag")
        if unread:
            row, text = unread
            place = lines[row - header - 1].origin
            if source != "include":
                raise ConfigError(f"{place}: {text}")
            print(f"{place}: {text}", file=sys.stderr)


@contextlib.contextmanager
def config_errors(lines: list[Line], bindings: list[gin_bindings.Binding]):
    """Raises any error inside as a ConfigError that names the file and line, or the flag.

    Args:
      lines: those of the config.
      bindings: those of the lines, as far as they are read when the error is raised.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # gin passes on whatever the code under it raises
        raise ConfigError(explain(error, lines, bindings)) from error


def without_header(text: str) -> str:
    """A line, or nothing where it repeats an import of `HEADER`."""
    return "" if text.split("#")[0].strip() in HEADER.splitlines() else text


def suggest_file(name: str) -> str:
    """Ends a message about a config file that does not exist."""
    return suggest(name, shipped_configs(), otherwise=f"the shipped ones are in {configs_folder()}")


def explain(error: Exception, lines: list[Line], bindings: list[gin_bindings.Binding]) -> str:
    """gin's message with file and line, and the nearest known name.

    Args:
      error: what gin, or a dataclass, has raised.
      lines: those of the config.
      bindings: those of the lines.
    """
    header = len(HEADER.splitlines())
    if isinstance(error, tokenize.TokenError):
        why, (row, _) = error.args
        if "nested" in why:  # Python's own tokenizer, since 3.12
            return f"{lines[row - header - 1].origin}: the value nests too deep ({why})"
        return f"{lines[-1].origin}: the config ends inside a bracket or string ({why})"
    origins = {f"line {n}": line.origin for n, line in enumerate(lines, header + 1)}
    message = re.sub(
        r"(?:In bindings string )?\bline (\d+)",
        lambda match: origins.get(f"line {match[1]}", match[0]),
        re.sub(r"(.{500}).+", r"\1...", str(error).strip()),
    )
    message = message.replace("In bindings string", "In")
    parameter = re.search(r"'config\.(\w+)' doesn't have a parameter named '(\w+)'", message)
    if parameter:
        fields = [field.name for field in dataclasses.fields(getattr(config, parameter[1]))]
        hint = aliases.suggest_field(parameter[2], parameter[1], fields)
        return f"{message}\nconfig.{parameter[1]} has no such field: {hint}"
    macro = re.search(r"'macro'.*in scope '([\w/]+)'", message)
    if macro:
        message = f"The macro {macro[1]} has no value: bind it, or give --gin.{macro[1]}=VALUE"
        rows = gin_bindings.rows_that_name(bindings, macro[1])
        return gin_bindings.blame(message, [lines[row - header - 1].origin for row in rows])
    missing = re.search(
        r"\b(\w+)\.__init__\(\) missing \d+ required .*?arguments?: ([^\n]+)", message
    )
    if missing:
        return f"config.{missing[1]} is not complete: bind {missing[2]}"
    if isinstance(error, ValueError):
        # Of a dataclass: gin has added in which class, of which scope.
        message = message.split("\n  In call to configurable ")[0]
        rows = gin_bindings.rows_of(bindings, message)
        return gin_bindings.blame(message, [lines[row - header - 1].origin for row in rows])
    return message


def plain_dataclass(value: Any) -> Any:
    """Replaces gin's own subclasses of our dataclasses by ours, in the tree of value."""
    if not dataclasses.is_dataclass(value):
        return value
    names = [field.name for field in dataclasses.fields(value)]
    fields = {name: plain_dataclass(getattr(value, name)) for name in names}
    return getattr(config, type(value).__name__)(**fields)


def to_text(run: config.Run) -> str:
    """Writes a run as .gin text with every field; `from_text` reads the same run."""
    return HEADER + "\n" + "\n".join(write_bindings(run, "")) + "\n"


def write_bindings(value: Any, scope: str) -> list[str]:
    """Bindings of a dataclass and, under scopes of their own, of those inside it."""
    name, lines, inner = type(value).__name__, [], []
    prefix = f"{scope}/" if scope else ""
    for field in dataclasses.fields(value):
        written, below = write_value(getattr(value, field.name), f"{prefix}{field.name}")
        lines.append(f"{prefix}config.{name}.{field.name} = {written}")
        inner += below
    return lines + inner


def write_value(item: Any, scope: str) -> tuple[str, list[str]]:
    """A field's value as text, and the bindings of the dataclasses in it."""
    if dataclasses.is_dataclass(item):
        return f"@{scope}/config.{type(item).__name__}()", ["", *write_bindings(item, scope)]
    if isinstance(item, tuple):
        items = [write_value(each, f"{scope}_{number}") for number, each in enumerate(item)]
        written = "".join(f"{text}, " for text, _ in items)
        return f"({written})", [line for _, lines in items for line in lines]
    return repr(item), []
