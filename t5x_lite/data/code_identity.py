# SPDX-License-Identifier: Apache-2.0
"""Identity of a user's functions: their code and every value that it can reach.

A function is described by its bytecode, closure, defaults and the globals that it names, and so are
the functions, objects and modules of the user among these. Of libraries (the standard library,
installed packages, this package) only the version, the function itself and its arguments count.
"""

import contextlib
import functools
import hashlib
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
    path = getattr(sys.modules.get(module or ""), "__file__", None)
    if path is None:
        return package != "__main__"
    file = Path(path).resolve()
    return str(file).startswith(LIBRARIES) or not INSTALLED.isdisjoint(file.parts)


def printed(thing: Any) -> str:
    """Text of a value without memory addresses."""
    return ADDRESS.sub("", repr(thing))


def parts_of(thing: Any) -> Iterator[str | Reached]:
    """Yields the texts that describe a value, and the values that it reaches."""
    match thing:
        case list() | tuple():
            yield from map(Reached, thing)
        case dict():
            for key in sorted(thing, key=printed):
                yield from (Reached(key), Reached(thing[key]))
        case set() | frozenset():
            yield from map(Reached, sorted(thing, key=printed))
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
        case types.MethodType():
            yield from map(Reached, (thing.__func__, thing.__self__))
        case types.FunctionType():
            yield from function_parts(thing)
        case types.ModuleType():
            yield f"{thing.__name__} {getattr(thing, '__version__', '')}"
        case type():
            yield f"{thing.__module__}.{thing.__qualname__}"
            if not is_library(thing.__module__):
                yield from methods_of(thing)
        case _:
            yield from object_parts(thing)


def function_parts(function: types.FunctionType) -> Iterator[str | Reached]:
    """Yields the parts of a function: name, code, closure, defaults and globals."""
    library = is_library(function.__module__)
    yield f"{function.__module__}.{function.__qualname__}"
    yield describe_code(function.__code__)
    for cell in function.__closure__ or ():
        try:
            yield Reached(cell.cell_contents)
        except ValueError:  # a variable that has no value yet
            yield "empty"
    yield from map(Reached, (function.__defaults__, function.__kwdefaults__))
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None:
        yield Reached(wrapped)
    if library:
        package = sys.modules.get((function.__module__ or "").partition(".")[0])
        yield str(getattr(package, "__version__", ""))
        return
    names = code_names(function.__code__)
    for name in sorted(names & function.__globals__.keys()):
        value = function.__globals__[name]
        yield name
        yield Reached(value)
        if isinstance(value, types.ModuleType) and not is_library(value.__name__):
            reached = sorted(names & vars(value).keys())
            yield from (Reached(getattr(value, each)) for each in reached)


def methods_of(cls: type) -> Iterator[str | Reached]:
    """Yields the functions and plain values of a user's class, and its bases."""
    yield from map(Reached, cls.__bases__)
    for name, value in sorted(vars(cls).items()):
        value = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        value = value.fget if isinstance(value, property) else value
        if isinstance(value, types.FunctionType) or not name.startswith("__"):
            yield name
            yield Reached(value)


def object_parts(thing: Any) -> Iterator[str | Reached]:
    """Yields the parts of an object: its class, and its attributes or what its class prints."""
    yield Reached(type(thing))
    attributes = getattr(thing, "__dict__", {})
    if not is_library(type(thing).__module__):
        slots = [name for name in getattr(type(thing), "__slots__", ()) if hasattr(thing, name)]
        yield Reached(attributes | {name: getattr(thing, name) for name in slots})
        return
    if hasattr(type(thing), "__array__"):  # its text leaves values out where there are many
        with contextlib.suppress(Exception):
            yield Reached(np.asarray(thing))
            return
    if type(thing).__repr__ is not object.__repr__:
        yield printed(thing)
    # A library's object calls functions of the user: a data source, its reader.
    for name, value in sorted(attributes.items()):
        calls = isinstance(value, types.FunctionType | types.MethodType | functools.partial)
        if calls or not is_library(type(value).__module__):
            yield name
            yield Reached(value)


def code_names(code: types.CodeType) -> set[str]:
    """Names of globals and attributes in a code object and in those inside it."""
    inner = (each for each in code.co_consts if inspect.iscode(each))
    return set(code.co_names).union(*map(code_names, inner))


def describe_code(code: types.CodeType) -> str:
    """Digest of bytecode, the same in every process."""
    parts = [code.co_code.hex(), *code.co_names]
    for constant in code.co_consts:
        if inspect.iscode(constant):
            parts.append(describe_code(constant))
        elif isinstance(constant, frozenset):
            parts.append(str(sorted(map(repr, constant))))
        else:
            parts.append(repr(constant))
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
