# SPDX-License-Identifier: Apache-2.0
"""What the preview says is what the batches hold."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from t5x_lite import config, windows
from t5x_lite.data import __main__ as command
from t5x_lite.data import preview, preview_tables, vocabularies

MODES = ("[NLU]", "[NLG]")
DENOISERS = config.Denoisers(
    (
        config.SpanCorruption(0.15, 3.0, "[NLU]"),
        config.SpanCorruption(0.5, 8.0, "[NLG]"),
        config.PrefixLM(0.25),
        config.FillInTheMiddle(),
    ),
    (2, 1, 1, 1),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preview")
    draw = np.random.default_rng(0)
    with open(folder / "a.jsonl", "w") as lines:
        for number in range(400):
            words = "".join(draw.choice(list("abcdé [/x]"), draw.integers(1, 40)))
            lines.write(json.dumps({"in": words[:9], "text": f"{number} {words}"}) + "\n")
    (folder / "data.gin").write_text(GIN.format(folder=folder))
    return folder


GIN = """
from __gin__ import dynamic_registration
from t5x_lite import config

config.Data.task = @config.Files()
config.Files.name = "toy"
config.Files.train = "{folder}/a.jsonl"
config.Files.validation = "{folder}/a.jsonl"
config.Files.targets = "text"
config.Files.vocabulary = @config.Vocabulary()
config.Vocabulary.kind = "bytes"
config.Vocabulary.extra_ids = 40
config.Vocabulary.names = ("[NLU]", "[NLG]", "[S2S]")
config.Data.lengths = {{"inputs": 64, "targets": 64}}
config.Data.cache_dir = "{folder}/cache"
include "data/objectives/ul2.gin"
"""


def toy(folder, objective=DENOISERS, **changes) -> config.Data:
    vocabulary = config.Vocabulary("bytes", extra_ids=40, names=MODES)
    files = config.Files("toy", str(folder / "a.jsonl"), vocabulary, targets="text", **changes)
    lengths = {"inputs": 64, "targets": 64}
    return config.Data(files, lengths, objective, cache_dir=str(folder / "cache"))


@pytest.mark.parametrize("layout", ["pair", "joined"])
def test_measured_noise_is_what_was_asked_for(folder, layout):
    found = preview.denoisers(toy(folder), layout, seed=1, count=300)
    spans, dense, prefix, middle = found
    assert preview.noise(spans).density == pytest.approx(0.15, abs=0.01)
    hidden, count = windows.noise_and_spans(spans.cutter.window, 0.15, 3.0)
    assert preview.noise(spans).mean_span == pytest.approx(hidden / count, rel=0.01)
    assert preview.noise(dense).density == pytest.approx(0.5, abs=0.01)
    assert preview.noise(prefix).density == pytest.approx(0.25, abs=0.03)
    assert preview.noise(middle).sentinels == 3
    assert [each.asked for each in found] == pytest.approx([0.4, 0.2, 0.2, 0.2])
    for each in found:
        assert each.drawn == pytest.approx(each.asked, abs=0.1)
        for name, limit in zip(("inputs", "targets"), each.limits, strict=True):
            assert max(len(getattr(example, name)) for example in each.examples) <= limit
        assert all(example.loss.all() for example in each.examples)


def test_masking_of_an_encoder_alone_is_measured_by_its_loss(folder):
    cfg = toy(folder, config.SpanCorruption(0.2, 4.0, "[NLU]"))
    (found,) = preview.denoisers(cfg, "aligned", seed=1, count=100)
    noise = preview.noise(found)
    assert noise.density == pytest.approx(0.2, abs=0.01)
    assert noise.mean_span == pytest.approx(4, abs=0.5)


@pytest.mark.parametrize("layout", ["pair", "joined"])
def test_pairs_of_a_task_are_shown_as_they_are(folder, layout):
    cfg = toy(folder, None, inputs="in")
    (found,) = preview.denoisers(cfg, layout, seed=1, count=50)
    assert found.cutter is None and found.limits == (64, 64)
    lines = [json.loads(line) for line in open(folder / "a.jsonl")]
    wanted = {(each["in"], each["text"]) for each in lines}
    for example in found.examples:
        inputs, targets = map(found.vocabularies[0].decode, (example.inputs, example.targets))
        assert (inputs, targets) in wanted


def test_ends_inside_a_text_are_shown():
    vocabulary = vocabularies.Bytes(extra_ids=3)
    ids = np.array([*vocabulary.encode("ab"), 1, *vocabulary.encode("c"), 1])
    assert preview.written(vocabulary, ids) == "ab</s>c</s>"


def test_a_long_text_loses_its_middle():
    text = "a" * 500 + "b" * 500
    told = preview.shortened(text, 100)
    assert told == "a" * 50 + " [... 900 characters ...] " + "b" * 50
    assert preview.shortened("short", 100) == "short"


def test_the_command_shows_examples_and_tables(folder, capsys):
    assert command.main([f"--gin_file={folder}/data.gin", "--preview=1", "--count=40"]) == 0
    told = capsys.readouterr().out
    for words in ("toy/[NLU] spans 0.15 3, example 0", "tokens bear loss", "<extra_id_0>", "[S2S]"):
        assert words in told
    assert len(re.findall("example 0", told)) == 7
    assert "14.3%" in told and "What was drawn in 40 rows" in told


def test_text_that_looks_like_markup_is_shown_as_it_is(folder):
    (found,) = preview.denoisers(toy(folder, config.PrefixLM()), "pair", 0, count=1)
    ids = np.array(vocabularies.Bytes().encode("[bold]x[/bold] [/x]"))
    assert preview_tables.text(found, 0, ids).plain == "[bold]x[/bold] [/x]"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--preview=5", "--count=2"], "as many as are shown"),
        (["--split=test"], "no split 'test'"),
        (["--layout=aligned"], "PrefixLM is for a model with a decoder"),
        (["--gin.config.Vocabulary.extra_ids=0"], "Vocabulary.extra_ids to at least 1"),
        (["--oops"], "unknown argument '--oops'"),
        (["--import=no_such_module"], "no such module"),
    ],
)
def test_a_mistake_is_told_without_a_traceback(folder, arguments, message, capsys):
    assert command.main([f"--gin_file={folder}/data.gin", *arguments]) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_nothing_of_the_preview_imports_jax(folder):
    script = (
        "import sys; from t5x_lite.data.__main__ import main; "
        f"main(['--gin_file={folder}/data.gin', '--preview=1', '--count=2']); "
        "assert not {'jax', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
