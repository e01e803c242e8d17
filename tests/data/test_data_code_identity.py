# SPDX-License-Identifier: Apache-2.0
"""Identity of code: everything that a function can reach is in it, and nothing of one process."""

import dataclasses
import functools
import subprocess
import sys
import types

import numpy as np
import pytest

from t5x_lite.data.code_identity import code_digest

# A user's module, of which each case changes one value that decides what `process` returns.
MODULE = """
import dataclasses, functools, re
import numpy as np
PREFIX = "one"
TABLE = {"key": ["one", 2]}
ARRAY = np.arange(3)
PATTERN = re.compile("one")
def helper(x):
    return "one" + x
def make(prefix):
    return lambda x: prefix + x
class Callable:
    suffix = "one"
    def __init__(self, value):
        self.value = value
    def __call__(self, x):
        return self.method(x)
    def method(self, x):
        return x + "one"
@dataclasses.dataclass
class Hidden:
    value: str = dataclasses.field(repr=False)
    def __call__(self, x):
        return self.value
def literal(x):
    return "one" + x
def by_global(x):
    return PREFIX + x
def by_table(x):
    return TABLE["key"][0] + x
def by_array(x):
    return x + str(ARRAY)
def by_pattern(x):
    return PATTERN.sub(x, x)
def by_default(x, prefix="one"):
    return prefix + x
def by_keyword(x, *, prefix="one"):
    return prefix + x
def by_helper(x):
    return helper(x)
def by_inner(x):
    return [helper(each) for each in x]
@functools.lru_cache
def decorated(x):
    return "one" + x
def recursive(x):
    return recursive(x[1:]) if x else PREFIX
closure = make("one")
nested = make(make("one"))
partial = functools.partial(by_default, prefix="one")
method = Callable("x").method
instance = Callable("one")
hidden = Hidden("one")
unordered = make({"one", "b", "c", "d"})
"""
CASES = [
    ("literal", 'return "one" + x\ndef by_global', 'return "two" + x\ndef by_global'),
    ("by_global", 'PREFIX = "one"', 'PREFIX = "two"'),
    ("by_table", '["one", 2]', '["two", 2]'),
    ("by_array", "arange(3)", "arange(4)"),
    ("by_pattern", 're.compile("one")', 're.compile("two")'),
    ("by_default", 'by_default(x, prefix="one")', 'by_default(x, prefix="two")'),
    ("by_keyword", '*, prefix="one"', '*, prefix="two"'),
    ("by_helper", 'helper(x):\n    return "one"', 'helper(x):\n    return "two"'),
    ("by_inner", 'helper(x):\n    return "one"', 'helper(x):\n    return "two"'),
    ("decorated", 'decorated(x):\n    return "one"', 'decorated(x):\n    return "two"'),
    ("recursive", 'PREFIX = "one"', 'PREFIX = "two"'),
    ("closure", 'closure = make("one")', 'closure = make("two")'),
    ("nested", 'make(make("one"))', 'make(make("two"))'),
    ("partial", 'by_default, prefix="one"', 'by_default, prefix="two"'),
    ("method", 'x + "one"', 'x + "two"'),
    ("instance", 'Callable("one")', 'Callable("two")'),
    ("instance", 'suffix = "one"', 'suffix = "two"'),
    ("instance", 'x + "one"', 'x + "two"'),
    ("hidden", 'Hidden("one")', 'Hidden("two")'),
    ("unordered", '{"one", "b"', '{"two", "b"'),
]


def module_of(text: str, name="users_module") -> types.ModuleType:
    """Module with a text, as an import gives it."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(text, "users_module.py", "exec"), module.__dict__)
    return module


@pytest.fixture(autouse=True)
def users_module(monkeypatch):
    monkeypatch.setattr("t5x_lite.data.code_identity.is_library", is_library)
    yield
    sys.modules.pop("users_module", None)


def is_library(module):
    return module != "users_module"


@pytest.mark.parametrize("name, old, new", CASES, ids=lambda each: each[:12])
def test_every_value_that_a_function_reaches_is_in_its_identity(name, old, new):
    assert MODULE.count(old) == 1
    first = code_digest(getattr(module_of(MODULE), name))
    assert first == code_digest(getattr(module_of(MODULE), name))
    assert first != code_digest(getattr(module_of(MODULE.replace(old, new)), name))


def test_what_a_function_does_not_reach_is_not_in_its_identity():
    first = code_digest(module_of(MODULE).literal)
    assert first == code_digest(module_of(MODULE.replace("arange(3)", "arange(4)")).literal)


def test_code_of_another_module_of_the_user_is_reached(tmp_path):
    (tmp_path / "helping.py").write_text("def clean(x):\n    return x\n")
    (tmp_path / "mine.py").write_text("import helping\ndef f(x):\n    return helping.clean(x)\n")
    program = "import mine, sys; from t5x_lite.data.code_identity import code_digest as d; "

    def digest():
        command = [sys.executable, "-c", program + "print(d(mine.f, {'b', 'a', 'c'}, object()))"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout

    first = digest()
    assert first == digest()
    (tmp_path / "helping.py").write_text("def clean(x):\n    return x.strip()\n")
    assert first != digest()


@dataclasses.dataclass
class Loop:
    """A value that reaches itself."""

    value: object


def test_values_that_reach_themselves_end():
    loop, other = Loop(1), Loop(2)
    loop.value, other.value = [loop], [other]
    assert code_digest(loop) == code_digest(other)


def test_values_may_be_nested_without_limit():
    def nested(value):
        for _ in range(5000):
            value = [value]
        return value

    assert code_digest(nested(1)) == code_digest(nested(1)) != code_digest(nested(2))


def test_a_library_counts_by_version_and_arguments():
    assert code_digest(functools.partial(np.sort, axis=0)) != code_digest(
        functools.partial(np.sort, axis=1)
    )
    assert code_digest(np) == code_digest(np) != code_digest(dataclasses)
