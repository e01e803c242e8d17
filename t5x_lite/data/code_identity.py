# SPDX-License-Identifier: Apache-2.0
"""Identity of a user's functions: their code and every value that it can reach.

A function is described by its bytecode, closure, defaults and the globals that it names, and so are
the functions, objects and modules of the user among these, also those that it imports when it is
called. Of libraries (the standard library, installed packages, this package) only the version, the
function itself and its arguments count.
"""

import collections
import contextlib
import dis
import functools
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, type(Ellipsis))
LIBRARIES = tuple(
    str(Path(sysconfig.get_paths()[kind]).resolve())
    for kind in ("stdlib", "platstdlib", "purelib", "platlib")
)
INSTALLED = {"site-packages", "dist-packages"}
CONTAINERS = (list, tuple, dict, set, frozenset, collections.deque, types.MappingProxyType)
# Arguments that a builtin function is bound to: the table of `table.get`.
BOUND = (types.MethodType, types.BuiltinMethodType, types.MethodWrapperType)
# Of containers in the attributes of a library's object.
ATTRIBUTE_DEPTH = 3
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class Reached:
    """A value that another one reaches."""

    def __init__(self, value: Any):
        self.value = value


def code_digest(*things: Any) -> str:
    """Digest of functions and values, the same in every process as long as they do the same."""
    digest = hashlib.sha256()
    # Numbers in the order in which values are reached, by id; the value is kept, so that no other
    # one has its id. Each is described once, which ends cycles.
    numbers: dict[int, tuple[int, Any]] = {}
    pending: list[Any] = []

    def add(part: str | Reached) -> None:
        if isinstance(part, Reached):
            value = part.value
            if isinstance(value, PLAIN):
                part = repr(value)
            else:
                if id(value) not in numbers:
                    numbers[id(value)] = len(numbers), value
                    pending.append(value)
                part = f"value {numbers[id(value)][0]}"
        digest.update(f"{part}\n".encode("utf-8", "surrogatepass"))

    for thing in things:
        add(Reached(thing))
    while pending:
        thing = pending.pop()
        add(type(thing).__qualname__)
        for part in parts_of(thing):
            add(part)
    return digest.hexdigest()


def is_library(module: str | None) -> bool:
    """True for a module that is installed, and for this package."""
    package = (module or "").partition(".")[0]
    if package == "t5x_lite":
        return True
    loaded = sys.modules.get(module or "")
    # A package without __init__.py has folders and no file.
    path = getattr(loaded, "__file__", None) or next(iter(getattr(loaded, "__path__", ())), None)
    return package != "__main__" if path is None else is_installed(path)


def is_installed(path: str) -> bool:
    """True for a path in the standard library or among installed packages."""
    file = Path(path).resolve()
    return str(file).startswith(LIBRARIES) or not INSTALLED.isdisjoint(file.parts)


def printed(thing: Any) -> str:
    """Text of a value without memory addresses."""
    return ADDRESS.sub("", repr(thing))


def parts_of(thing: Any) -> Iterator[str | Reached]:
    """Yields the texts that describe a value, and the values that it reaches."""
    match thing:
        case re.Pattern():
            yield from map(Reached, (thing.pattern, thing.flags))
        case np.ndarray():
            yield f"{thing.dtype} {thing.shape}"
            if thing.dtype.hasobject:
                yield from map(Reached, thing.ravel())
            else:
                yield hashlib.sha256(thing.tobytes()).hexdigest()
        case functools.partial():
            yield from map(Reached, (thing.func, thing.args, thing.keywords))
        case types.FunctionType():
            yield from function_parts(thing)
        case types.ModuleType():
            yield from module_parts(thing, None, set())
        case type():
            yield f"{thing.__module__}.{thing.__qualname__}"
            if not is_library(thing.__module__):
                yield from methods_of(thing)
        case _ if isinstance(thing, CONTAINERS):
            yield from container_parts(thing)
        case _ if isinstance(thing, BOUND):
            yield getattr(thing, "__name__", "")
            yield from map(Reached, (getattr(thing, "__func__", None), thing.__self__))
        case _:
            yield from object_parts(thing)


def container_parts(thing: Any) -> Iterator[str | Reached]:
    """Yields the values in a container, in an order that is the same in every process."""
    if isinstance(thing, dict | types.MappingProxyType):
        for key in sorted(thing, key=printed):
            yield from (Reached(key), Reached(thing[key]))
    else:
        ordered = not isinstance(thing, set | frozenset)
        yield from map(Reached, thing if ordered else sorted(thing, key=printed))
    yield Reached(getattr(thing, "default_factory", None))
    if not is_library(type(thing).__module__):  # a dict of the user's with __missing__
        yield from (Reached(type(thing)), Reached(attributes_of(thing)))


def function_parts(function: types.FunctionType) -> Iterator[str | Reached]:
    """Yields the parts of a function: name, code, closure, defaults, attributes and globals."""
    library = is_library(function.__module__)
    yield f"{function.__module__}.{function.__qualname__}"
    yield describe_code(function.__code__)
    names = code_names(function.__code__)
    for cell in function.__closure__ or ():
        try:
            yield from argument_parts(cell.cell_contents, names)
        except ValueError:  # a variable that has no value yet
            yield "empty"
    for each in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()):
        yield from argument_parts(each, names)
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None:
        yield Reached(wrapped)
    if library:
        package = sys.modules.get((function.__module__ or "").partition(".")[0])
        yield str(getattr(package, "__version__", ""))
        return
    yield Reached(vars(function))
    for name in sorted(names & function.__globals__.keys()):
        yield name
        yield from argument_parts(function.__globals__[name], names)
    for module in imported_modules(function):
        yield from module_parts(module, names, set())


def argument_parts(value: Any, names: set[str]) -> Iterator[str | Reached]:
    """Yields a value that code with these names is given; of a module, what they name in it."""
    if isinstance(value, types.ModuleType):
        yield from module_parts(value, names, set())
    else:
        yield Reached(value)


def module_parts(
    module: types.ModuleType, names: set[str] | None, visited: set[str]
) -> Iterator[str | Reached]:
    """Yields the parts of a module, and of the modules of the user in it.

    Args:
      module: the module; of a library, name and version are all.
      names: names in the code that uses it; None if that is not known, for everything in it.
      visited: names of the modules that were described; this one is added.
    """
    yield f"{module.__name__} {getattr(module, '__version__', '')}"
    if is_library(module.__name__) or module.__name__ in visited:
        return
    visited.add(module.__name__)
    known = vars(module)
    shared = [name for name in known if not name.startswith("__")] if names is None else names
    for name in sorted(known.keys() & set(shared)):
        yield name
        if isinstance(known[name], types.ModuleType):
            yield from module_parts(known[name], names, visited)
        else:
            yield Reached(known[name])


def imported_modules(function: types.FunctionType) -> Iterator[types.ModuleType]:
    """Yields the user's modules that a function imports, or names in a text, when it is called."""
    package = function.__globals__.get("__package__") or ""
    for name in sorted(import_names(function.__code__, package)):
        top = name.partition(".")[0]
        with contextlib.suppress(Exception):  # the function may expect that it is not there
            if top in sys.modules:
                users = not is_library(top)
            else:  # nothing of a library is imported for this
                spec = importlib.util.find_spec(top)
                if spec is None:
                    continue
                places = (spec.origin, *(spec.submodule_search_locations or ()))
                users = not any(is_installed(place) for place in places if place)
            if users:
                yield importlib.import_module(name)


def import_names(code: types.CodeType, package: str) -> set[str]:
    """Whole names of the modules that a code object imports, and texts that are names of modules.

    Args:
      code: of a function.
      package: of its module, which relative imports begin at.
    """
    names = {name for name in text_constants(code) if name in sys.modules}
    constants: list[Any] = [None, None]
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            level, members = constants
            relative = "." * (level or 0) + instruction.argval
            with contextlib.suppress(ImportError):  # beyond the top of the package
                name = importlib.util.resolve_name(relative, package) if level else relative
                # from . import clean: a member may be a module that is not loaded yet.
                names |= {name, *(f"{name}.{member}" for member in members or ())}
        constants = [constants[1], instruction.argval]
    inner = (each for each in code.co_consts if inspect.iscode(each))
    return names.union(*(import_names(each, package) for each in inner))


def methods_of(cls: type) -> Iterator[str | Reached]:
    """Yields the functions and plain values of a user's class, its bases and its metaclass."""
    yield from map(Reached, (*cls.__bases__, type(cls)))
    for name, value in sorted(vars(cls).items()):
        value = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        value = value.fget if isinstance(value, property) else value
        if isinstance(value, types.FunctionType) or not name.startswith("__"):
            yield name
            yield Reached(value)


def attributes_of(thing: Any) -> dict[str, Any]:
    """Attributes of an object by name, those in slots too."""
    names: list[str] = []
    for cls in type(thing).__mro__:
        slots = vars(cls).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    slotted = {name: getattr(thing, name) for name in names if hasattr(thing, name)}
    return slotted | getattr(thing, "__dict__", {})


def object_parts(thing: Any) -> Iterator[str | Reached]:
    """Yields the parts of an object: its class, and its attributes or what its class prints."""
    yield Reached(type(thing))
    if not is_library(type(thing).__module__):
        yield Reached(attributes_of(thing))
        return
    if hasattr(type(thing), "__array__"):  # its text leaves values out where there are many
        with contextlib.suppress(Exception):
            yield Reached(np.asarray(thing))
            return
    if type(thing).__repr__ is not object.__repr__:
        yield printed(thing)
    # A library's object calls functions of the user: a data source, its reader.
    for name, value in sorted(getattr(thing, "__dict__", {}).items()):
        for each in users_values(value):
            yield name
            yield Reached(each)


def users_values(value: Any, depth: int = ATTRIBUTE_DEPTH) -> Iterator[Any]:
    """Yields the functions, classes and objects of the user in a value of a library's object."""
    if isinstance(value, CONTAINERS) and depth:
        mapping = isinstance(value, dict | types.MappingProxyType)
        inner = value.values() if mapping else value
        ordered = not isinstance(value, set | frozenset)
        for each in inner if ordered else sorted(inner, key=printed):
            yield from users_values(each, depth - 1)
    elif isinstance(value, types.MethodType | functools.partial):
        yield value
    else:
        named = isinstance(value, type | types.FunctionType)
        library = is_library((value if named else type(value)).__module__)
        # A library's own function may be one that its object caches, unless it is an attribute.
        if not library or (isinstance(value, types.FunctionType) and depth == ATTRIBUTE_DEPTH):
            yield value


def text_constants(code: types.CodeType) -> Iterator[str]:
    """Yields the texts in a code object that are names, with dots: a.b of attrgetter("a.b")."""
    for constant in code.co_consts:
        if isinstance(constant, str) and DOTTED.fullmatch(constant):
            yield constant


def code_names(code: types.CodeType) -> set[str]:
    """Names of globals and attributes in a code object and in those inside it, as names or as
    texts."""
    inner = (each for each in code.co_consts if inspect.iscode(each))
    texts = (text.split(".") for text in text_constants(code))
    return set(code.co_names).union(*texts, *map(code_names, inner))


def describe_code(code: types.CodeType) -> str:
    """Digest of bytecode, the same in every process."""
    count = code.co_argcount + code.co_kwonlyargcount
    parts = [code.co_code.hex(), code.co_exceptiontable.hex(), *code.co_names]
    # Names of parameters, by which they may be called; those of other variables do not matter.
    parts += [str(code.co_posonlyargcount), str(code.co_flags), *code.co_varnames[:count]]
    for constant in code.co_consts:
        if inspect.iscode(constant):
            parts.append(describe_code(constant))
        elif isinstance(constant, frozenset):
            parts.append(str(sorted(map(repr, constant))))
        else:
            parts.append(repr(constant))
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
