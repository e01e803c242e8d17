# SPDX-License-Identifier: Apache-2.0
"""The preview shows the contents of the batches."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from t5x_lite import config
from t5x_lite.config import windows
from t5x_lite.data import __main__ as command
from t5x_lite.data import preview
from t5x_lite.data.preview import tables
from t5x_lite.tokenizers import vocabularies

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
    """Data of running text.

    Args:
      folder: of the JSONL file and the cache.
      objective: that cuts the text.
      **changes: other fields of config.Files.
    """
    vocabulary = config.Vocabulary("bytes", extra_ids=40, names=MODES)
    files = config.Files("toy", str(folder / "a.jsonl"), vocabulary, targets="text", **changes)
    lengths = {"inputs": 64, "targets": 64}
    return config.Data(files, lengths, objective, cache_dir=str(folder / "cache"))


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
def test_measured_noise_is_what_was_asked_for(folder, layout):
    result = preview.denoisers(toy(folder), layout, seed=1, count=300)
    spans, dense, prefix, middle = result
    assert preview.measure_noise(spans).density == pytest.approx(0.15, abs=0.01)
    hidden, count = windows.noise_and_spans(spans.preprocessor.window, 0.15, 3.0)
    assert preview.measure_noise(spans).mean_span == pytest.approx(hidden / count, rel=0.01)
    assert preview.measure_noise(dense).density == pytest.approx(0.5, abs=0.01)
    assert preview.measure_noise(prefix).density == pytest.approx(0.25, abs=0.03)
    assert preview.measure_noise(middle).sentinels == 3
    assert [each.configured_share for each in result] == pytest.approx([0.4, 0.2, 0.2, 0.2])
    for each in result:
        assert each.share == pytest.approx(each.configured_share, abs=0.1)
        for name, limit in zip(("inputs", "targets"), each.limits, strict=True):
            assert max(len(getattr(example, name)) for example in each.examples) <= limit
        assert all(example.loss.all() for example in each.examples)


def test_masking_of_an_encoder_alone_is_measured_by_its_loss(folder):
    cfg = toy(folder, config.SpanCorruption(0.2, 4.0, "[NLU]"))
    (result,) = preview.denoisers(cfg, "encoder_only", seed=1, count=100)
    noise = preview.measure_noise(result)
    assert noise.density == pytest.approx(0.2, abs=0.01)
    assert noise.mean_span == pytest.approx(4, abs=0.5)


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
def test_pairs_of_a_task_are_shown_as_they_are(folder, layout):
    cfg = toy(folder, None, inputs="in")
    (result,) = preview.denoisers(cfg, layout, seed=1, count=50)
    assert result.preprocessor is None and result.limits == (64, 64)
    lines = [json.loads(line) for line in open(folder / "a.jsonl")]
    wanted = {(each["in"], each["text"]) for each in lines}
    for example in result.examples:
        inputs, targets = map(result.vocabularies[0].decode, (example.inputs, example.targets))
        assert (inputs, targets) in wanted


def test_ends_inside_a_text_are_shown():
    vocabulary = vocabularies.ByteVocabulary(extra_ids=3)
    ids = np.array([*vocabulary.encode("ab"), 1, *vocabulary.encode("c"), 1])
    assert preview.decode_with_ends(vocabulary, ids) == "ab</s>c</s>"


def test_a_long_text_loses_its_middle():
    text = "a" * 500 + "b" * 500
    output = preview.shorten_text(text, 100)
    assert output == "a" * 50 + " [... 900 characters ...] " + "b" * 50
    assert preview.shorten_text("short", 100) == "short"


def test_the_command_shows_examples_and_tables(folder, capsys):
    assert command.main([f"--gin_file={folder}/data.gin", "--preview=1", "--count=40"]) == 0
    output = capsys.readouterr().out
    for words in ("toy/[NLU] spans 0.15 3, example 0", "tokens bear loss", "<extra_id_0>", "[S2S]"):
        assert words in output
    assert len(re.findall("example 0", output)) == 7
    assert "14.3%" in output and "Rates and noise of 40 rows" in output


def test_text_that_looks_like_markup_is_shown_as_it_is(folder):
    (result,) = preview.denoisers(toy(folder, config.PrefixLM()), "encoder_decoder", 0, count=1)
    ids = np.array(vocabularies.ByteVocabulary().encode("[bold]x[/bold] [/x]"))
    assert tables.ids_text(result, 0, ids).plain == "[bold]x[/bold] [/x]"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--preview=5", "--count=2"], "as many as are shown"),
        (["--split=test"], "no split 'test'"),
        (["--layout=encoder_only"], "PrefixLM is for a model with a decoder"),
        (["--gin.config.Vocabulary.extra_ids=0"], "Vocabulary.extra_ids to at least 1"),
        (["--oops"], "unknown option --oops"),
        (["--import=no_such_module"], "no such module"),
    ],
)
def test_a_mistake_is_told_without_a_traceback(folder, arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([f"--gin_file={folder}/data.gin", *arguments])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_nothing_of_the_preview_imports_jax(folder):
    script = (
        "import sys; from t5x_lite.data.__main__ import main; "
        f"main(['--gin_file={folder}/data.gin', '--preview=1', '--count=2']); "
        "assert not {'jax', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
