# SPDX-License-Identifier: Apache-2.0
"""Identity of code: everything that a function can reach is in it, and nothing of one process."""

import dataclasses
import functools
import importlib
import subprocess
import sys
import types

import numpy as np
import pytest

from t5x_lite.data.code_identity import code_digest

# A user's module, of which each case changes one value that decides what `process` returns.
MODULE = """
import collections, dataclasses, functools, re, types
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
class Missing(dict):
    def __missing__(self, key):
        return "one"
class Slotted:
    __slots__ = "slot"
    def __init__(self, value):
        self.slot = value
class Inheriting(Slotted):
    __slots__ = ("other",)
class Naming(type):
    def __call__(cls, x):
        return "one" + x
class Named(metaclass=Naming):
    pass
def make_table(value):
    return {"key": value}.get
def by_attribute(x):
    return by_attribute.prefix + x
by_attribute.prefix = "one"
def by_order(first, second):
    return first
def by_attempt(x):
    try:
        x = int(x)
    except ValueError:
        return None
    x += 1
    return x
missing = Missing(key="value")
factory = collections.defaultdict(lambda: "one")
queue = collections.deque([lambda x: "one" + x])
view = types.MappingProxyType({"fix": lambda x: "one" + x})
space = types.SimpleNamespace(table={"fix": [lambda x: "one" + x]})
slotted = Inheriting("one")
bound = make_table("one")
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
    (
        "missing",
        '__missing__(self, key):\n        return "one"',
        "__missing__(self, key):\n        0",
    ),
    ("factory", 'defaultdict(lambda: "one")', 'defaultdict(lambda: "two")'),
    ("queue", 'deque([lambda x: "one"', 'deque([lambda x: "two"'),
    ("view", 'Type({"fix": lambda x: "one"', 'Type({"fix": lambda x: "two"'),
    ("space", '{"fix": [lambda x: "one"', '{"fix": [lambda x: "two"'),
    ("slotted", 'Inheriting("one")', 'Inheriting("two")'),
    ("Named", '__call__(cls, x):\n        return "one"', '__call__(cls, x):\n        return "two"'),
    ("bound", 'make_table("one")', 'make_table("two")'),
    ("by_attribute", 'by_attribute.prefix = "one"', 'by_attribute.prefix = "two"'),
    (
        "by_order",
        "by_order(first, second):\n    return first",
        "by_order(second, first):\n    return second",
    ),
    (
        "by_attempt",
        "    except ValueError:\n        return None\n    x += 1\n",
        "        x += 1\n    except ValueError:\n        return None\n",
    ),
]


def module_of(text: str, name="users_module") -> types.ModuleType:
    """Module with a text, as an import gives it."""
    module = types.ModuleType(name)
    module.__file__ = f"/users/{name}.py"
    sys.modules[name] = module
    exec(compile(text, "users_module.py", "exec"), module.__dict__)
    return module


@pytest.fixture(autouse=True)
def users_module():
    yield
    sys.modules.pop("users_module", None)


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


# A user's package: mine.f reaches "one" of clean.py.
CLEAN = """
import functools
PREFIX = "one"
FIXES = {"fix": lambda x: "one" + x}
def fix(x):
    return PREFIX + x
class Cleaner:
    prefix = "one"
    @classmethod
    def fix(cls, x):
        return cls.prefix + x
    @property
    def fixed(self):
        return "one"
def decorate(function):
    return lambda x: function("one" + x)
def other(x):
    return x
"""
CLEANED = "import functools, importlib, operator, sys\nimport mypkg.clean\n"
WAYS = {
    "attribute": CLEANED + "def f(x): return mypkg.clean.fix(x)",
    "alias": "import mypkg.clean as c\ndef f(x): return c.fix(x)",
    "member": "from mypkg import clean\ndef f(x): return clean.fix(x)",
    "imported inside": "def f(x):\n import mypkg.clean\n return mypkg.clean.fix(x)",
    "alias inside": "def f(x):\n import mypkg.clean as c\n return c.fix(x)",
    "function inside": "def f(x):\n from mypkg.clean import fix\n return fix(x)",
    "member inside": "def f(x):\n from mypkg import clean\n return clean.fix(x)",
    "relative": "def f(x):\n from .clean import fix\n return fix(x)",
    "relative member": "def f(x):\n from . import clean as c\n return [c.fix(y) for y in x]",
    "in a lambda": "def f(x):\n return (lambda: __import__ and g(x))()\n"
    "def g(x):\n from .clean import fix\n return fix(x)",
    "getattr": CLEANED + "def f(x): return getattr(getattr(mypkg, 'clean'), 'fix')(x)",
    "attrgetter": CLEANED + "def f(x): return operator.attrgetter('clean.fix')(mypkg)(x)",
    "import_module": CLEANED + "def f(x): return importlib.import_module('mypkg.clean').fix(x)",
    "sys.modules": CLEANED + "def f(x): return sys.modules['mypkg.clean'].fix(x)",
    "constant": CLEANED + "def f(x): return mypkg.clean.PREFIX + x",
    "lambda in a dict": CLEANED + "def f(x): return mypkg.clean.FIXES['fix'](x)",
    "class method": CLEANED + "def f(x): return mypkg.clean.Cleaner.fix(x)",
    "property": CLEANED + "def f(x): return mypkg.clean.Cleaner().fixed + x",
    "decorator": CLEANED + "@mypkg.clean.decorate\ndef f(x): return x",
    "partial": CLEANED + "f = functools.partial(mypkg.clean.fix)",
    "closure": CLEANED + "def make(module): return lambda x: module.fix(x)\nf = make(mypkg.clean)",
    "default": CLEANED + "def f(x, module=mypkg.clean): return module.fix(x)",
}
# The module is a value, of which anything may be used.
VALUES = {
    "keyword": CLEANED + "def f(x, *, module=mypkg.clean): return module.fix(x)",
    "argument": CLEANED + "def g(module, x): return module.fix(x)\n"
    "f = functools.partial(g, mypkg.clean)",
    "in a dict": CLEANED + "TABLE = {1: mypkg.clean}\ndef f(x): return TABLE[1].fix(x)",
    "of an object": CLEANED + "class C:\n def __init__(self): self.module = mypkg.clean\n"
    " def __call__(self, x): return self.module.fix(x)\nf = C()",
}


@pytest.fixture
def digest_in_package(tmp_path, monkeypatch):
    """Digest of mine.f in a package with these modules, imported anew."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "mypkg"]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def digest(clean, mine, regular=True):
        forget()
        (tmp_path / "mypkg").mkdir(exist_ok=True)
        (tmp_path / "mypkg" / "clean.py").write_text(clean)
        (tmp_path / "mypkg" / "mine.py").write_text(mine)
        if regular:
            (tmp_path / "mypkg" / "__init__.py").write_text("")
        return code_digest(importlib.import_module("mypkg.mine").f)

    yield digest
    forget()


@pytest.mark.parametrize("regular", [True, False])
@pytest.mark.parametrize("way", [*WAYS, *VALUES])
def test_a_module_of_a_package_is_reached_in_every_way(way, regular, digest_in_package):
    mine = (WAYS | VALUES)[way]
    first = digest_in_package(CLEAN, mine, regular)
    assert first == digest_in_package(CLEAN, mine, regular)
    assert first != digest_in_package(CLEAN.replace("one", "two"), mine, regular)
    other = digest_in_package(CLEAN.replace("return x\n", "return x * 2\n"), mine, regular)
    assert (first == other) == (way in WAYS)


def test_a_module_that_is_not_there_or_fails_is_left_out(digest_in_package):
    mine = "def f(x):\n try:\n  from .fast import fix\n except ImportError:\n  return x\n"
    assert digest_in_package(CLEAN, mine) == digest_in_package(CLEAN, mine)
    assert digest_in_package("1 / 0", "def f(x):\n from .clean import fix\n return fix(x)")


def test_a_library_is_not_imported_for_an_identity(tmp_path):
    program = (
        "import sys\ndef f(x):\n import sqlite3\n return sqlite3.connect(x)\n"
        "from t5x_lite.data.code_identity import code_digest as d; d(f)\n"
        "assert 'sqlite3' not in sys.modules"
    )
    (tmp_path / "program.py").write_text(program)
    subprocess.run([sys.executable, tmp_path / "program.py"], check=True)


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
