# SPDX-License-Identifier: Apache-2.0
"""The data presets: each loads, and the built-in ones give batches."""

from pathlib import Path

import pytest

from t5x_lite import config, data
from t5x_lite.config import gin_file

FOLDER = Path(gin_file.configs_folder(), "data")
PRESETS = sorted(path.stem for path in FOLDER.glob("*.gin"))
OBJECTIVES = sorted(path.stem for path in FOLDER.glob("objectives/*.gin"))
RUN = """
include "data/{preset}.gin"
config.Run.model_dir = "runs/toy"
config.Run.model = @config.Model()
config.Model.vocab = 5000
config.Model.decoder = @config.Stack()
config.Stack.layers = 1
config.Stack.embed = 8
config.Stack.heads = 1
config.Stack.head_dim = 8
config.Stack.mlp = 8
config.Run.data = @config.Data()
config.Run.train = @config.Train()
config.Train.steps = 1
config.Train.batch_size = 1
config.Run.schedule = @config.Schedule()
config.Schedule.kind = "constant"
config.Schedule.peak = 0.1
"""


def loaded(preset: str, folder) -> config.Data:
    """Data of a preset."""
    path = folder / "run.gin"
    path.write_text(RUN.format(preset=preset))
    return gin_file.load_run([str(path)]).data


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_loads_and_its_text_loads_again(preset, tmp_path):
    cfg = loaded(preset, tmp_path)
    assert isinstance(cfg, config.Data)
    path = tmp_path / "run.gin"
    run = gin_file.load_run([str(path)])
    assert gin_file.from_text(gin_file.to_text(run)) == run


def test_a_mixture_of_a_built_in_task_and_files_is_all_gin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/train1.jsonl").write_text('{"source": "def f(): pass", "target": "Nothing."}\n' * 9)
    cfg = loaded("mixture", tmp_path)
    assert cfg.task.rates == (3.0, 1.0)
    files = config.Data(cfg.task.tasks[1], cfg.lengths, cache_dir=str(tmp_path / "cache"))
    assert data.open_batches(files, "encoder_decoder", 2, 0).statistics.examples == 9


SENTINELS = """
config.Data.vocabulary = @config.Vocabulary()
config.Vocabulary.kind = "bytes"
config.Vocabulary.extra_ids = {extra_ids}
config.Model.encoder = @config.Stack()
"""


@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_run_includes_an_objective_and_its_text_loads_again(name, tmp_path):
    path = tmp_path / "run.gin"
    include = f'include "data/objectives/{name}.gin"\n'
    path.write_text(RUN.format(preset="stdlib_prefix_lm") + include)
    run = gin_file.load_run([str(path)])
    assert gin_file.from_text(gin_file.to_text(run)) == run
    batch = data.open_batches(run.data, "decoder_only", 16, 0).at(0)
    assert batch.loss_weights.any(axis=1).all()


def test_the_mixtures_are_those_that_were_published():

    def table(name):
        return gin_file.load_data([f"data/objectives/{name}.gin"], LENGTHS).objective

    def spans(result):
        return [
            (part.mean_span, part.noise_density, part.mode)
            for part in result.parts
            if isinstance(part, config.SpanCorruption)
        ]

    ul2 = table("ul2")
    regular = [(3, 0.15, "[NLU]"), (8, 0.15, "[NLU]")]
    extreme = [(span, rate, "[NLG]") for span, rate in [(3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5)]]
    assert spans(ul2) == regular + extreme and set(ul2.rates) == {1}
    assert ul2.parts[-1] == config.PrefixLM(share=0.25, mode="[S2S]")
    t5gemma2 = table("t5gemma2")
    assert spans(t5gemma2) == [(3, 0.15, None), (12, 0.5, None), (32, 0.15, None), (32, 0.5, None)]
    assert t5gemma2.rates == (1, 1, 1, 1, 4)
    assert t5gemma2.parts[-1] == config.PrefixLM(share=0.75, split="fixed")
    ul2r = table("ul2r")
    assert ul2r.rates[-1] == sum(ul2r.rates) / 2


LENGTHS = ["config.Data.task=python_stdlib", 'config.Data.lengths={"inputs": 64, "targets": 64}']


@pytest.mark.parametrize(
    "lines, extra_ids, message",
    [
        (
            "config.SpanCorruption.noise_density = 0.5",
            100,
            "128 spans.*100 sentinels.*at least 128",
        ),
        ("config.SpanCorruption.noise_density = 0.15", 0, "set Vocabulary.extra_ids to at least 1"),
        ("config.Data.objective = @config.FillInTheMiddle()", 2, "needs 3 sentinels.*has 2"),
    ],
)
def test_too_few_sentinels_are_seen_when_the_config_loads(lines, extra_ids, message, tmp_path):
    path = tmp_path / "run.gin"
    text = RUN.format(preset="objectives/span_corruption") + SENTINELS.format(extra_ids=extra_ids)
    text += 'config.Data.task = "python_stdlib"\n'
    text += 'config.Data.lengths = {"inputs": 512, "targets": 512}\n'
    path.write_text(text + lines)
    with pytest.raises(gin_file.ConfigError, match=message):
        gin_file.load_run([str(path)])
    gin_file.load_run([str(path)], ["config.Vocabulary.extra_ids=128"])
    if extra_ids == 100:
        gin_file.load_run([str(path)], ["config.SpanCorruption.overflow=cap"])
