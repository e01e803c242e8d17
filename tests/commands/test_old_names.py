# SPDX-License-Identifier: Apache-2.0
"""Laws of old names outside .gin text: options, keyword arguments, and what runs left on disk."""

import dataclasses
import json
import zlib
from pathlib import Path

import pytest

from t5x_lite import config, interactive
from t5x_lite import eval as evaluate
from t5x_lite.adaptation import teacher_logits
from t5x_lite.checkpoints import step_folders
from t5x_lite.cli import records
from t5x_lite.comparison import measurements
from t5x_lite.config import aliases, gin_file
from t5x_lite.data import __main__ as preview
from t5x_lite.training import model_dir

SAVED = Path(__file__).parents[1] / "config" / "saved_05714b1"


@pytest.fixture(autouse=True)
def nothing_shown(monkeypatch):
    """Every test begins as a new process does."""
    monkeypatch.setattr(aliases, "SHOWN", set())


def test_a_command_takes_old_options_and_its_help_shows_the_new_ones(capsys):
    words = ["--checkpoint=a", "--decoder=lookup", "--width", "4", "--length=9"]
    options = evaluate.parser().parse(words)
    result = options.drafter, options.draft_length, options.max_new_tokens
    assert result == ("lookup", 4, 9)
    assert "--decoder is now --drafter" in capsys.readouterr().err
    shown = evaluate.parser().format_help()
    assert not any(f"{old} " in shown for old in aliases.OPTIONS)
    with pytest.raises(SystemExit):
        evaluate.parser().parse([*words, "--drafter=plain"])
    assert "--decoder is the old name of --drafter" in capsys.readouterr().err


@pytest.mark.parametrize("old, new", sorted(aliases.LAYOUTS.items()))
def test_the_preview_takes_old_layouts(old, new):
    files = ["--gin_file=configs/runs/g2p.gin"]
    assert preview.parser().parse([*files, f"--layout={old}"]).layout == new
    assert preview.parser().parse([*files, "--layout", old]).layout == new


def test_a_session_takes_old_keyword_arguments(capsys):
    session = interactive.Session(None, config.Decode())
    old = session.settings({"length": 3, "decoder": "lookup", "width": 4})
    assert old == config.Decode(max_new_tokens=3, drafter="lookup", draft_length=4)
    assert "length= is now max_new_tokens=" in capsys.readouterr().err
    with pytest.raises(ValueError, match="length is the old name of max_new_tokens"):
        session.settings({"length": 3, "max_new_tokens": 3})


def test_an_output_that_an_earlier_version_began_is_continued(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("{}\n")
    settings = {"input_digest": "1", "field": "length"}
    decode = dataclasses.asdict(config.Decode())
    sink = records.Sink(str(path), settings | {f"decode.{k}": v for k, v in decode.items()})
    old = {new: old for (owner, old), new in aliases.FIELDS.items() if owner == "Decode"}
    sink.settings_path.write_text(
        json.dumps(settings | {f"decode.{old.get(k, k)}": v for k, v in decode.items()})
    )
    sink.compare()


def test_measures_of_an_earlier_comparison_are_kept(tmp_path):
    path = tmp_path / "speed.json"
    assert measurements.read_measured(path) == {}
    path.write_text(json.dumps({"asked": {"quantised": ["int8"], "seeds": 1}, "quantised": {}}))
    expected = {"asked": {"quantized": ["int8"], "seeds": 1}, "quantized": {}}
    assert measurements.read_measured(path) == expected
    path.write_text(json.dumps({"asked": ["test", 10], "quantised": {"int8": 1}}))
    assert measurements.read_measured(path) == {"asked": ["test", 10], "quantized": {"int8": 1}}


def test_logits_of_a_teacher_written_by_an_earlier_version_are_of_the_same_data():
    run = gin_file.from_text((SAVED / "adapt_prefixlm_distill.gin").read_text())
    what = dataclasses.replace(run.data, cache_dir="")
    assert teacher_logits.logits_settings(run)["data"] == zlib.crc32(repr(("pair", what)).encode())


def test_a_run_that_an_earlier_version_began_goes_on_without_a_word(tmp_path):
    text = (SAVED / "heads_g2p.gin").read_text().replace("'runs/heads_g2p'", repr(str(tmp_path)))
    (tmp_path / "config.gin").write_text(text)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    assert step_folders.list_steps(tmp_path)
    run, messages = gin_file.from_text(text), []
    model_dir.check_config(run, messages.append)
    assert not messages
    longer = dataclasses.replace(run.train, steps=run.train.steps + 1)
    model_dir.check_config(dataclasses.replace(run, train=longer), messages.append)
    changed = [line for line in messages[0].splitlines() if line.startswith(("-train", "+train"))]
    assert len(changed) == 2 and all("config.Train.steps" in line for line in changed)
