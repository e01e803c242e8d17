# SPDX-License-Identifier: Apache-2.0
""".gin text to the tree of `config.Run`, and back. Only this and its door import gin.

A run file fills `config.Run` by macros in T5X's names and by bindings; `include` finds presets in
the folder of the file, in the working folder and in the configs that the package ships. What a
file can import and name is limited to the dataclasses of `t5x_lite.config` (`config_door`): it is
data, not code.
"""

import contextlib
import dataclasses
import difflib
import re
import tokenize
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from t5x_lite import config
from t5x_lite.config_door import HEADER, check, dataclass_names

# A resolved config has some hundred lines; ours include three files deep.
MOST_LINES = 20_000
DEEPEST = 10
MOST_BYTES = 2**20


class ConfigError(ValueError):
    """A config that cannot be used; the message names the binding and the remedy."""


def load(paths: str | Sequence[str], bindings: Sequence[str] = ()) -> config.Run:
    """The run that a file, or several together, describe, with bindings such as "TRAIN_STEPS=100"
    on top.

    A binding's value is Python's literal, or else taken as a string: MODEL_DIR=/tmp/x needs no
    quotes.

    Raises:
      ConfigError: a file is missing or does not parse, a name is unknown, a value has the wrong
        type, or two values contradict each other.
    """
    paths = [paths] if isinstance(paths, str) else paths
    lines = [line for path in paths for line in read(path)]
    if not lines:
        raise ConfigError(f"No config.Run in the config: {' and '.join(paths)} is empty")
    try:
        return parse(lines, [quoted(binding) for binding in bindings])
    except ConfigError as error:
        places = [line.origin for line in lines] + [f"--gin.{each}" for each in bindings]
        if any(place in str(error) for place in places):
            raise
        raise ConfigError(f"{error}\nThat is of {' and '.join(paths)}") from error


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


RUN = re.compile(r"^\s*(?:\w+/)*config\.Run\.", re.MULTILINE)


def describes_run(paths: list[str]) -> bool:
    """Whether the files describe a whole run, and not config.Data alone."""
    return any(RUN.search(line.text) for path in paths for line in read(path))


def load_data(paths: list[str], bindings: list[str] = ()) -> config.Data:
    """The data that these files describe, whole runs or config.Data alone.

    Raises:
      ConfigError: as `load`.
    """
    stub = [Line(line, "config.Data") for line in DATA.splitlines()]
    lines = stub + [line for path in paths for line in read(path)]
    return parse(lines, [quoted(binding) for binding in bindings]).data


def from_text(text: str) -> config.Run:
    """The run of a resolved config, as `text` wrote it."""
    return parse([Line(line, f"line {i}") for i, line in enumerate(text.splitlines(), 1)], [])


class Line(NamedTuple):
    text: str
    origin: str


def read(path: str, above: tuple[Path, ...] = ()) -> list[Line]:
    """The lines of a .gin file with its includes put in place, each with where it stands.

    `above` are the files that include this one.

    Raises:
      ConfigError: there is no such file, it is no text, or files include each other endlessly.
    """
    found = find(path)
    if found is None:
        raise ConfigError(f"No config file {path}.{near(path, shipped())}")
    if found.resolve() in above:
        raise ConfigError(f"{found} includes itself, by way of {above[-1]}")
    if len(above) > DEEPEST:
        raise ConfigError(f"{found}: files include each other more than {DEEPEST} deep")
    lines = []
    for number, line in enumerate(content(found).splitlines(), 1):
        include = re.fullmatch(r"""\s*include\s+(["'])(.+)\1\s*(?:#.*)?""", line)
        # The line itself stays, empty: includes count, even of empty files.
        lines.append(Line("" if include else line, f"{found}:{number}"))
        if include:
            lines += included(include[2], lines[-1].origin, (*above, found.resolve()))
        if len(lines) > MOST_LINES:
            raise ConfigError(f"{found}:{number}: more than {MOST_LINES:,} lines with the includes")
    return lines


def included(name: str, origin: str, above: tuple[Path, ...]) -> list[Line]:
    """The lines of a file that is included at `origin`."""
    if not name.endswith(".gin"):
        # What does not parse is told with its text: no other file's content may get out so.
        raise ConfigError(f"{origin}: an include names a .gin file; found {name!r}")
    beside = above[-1].parent / name
    path = str(beside) if beside.is_file() else name
    if find(path) is None:
        raise ConfigError(f"{origin}: no config file {name}.{near(name, shipped())}")
    return read(path, above)


def content(path: Path) -> str:
    """The text of a .gin file; ConfigError where it is none."""
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ConfigError(f"{path} has {size:,} bytes; no .gin file has more than {MOST_BYTES:,}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text: byte {error.start:,} is not UTF-8") from error


def configs_folder() -> Path:
    """Where the shipped .gin files are: inside an installed package, else in the clone."""
    import t5x_lite.configs

    return Path(next(iter(t5x_lite.configs.__path__)))


def find(path: str) -> Path | None:
    inside = re.sub(r"^(\./)?configs/", "", path)
    for candidate in (Path(path), configs_folder() / inside):
        if candidate.is_file():
            return candidate
    return None


def shipped() -> list[str]:
    folder = configs_folder()
    return sorted(f"configs/{path.relative_to(folder)}" for path in folder.rglob("*.gin"))


def quoted(binding: str) -> str:
    """name = value, with the value quoted unless it is a literal, a macro or a reference."""
    name, equals, value = binding.partition("=")
    if not equals:
        raise ConfigError(f"--gin.{binding} needs a value: --gin.{name}=VALUE")
    value = value.strip()
    is_code = value[:1] in "@%{[(\"'-.0123456789" or value in ("True", "False", "None")
    if value and is_code and not re.fullmatch(r"[./0-9][\w./~-]*/[\w./~-]*|\.", value):
        return f"{name.strip()} = {value}"
    return f"{name.strip()} = {value!r}"


def parse(lines: list[Line], bindings: list[str]) -> config.Run:
    import gin

    below = [Line(part, f"--gin.{each}") for each in bindings for part in each.splitlines()]
    source = HEADER + "\n".join(without_header(line.text) for line in lines)
    if not RUN.search(source):
        where = f" ({lines[-1].origin})" if lines else ""
        raise ConfigError(
            f"No config.Run in the config{where}: begin with a file of configs/runs, or bind "
            "config.Run"
        )
    for binding in bindings:
        check_macro(binding, source)
    whole = "\n".join((source, *(line.text for line in below)))
    try:
        with our_errors([*lines, *below]):
            check(whole)
            gin.parse_config(whole)
            run = plain(gin.get_configurable("t5x_lite.config.Run")())
    finally:
        gin.clear_config()
    for binding in bindings:
        check_used(binding, kinds_in(run))
    return run


def check_used(binding: str, kinds: set[str]) -> None:
    """Refuses a field of the command line whose owner the run does not have: gin ignores it."""
    owner = re.match(r"(?:\w+/)*config\.(\w+)\.", binding)
    if owner and owner[1] not in kinds:
        raise ConfigError(
            f"--gin.{binding} changes nothing: the run takes no config.{owner[1]} from the config. "
            f"Bind the field of its owner to @config.{owner[1]}(), as configs/runs/common.gin does"
        )


def kinds_in(value: Any) -> set[str]:
    """The names of all dataclasses in the tree of value."""
    if isinstance(value, tuple):
        return set().union(*map(kinds_in, value))
    if not dataclasses.is_dataclass(value):
        return set()
    inside = (getattr(value, field.name) for field in dataclasses.fields(value))
    return {type(value).__name__}.union(*map(kinds_in, inside))


@contextlib.contextmanager
def our_errors(lines: list[Line]):
    """What goes wrong inside, as a ConfigError that says where."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # gin passes on whatever the code under it raises
        raise ConfigError(explain(error, lines)) from error


def without_header(text: str) -> str:
    """A line, or nothing where it imports what every config may: `HEADER` has done so."""
    return "" if text.split("#")[0].strip() in HEADER.splitlines() else text


def check_macro(binding: str, source: str) -> None:
    """Refuses a macro of the command line that the files never use: gin would ignore it."""
    name = binding.partition("=")[0].strip()
    if re.fullmatch(r"[A-Z][A-Z0-9_]*", name) and name not in (
        macros := set(re.findall(r"%([A-Z][A-Z0-9_]*)", source))
    ):
        raise ConfigError(
            f"--gin.{name} is used nowhere in the config.{near(name, sorted(macros))}"
        )


def near(name: str, names: list[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Did you mean {found[0]}?" if found else f" Known: {', '.join(sorted(names))}."


def explain(error: Exception, lines: list[Line]) -> str:
    """gin's words, with the file and line, and the nearest known name added."""
    if isinstance(error, tokenize.TokenError) and "too many nested" in error.args[0]:
        return f"{lines[-1].origin}: a value nests too deep ({error.args[0]})"  # Python 3.13's limit
    if isinstance(error, tokenize.TokenError):
        return f"{lines[-1].origin}: the config ends inside a bracket or string ({error.args[0]})"
    header = len(HEADER.splitlines())
    origins = {f"line {n}": line.origin for n, line in enumerate(lines, header + 1)}
    place = lambda found: origins.get(f"line {found[1]}", found[0])
    message = re.sub(r"(?:In bindings string )?\bline (\d+)", place, str(error).strip())
    message = message.replace("In bindings string", "In")
    parameter = re.search(r"'config\.(\w+)' doesn't have a parameter named '(\w+)'", message)
    if parameter:
        fields = [field.name for field in dataclasses.fields(getattr(config, parameter[1]))]
        return f"{message}\nconfig.{parameter[1]} has no such field.{near(parameter[2], fields)}"
    attribute = re.search(r"has no attribute '?(\w+)", message)
    if attribute:
        return f"{message}\nNo config.{attribute[1]}.{near(attribute[1], dataclass_names())}"
    macro = re.search(r"'macro'.*in scope '(\w+)'", message)
    if macro:
        return f"The macro {macro[1]} has no value: bind it, or give --gin.{macro[1]}=VALUE"
    missing = re.search(
        r"(\w+)\.__init__\(\) missing \d+ required .*?arguments?: ([^\n]+)", message
    )
    if missing:
        return f"config.{missing[1]} is not complete: bind {missing[2]}"
    return message


def plain(value: Any) -> Any:
    """value with gin's own subclasses of our dataclasses replaced by ours."""
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return getattr(config, type(value).__name__)(**fields)


def text(run: config.Run) -> str:
    """run as .gin text with every field written out; `from_text` gives the same run again."""
    return HEADER + "\n" + "\n".join(bindings_of(run, "")) + "\n"


def bindings_of(value: Any, scope: str) -> list[str]:
    """The bindings of one dataclass and, under scopes of their own, of those inside it."""
    name, lines, inner = type(value).__name__, [], []
    prefix = f"{scope}/" if scope else ""
    for field in dataclasses.fields(value):
        written, below = reference(getattr(value, field.name), f"{prefix}{field.name}")
        lines.append(f"{prefix}config.{name}.{field.name} = {written}")
        inner += below
    return lines + inner


def reference(item: Any, scope: str) -> tuple[str, list[str]]:
    """How a field's value is written, and the bindings of the dataclasses in it."""
    if dataclasses.is_dataclass(item):
        return f"@{scope}/config.{type(item).__name__}()", ["", *bindings_of(item, scope)]
    if isinstance(item, tuple):
        parts = [reference(part, f"{scope}_{number}") for number, part in enumerate(item)]
        written = "".join(f"{text}, " for text, _ in parts)
        return f"({written})", [line for _, lines in parts for line in lines]
    return repr(item), []
