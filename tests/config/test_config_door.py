# SPDX-License-Identifier: Apache-2.0
"""Laws of the config's door: no file runs code, reads what is not a config, or takes forever."""

import fuzzing
import pytest

from t5x_lite.config import gin_check, gin_file

BEGIN = 'include "runs/g2p.gin"\n'
SYSTEM = "config.dataclasses.inspect.os.system"


def refused(folder, text: str, begin: str = BEGIN) -> str:
    path = folder / "bad.gin"
    path.write_text(begin + text, encoding="utf-8")
    with pytest.raises(gin_file.ConfigError) as caught:
        gin_file.load_run([str(path)])
    return str(caught.value)


@pytest.mark.parametrize(
    "text, word",
    [
        ("import os", "import os"),
        ("import os as config", "import os as config"),
        ("from os import system", "from os import system"),
        # gin joins what a backslash divides.
        ("import\\\n os", "import os"),
        ("from t5x_lite\\\n import train", "from t5x_lite import train"),
        ("from t5x_lite import config as other", "config as other"),
        ("import t5x_lite.train", "t5x_lite.train"),
        ('include "/etc/passwd"', "/etc/passwd"),
        ('include "../../../../etc/passwd"', "etc/passwd"),
        ('include \\\n "/etc/passwd"', "include stands on a line of its own"),
        (f'{SYSTEM}.command = "true"', SYSTEM),
        (f"config.Run.seed = @{SYSTEM}()", SYSTEM),
        (f"config.Run.seed = [{{'a': (@x/{SYSTEM}(),)}}]", SYSTEM),
        (f"SEED = @{SYSTEM}", SYSTEM),
        (f"{SYSTEM}:\n  command = 'true'", SYSTEM),
        ("config.Run.seed = @gin.singleton()", "gin.singleton"),
        ("a/gin.macro.value = 3", "gin.macro"),
        ("a/macro.value = 3", "macro is not a dataclass"),
        ("config.Run.seed = %gin.REQUIRED", "%gin.REQUIRED"),
        ("config.Run.seed = @config.require()", "config.require"),
        ("config.Run.seed = @config.Run", "needs its brackets: @config.Run()"),
        ("config.Run.__init__ = 3", "__init__"),
        ("config.Run.self = 3", "self"),
        ("A = %B\nB = [%A]", "A -> B -> A"),
        ("config.Run.seed = " + 3000 * "[" + 3000 * "]", "nests too deep"),
        ("config.Run.seed = {[1]: 2}", "unhashable"),
        ("config.Run.seed = " + 2000 * '"a" ', "2,000 pieces"),
        ("config.Run.seed = " + 80_000 * "9", "a number of 80,000 digits"),
        ("config.Schedule.peak = 0." + 80_000 * "1", "digits"),
    ],
)
def test_what_is_more_than_data_is_told_with_its_line(tmp_path, text, word):
    message = refused(tmp_path, text)
    assert word in message and "bad.gin:2" in message, message


@pytest.mark.parametrize("size", [4_000, 16_000])
def test_a_text_of_nothing_much_is_read_in_linear_time(tmp_path, size):
    path = tmp_path / "blank.gin"
    path.write_text(BEGIN + size * "\n" + "config.Run.seed = 1\n")
    with fuzzing.limits():
        assert gin_file.load_run([str(path)]).seed == 1
        message = refused(tmp_path, "config.Run.seed = " + 20 * size * "9")
        assert "digits" in message and len(message) < 2000


def test_code_named_in_a_config_does_not_run(tmp_path):
    touched = tmp_path / "touched"
    refused(tmp_path, f'{SYSTEM}.command = "touch {touched}"\nconfig.Run.seed = @{SYSTEM}()\n')
    assert not touched.exists()


@pytest.mark.parametrize(
    "binding",
    [f"config.Run.seed=@{SYSTEM}()", "config.Run.seed=1\nimport os", f"{SYSTEM}.command=true"],
)
def test_the_command_line_is_held_to_the_same(binding):
    with pytest.raises(gin_file.ConfigError, match="--gin"):
        gin_file.load_run(["configs/runs/g2p.gin"], [binding])


def test_a_saved_config_is_held_to_the_same(tmp_path):
    text = gin_file.to_text(gin_file.load_run(["configs/runs/g2p.gin"]))
    with pytest.raises(gin_file.ConfigError, match="line 3.*\n.*import os|import os"):
        gin_file.from_text(text.replace("\n\n", "\nimport os\n", 1))


def test_macros_that_multiply_are_refused_before_they_do(tmp_path):
    doubled = "".join(f"A{k} = [%A{k + 1}, %a/A{k + 1}]\na/A{k} = %A{k}\n" for k in range(60))
    message = refused(tmp_path, doubled + "A60 = [1]\nconfig.Run.seed = %A0\n")
    assert "more than 100,000 values" in message


def test_files_that_include_each_other_are_told(tmp_path):
    (tmp_path / "one.gin").write_text('include "two.gin"\n')
    (tmp_path / "two.gin").write_text('include "one.gin"\n')
    with pytest.raises(gin_file.ConfigError, match="one.gin includes itself"):
        gin_file.load_run([str(tmp_path / "one.gin")])


def test_includes_that_multiply_are_refused_before_they_do(tmp_path):
    for k in range(40):
        (tmp_path / f"{k}.gin").write_text(2 * f'include "{k + 1}.gin"\n')
    (tmp_path / "wide.gin").write_text(300 * 'include "many.gin"\n')
    (tmp_path / "many.gin").write_text(100 * "# nothing\n")
    for name, word in (("0", "more than 10 deep"), ("wide", "lines with the includes")):
        with pytest.raises(gin_file.ConfigError, match=word):
            gin_file.load_run([str(tmp_path / f"{name}.gin")])


@pytest.mark.parametrize(
    "content, word", [(b"\xff\xfe", "not UTF-8"), (b"\n" * (2**20 + 1), "bytes")]
)
def test_a_file_that_is_no_config_is_told(tmp_path, content, word):
    (tmp_path / "bad.gin").write_bytes(content)
    with pytest.raises(gin_file.ConfigError, match=word):
        gin_file.load_run([str(tmp_path / "bad.gin")])


def test_a_config_elsewhere_may_be_included_by_its_whole_path(tmp_path):
    (tmp_path / "seed.gin").write_text("config.Run.seed = 7\n")
    path = tmp_path / "run.gin"
    path.write_text(f'{BEGIN}include "{tmp_path}/seed.gin"\n')
    assert gin_file.load_run([str(path)]).seed == 7


def test_every_name_that_may_be_bound_is_a_dataclass_of_the_config():
    names = gin_check.dataclass_names()
    assert {"Run", "Stack", "ParamGroup"} <= set(names) and "dataclasses" not in names
