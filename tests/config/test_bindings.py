# SPDX-License-Identifier: Apache-2.0
"""Laws of bindings: each one is read, a string needs no quotes, and a mistake names its place."""

import pytest

from t5x_lite.config import gin_file

G2P = ["configs/runs/g2p.gin"]
BEGIN = 'include "runs/g2p.gin"\n'


def refusal(paths, bindings=()) -> str:
    with pytest.raises(gin_file.ConfigError) as raised:
        gin_file.load_run(paths, bindings)
    return str(raised.value)


UNREAD = [
    ("TRAIN_STEP=100", ["TRAIN_STEP changes nothing", "did you mean TRAIN_STEPS?"]),
    ("DROPOUT_RATE=0.1", ["DROPOUT_RATE changes nothing", "bind config.Model.dropout"]),
    ("LABEL_SMOOTHING=0.1", ["bind config.Train.label_smoothing"]),
    ("INITIAL_CHECKPOINT_PAHT='hf'", ["did you mean INITIAL_CHECKPOINT_PATH?"]),
    ("encodr/config.Stack.layers=3", ["no @encodr/config.Stack()", "did you mean encoder?"]),
    ("encoder/config.Train.steps=3", ["no @encoder/config.Train()", "without a scope"]),
    ("encoder/TRAIN_STEPS=3", ["encoder/TRAIN_STEPS changes nothing"]),
    ("config.Files.name='mine'", ["takes no config.Files", "@config.Files()"]),
    ("config.LayerSkip.dropout=0.2", ["takes no config.LayerSkip"]),
]


@pytest.mark.parametrize("binding, words", UNREAD)
def test_a_binding_that_nothing_reads_is_refused_in_a_run_and_on_the_command_line(
    tmp_path, binding, words
):
    path = tmp_path / "run.gin"
    path.write_text(BEGIN + binding.replace("=", " = ", 1) + "\n")
    for message, place in (
        (refusal([str(path)]), f"{path}:2"),
        (refusal(G2P, [binding]), f"--gin.{binding}"),
    ):
        assert message.startswith(f"{place}: ") and message.count("\n") == 0
        assert all(word in message for word in words), message


@pytest.mark.parametrize("binding, words", UNREAD)
def test_a_file_that_runs_include_may_bind_more_which_one_line_mentions(
    tmp_path, capsys, binding, words
):
    (tmp_path / "shared.gin").write_text(binding.replace("=", " = ", 1) + "\n")
    path = tmp_path / "run.gin"
    path.write_text(BEGIN + 'include "shared.gin"\n')
    assert gin_file.load_run([str(path)]) == gin_file.load_run(G2P)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{tmp_path / 'shared.gin'}:1: ")


def test_a_binding_that_an_override_puts_out_of_use_is_no_mistake(tmp_path, capsys):
    path = tmp_path / "run.gin"
    path.write_text(
        BEGIN
        + "SPANS = 2.0\nconfig.Data.objective = @a/b/config.SpanCorruption()\n"
        + "a/config.SpanCorruption.mean_span = %SPANS\n"
        + "encoder/config.Stack.layers = 2\nconfig.Model.dropout = 0.2\n"
    )
    run = gin_file.load_run([str(path)], ["config.Data.objective=None"])
    assert run.data.objective is None
    lone = ["config.Model.encoder=None", "config.Data.objective=@config.CausalLM()"]
    assert gin_file.load_run([str(path)], lone).model.encoder is None
    objective = gin_file.load_run([str(path)], ["SPANS=4"]).data.objective
    assert objective.mean_span == 4.0
    message = refusal([str(path)], ["config.Data.objective=None", "SPANS=4"])
    assert message.startswith("--gin.SPANS=4: SPANS changes nothing")
    assert capsys.readouterr().err == ""


def test_a_run_that_was_saved_is_read_whatever_it_binds():
    text = gin_file.to_text(gin_file.load_run(G2P))
    assert gin_file.from_text(text + "\nOLD_MACRO = 3\n") == gin_file.from_text(text)


@pytest.mark.parametrize(
    "text",
    [
        *("2024-06-01", "3b", "../runs/a b", ".hidden", "..", "-x", "(old) run", "runs/~x"),
        *("a # b", "3 # b", "1,2", "{a", "[1,", "'half", "007", "1e", "it's", "true", "a=b"),
        *("a\\b", 'say "hi"', "naïve", "100%", "a@b", "nan", "-", ".", "0x", "1 2", "1\nimport os"),
    ],
)
def test_a_value_that_is_no_complete_literal_is_that_string(text):
    assert gin_file.load_run(G2P, [f"MODEL_DIR={text}"]).model_dir == text


@pytest.mark.parametrize(
    "binding, field, value",
    [
        ("config.Run.seed=0x10", "seed", 16),
        ("config.Run.seed=1_000", "seed", 1000),
        ("MODEL_DIR='a b'", "model_dir", "a b"),
        ('MODEL_DIR="2024"', "model_dir", "2024"),
        ("config.Run.data=None", "data", None),
    ],
)
def test_a_complete_literal_is_its_value(binding, field, value):
    assert getattr(gin_file.load_run(G2P, [binding]), field) == value


@pytest.mark.parametrize(
    "binding, words",
    [
        ("TRAIN_STEPS=0", "Train.steps must be at least 1; got 0 (--gin.TRAIN_STEPS=0)"),
        ("config.Train.steps=[1,", "must be an integer; got '[1,' (--gin.config.Train.steps=[1,)"),
        (
            "config.Stack.kv_heads=3",
            "Stack.heads (8) must be a multiple of Stack.kv_heads (3) (--gin.config.Stack.kv_he",
        ),
        ("config.Train.tensorboard=true", "must be True or False; got 'true' (--gin.config.Trai"),
        ("MODEL_DIR=0x10", "got 16 (--gin.MODEL_DIR=0x10: write --gin.MODEL_DIR='\"0x10\"')"),
        ("config.Train.microbatches=3", "(--gin.config.Train.microbatches=3)"),
        ("config.Train.steps=%a/STEPS", "The macro a/STEPS has no value"),
        ("a b=3", "--gin.a b=3: 'a b' is not a name"),
        ("config.Train=3", "--gin.config.Train=3"),
    ],
)
def test_a_mistake_on_the_command_line_blames_the_flag(binding, words):
    message = refusal(G2P, [binding])
    assert words in message
    assert "<class" not in message and "<ast." not in message and "In call to" not in message


def test_a_mistake_in_a_file_names_the_line_that_has_the_value(tmp_path):
    path = tmp_path / "run.gin"
    path.write_text(BEGIN + "TRAIN_STEPS = 0\n")
    expected = f"Train.steps must be at least 1; got 0 ({path}:2)"
    assert refusal([str(path)]) == expected
    path.write_text(BEGIN + "STEPS = -1\nTRAIN_STEPS = %STEPS\nconfig.Train.log_every = 5\n")
    assert refusal([str(path)]).endswith(f"({path}:2)")
    assert refusal([str(path)], ["STEPS=-3"]).endswith("got -3 (--gin.STEPS=-3)")


@pytest.mark.parametrize("text", ["", "\n", " \n\n", "# nothing\n"])
def test_a_saved_config_without_a_line_has_no_run(text):
    with pytest.raises(gin_file.ConfigError, match=r"No config\.Run in the config"):
        gin_file.from_text(text)


@pytest.mark.parametrize("below", ["", "\n", "\n\n\n", "# a comment\n\n", "\r\n", "  \n\t\n"])
def test_lines_without_content_move_the_place_of_a_mistake_and_nothing_else(tmp_path, below):
    path = tmp_path / "run.gin"
    (tmp_path / "part.gin").write_text(below)
    path.write_text(BEGIN + below + 'include "part.gin"\n' + below + "TRAIN_STEPS = 0\n" + below)
    row = 3 + 2 * len(below.splitlines())
    assert refusal([str(path)]).endswith(f"got 0 ({path}:{row})")
    path.write_text(path.read_text().replace("STEPS = 0", "STEPS = 7"))
    assert gin_file.load_run([str(path)]) == gin_file.load_run(G2P, ["TRAIN_STEPS=7"])
