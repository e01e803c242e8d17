# SPDX-License-Identifier: Apache-2.0
"""Laws of old names: what was written with them loads to the same run, and says so once.

saved_05714b1/ holds texts that commit 05714b1 saved as config.gin, before the names changed.
"""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from t5x_lite import config, infer
from t5x_lite.config import aliases, gin_file

FOLDER = Path(__file__).parent / "saved_05714b1"
SAVED = sorted(path.name for path in FOLDER.glob("*.gin"))
G2P = ["configs/runs/g2p.gin"]
BINDING = re.compile(r"^((?:\w+/)*)config\.(\w+)\.(\w+) = (.*)$", re.MULTILINE)
# A value for every renamed field, for a run that has an owner of it.
BOUND = {
    ("Compare", "quantised"): ("compare_g2p", '("int4",)'),
    ("Decode", "decoder"): ("g2p", "lookup"),
    ("Decode", "length"): ("g2p", "7"),
    ("Decode", "width"): ("g2p", "5"),
    ("DraftHeadLoss", "own"): ("heads_g2p", "0.5"),
    ("Model", "activations"): ("g2p", "bfloat16"),
    ("Model", "blockwise"): ("heads_g2p", "None"),
    ("Model", "pooling"): (
        "g2p",
        '@config.Readout()\nconfig.Readout.kind="number"\nconfig.Train.label_smoothing=0.0',
    ),
    ("Model", "start"): ("g2p", "3"),
    ("Model", "starts_prompts"): ("g2p", "False"),
    ("Pooling", "kind"): ("sentence_t5", "first"),
    ("Train", "heads"): (
        "heads_g2p",
        '@config.DraftHeadLoss()\nconfig.DraftHeadLoss.heads="random"',
    ),
    ("Train", "parts"): ("g2p", '(@config.ParamGroup(),)\nconfig.ParamGroup.weights=("*",)'),
    ("Train", "patience"): ("g2p", "2"),
}


@pytest.fixture(autouse=True)
def nothing_shown(monkeypatch):
    """Every test begins as a new process does."""
    monkeypatch.setattr(aliases, "SHOWN", set())


def bindings(text: str) -> list[tuple[str, str, str, str]]:
    """(scope, class, field, value) of every line of a saved config, as it is written."""
    return [(scope.rstrip("/"), *rest) for scope, *rest in BINDING.findall(text)]


def node(run: config.Run, scope: str):
    """The part of a run that a scope of a saved config names: train/parts_0."""
    item = run
    for step in filter(None, scope.split("/")):
        name, number = re.fullmatch(r"(.*?)(?:_(\d+))?", step).groups()
        item = getattr(item, aliases.FIELDS.get((type(item).__name__, name), name))
        item = item[int(number)] if number else item
    return item


def owners(value: str) -> list[str]:
    """Today's names of the classes that a value refers to."""
    return [aliases.CLASSES.get(name, name) for name in re.findall(r"config\.(\w+)\(\)", value)]


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_config_loads_to_the_run_that_it_describes(name):
    text = (FOLDER / name).read_text()
    run, scopes = gin_file.from_text(text), {}
    for scope, owner, field, value in bindings(text):
        part = node(run, scope)
        assert type(part).__name__ == aliases.CLASSES.get(owner, owner)
        key = type(part).__name__, field
        new = aliases.FIELDS.get((owner, field), aliases.FIELDS.get(key, field))
        scopes.setdefault(scope, (part, set()))[1].add(new)
        item = getattr(part, new)
        if "@" in value:
            inner = item if isinstance(item, tuple) else (item,)
            assert [type(each).__name__ for each in inner] == owners(value)
        else:
            expected = ast.literal_eval(value)
            renamed = aliases.VALUES.get((key[0], new), {})
            assert item == (renamed.get(expected, expected) if renamed else expected), (key, value)
    for part, names in scopes.values():
        for field in dataclasses.fields(part):
            former = aliases.FORMER_VALUES.get((type(part).__name__, field.name))
            meant = field.default if former is None else ast.literal_eval(former)
            assert field.name in names or getattr(part, field.name) == meant


@pytest.mark.parametrize("name", SAVED)
def test_saved_again_it_has_todays_names_and_is_the_same_run(name, capsys):
    run = gin_file.from_text((FOLDER / name).read_text())
    assert "Old names" in capsys.readouterr().err
    text = gin_file.to_text(run)
    aliases.SHOWN.clear()
    assert gin_file.from_text(text) == run
    assert capsys.readouterr().err == ""
    for _, owner, field, value in bindings(text):
        assert owner not in aliases.CLASSES and (owner, field) not in aliases.FIELDS
        assert value.strip("'") not in aliases.VALUES.get((owner, field), {})


def test_every_class_field_and_value_of_the_table_is_in_a_saved_config():
    rows = [row for name in SAVED for row in bindings((FOLDER / name).read_text())]

    def new(owner):
        return aliases.CLASSES.get(owner, owner)

    fields = {(name, field): [] for _, old, field, _ in rows for name in (old, new(old))}
    for _, owner, field, value in rows:
        fields[new(owner), field].append(value.strip("'"))
    assert {owner for _, owner, _, _ in rows} >= aliases.CLASSES.keys()
    assert fields.keys() >= aliases.FIELDS.keys()
    for key, values in aliases.VALUES.items():
        assert set(fields[key]) >= values.keys()


@pytest.mark.parametrize("owner, old", sorted(aliases.FIELDS))
def test_an_old_field_on_the_command_line_overrides_the_new_one_of_a_file(owner, old):
    name, value = BOUND[owner, old]
    old_owner = {new: old for old, new in aliases.CLASSES.items()}.get(owner, owner)

    def run(field):
        bindings = f"config.{field}={value}".split("\n")
        return gin_file.load_run([f"configs/runs/{name}.gin"], bindings)

    today = run(f"{owner}.{aliases.FIELDS[owner, old]}")
    assert run(f"{owner}.{old}") == run(f"{old_owner}.{old}") == today
    assert today != gin_file.load_run([f"configs/runs/{name}.gin"])


@pytest.mark.parametrize(
    "owner, field, old",
    [(*key, old) for key, values in aliases.VALUES.items() for old in values],
)
def test_an_old_value_is_taken_also_through_a_macro(owner, field, old, tmp_path):
    written = tmp_path / "old.gin"
    new = aliases.VALUES[owner, field][old]
    run = gin_file.load_run(G2P, [f"config.{owner}.{field}={new}"])
    assert gin_file.load_run(G2P, [f"config.{owner}.{field}={old}"]) == run
    for text in (f"HOW = '{old}'", f'OTHER = "{old}"\nHOW = %OTHER'):
        written.write_text(f'include "runs/g2p.gin"\n{text}\nconfig.{owner}.{field} = %HOW\n')
        assert gin_file.load_run([str(written)]) == run


OLD = """
include "runs/g2p.gin"
include "adapting/cross_first.gin"
WARM_STEPS = 5
INITIAL_CHECKPOINT = "runs/a"
config.Data.cache_dir = %INITIAL_CHECKPOINT
cross/config.Part.rate = 0.5
config.Decode:
  decoder = "lookup"  # decoder = 1
  width = 4
config.Train.patience = (
    3)
""".lstrip()
NEW = """
include "runs/g2p.gin"
include "adaptation/cross_first.gin"
WARM_STEPS = 5
INITIAL_CHECKPOINT_PATH = "runs/a"
config.Data.cache_dir = %INITIAL_CHECKPOINT_PATH
cross/config.ParamGroup.rate = 0.5
config.Decode:
  drafter = "lookup"
  draft_length = 4
config.Train.max_consecutive_skips = 3
""".lstrip()


def test_a_file_with_old_names_is_the_same_run_and_names_them_once(tmp_path, capsys):
    for name, text in (("old", OLD), ("new", NEW)):
        (tmp_path / f"{name}.gin").write_text(text)
    new = gin_file.load_run([str(tmp_path / "new.gin")])
    assert capsys.readouterr().err == ""
    old = str(tmp_path / "old.gin")
    assert gin_file.load_run([old]) == new
    shown = capsys.readouterr().err
    for words in (
        "adapting/cross_first.gin is now adaptation/cross_first.gin",
        f"INITIAL_CHECKPOINT is now INITIAL_CHECKPOINT_PATH ({old}:4)",
        f"config.Part is now config.ParamGroup ({old}:6)",
        f"config.Decode.decoder is now config.Decode.drafter ({old}:8)",
        f"config.Decode.width is now config.Decode.draft_length ({old}:9)",
        f"config.Train.patience is now config.Train.max_consecutive_skips ({old}:10)",
    ):
        assert shown.count(words) == 1
    assert gin_file.load_run([old]) == new
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "config.Decode.decoder = 'plain'\nconfig.Decode.drafter = 'plain'",
            ["config.Decode.decoder is the old name of config.Decode.drafter", "gin:2", "gin:3"],
        ),
        ("config.Decode:\n  width = 2\nconfig.Decode.draft_length = 3", ["gin:3", "gin:4"]),
        ("INITIAL_CHECKPOINT = 'a'\nINITIAL_CHECKPOINT_PATH = 'b'", ["INITIAL_CHECKPOINT_PATH"]),
        ("a/config.Part.rate = 1\na/config.ParamGroup.rate = 2", ["config.Part.rate", "gin:3"]),
    ],
)
def test_a_file_that_binds_both_names_is_refused(text, words, tmp_path):
    path = tmp_path / "both.gin"
    path.write_text(f'include "runs/g2p.gin"\n{text}\n')
    with pytest.raises(gin_file.ConfigError) as caught:
        gin_file.load_run([str(path)])
    assert all(word in str(caught.value) for word in (*words, "leave out")), str(caught.value)


def test_a_command_line_that_binds_both_names_is_refused_and_two_files_are_not(tmp_path):
    with pytest.raises(gin_file.ConfigError, match=r"--gin.config.Decode.length"):
        gin_file.load_run(G2P, ["config.Decode.length=3", "config.Decode.max_new_tokens=4"])
    for name, field in (("a", "length"), ("b", "max_new_tokens")):
        (tmp_path / f"{name}.gin").write_text(f"config.Decode.{field} = {len(field)}\n")
    a, b = (str(tmp_path / f"{name}.gin") for name in "ab")
    assert gin_file.load_run([*G2P, a, b]).decode.max_new_tokens == len("max_new_tokens")
    assert gin_file.load_run([*G2P, b, a]).decode.max_new_tokens == len("length")
    # The same field of two scopes is two fields.
    (tmp_path / "a.gin").write_text(
        "x/config.Decode.length = 3\nconfig.Decode.max_new_tokens = 9\n"
    )
    (tmp_path / "c.gin").write_text('include "a.gin"\n')
    assert gin_file.load_run([*G2P, str(tmp_path / "c.gin")]).decode.max_new_tokens == 9


@pytest.mark.parametrize(
    "text, words",
    [
        ("config.Decode.decoder = 3\nconfig.Decode.bems = 1", "bad.gin:3"),
        ("config.Decode.decoder = [1,\n", "bad.gin"),
        ("config.Decode.decoders = 1", "bad.gin:2"),
        ("config.Decode.decoder = 3", "Decode.drafter must be a string"),
        ("config.Train.remat = 'layer'", "'minimal', 'full'"),
    ],
)
def test_a_mistake_beside_an_old_name_is_named_with_its_line(text, words, tmp_path):
    path = tmp_path / "bad.gin"
    path.write_text(f'include "runs/g2p.gin"\n{text}\n')
    with pytest.raises(gin_file.ConfigError) as caught:
        gin_file.load_run([str(path)])
    assert words in str(caught.value), str(caught.value)


def test_a_folder_of_ones_own_with_an_old_name_is_taken_as_it_is(tmp_path, capsys):
    (tmp_path / "adapting").mkdir()
    (tmp_path / "adapting" / "large.gin").write_text("config.Run.seed = 9\n")
    (tmp_path / "run.gin").write_text('include "runs/g2p.gin"\ninclude "adapting/large.gin"\n')
    assert gin_file.load_run([str(tmp_path / "run.gin")]).seed == 9
    assert capsys.readouterr().err == ""


KNOWN = ["--drafter", "--draft_length", "--max_new_tokens", "--layout", "--input"]


@pytest.mark.parametrize(
    "old, new",
    [
        *(([f"{old}=3"], [f"{new}=3"]) for old, new in aliases.OPTIONS.items()),
        *(([old, "3"], [new, "3"]) for old, new in aliases.OPTIONS.items()),
        *(([f"--layout={old}"], [f"--layout={new}"]) for old, new in aliases.LAYOUTS.items()),
        *((["--layout", old], ["--layout", new]) for old, new in aliases.LAYOUTS.items()),
    ],
)
def test_an_old_option_is_taken_and_named_once(old, new, capsys):
    before, after = ["--input", "pair"], ["--split=pair", "joined"]
    assert aliases.rename_options([*before, *old, *after], KNOWN) == [*before, *new, *after]
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "is now" in shown
    aliases.rename_options(old, KNOWN)
    assert capsys.readouterr().err == ""


def test_options_of_other_commands_stay_and_both_names_are_refused(capsys):
    for known in (["--width"], ["--width", "--draft_length"], []):
        assert aliases.rename_options(["--width=3"], known) == ["--width=3"]
    with pytest.raises(ValueError, match="--width is the old name of --draft_length"):
        aliases.rename_options(["--width=3", "--draft_length", "4"], KNOWN)
    assert capsys.readouterr().err == ""


def test_old_keys_of_settings_are_renamed_and_others_stay():
    old = {"decode.length": 3, "length": 4, "decode.seed": 5}
    new = {"decode.max_new_tokens": 3, "length": 4, "decode.seed": 5}
    assert aliases.rename_keys(old, "Decode", "decode.") == new
    assert aliases.rename_keys(new, "Decode", "decode.") == new
    with pytest.raises(ValueError, match="decode.length is the old name"):
        aliases.rename_keys(old | new, "Decode", "decode.")


@pytest.mark.parametrize("owner, name", aliases.ELSEWHERE)
def test_a_name_of_another_library_leads_to_a_field_at_every_door(owner, name, capsys):
    known = [field.name for field in dataclasses.fields(getattr(config, owner))]
    here = aliases.ELSEWHERE[owner, name]
    assert here.partition(" ")[0] in known and name not in known
    with pytest.raises(ValueError, match=re.escape(f"it is called {here} here")):
        gin_file.load_run(G2P, [f"config.{owner}.{name}=4"])
    with pytest.raises(SystemExit):
        infer.parser().parse(["--checkpoint=x", f"--{name}=4"])
    assert f"unknown option --{name}: it is called --{here} here" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lenght", "lengt"])
def test_a_misspelled_old_name_leads_to_the_new_one(name):
    with pytest.raises(ValueError, match="did you mean .*max_new_tokens"):
        gin_file.load_run(G2P, [f"config.Decode.{name}=4"])
