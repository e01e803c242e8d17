# SPDX-License-Identifier: Apache-2.0
"""The data presets: each loads, and the built-in ones give batches."""

from pathlib import Path

import pytest

from t5x_lite import config, config_file, data

PRESETS = sorted(path.stem for path in Path(config_file.configs_folder(), "data").glob("*.gin"))
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
    path = folder / "run.gin"
    path.write_text(RUN.format(preset=preset))
    return config_file.load([str(path)]).data


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_loads_and_its_text_loads_again(preset, tmp_path):
    cfg = loaded(preset, tmp_path)
    assert isinstance(cfg, config.Data)
    path = tmp_path / "run.gin"
    run = config_file.load([str(path)])
    assert config_file.from_text(config_file.text(run)) == run


def test_a_mixture_of_a_built_in_task_and_files_is_all_gin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/train1.jsonl").write_text('{"source": "def f(): pass", "target": "Nothing."}\n' * 9)
    cfg = loaded("mixture", tmp_path)
    assert cfg.task.rates == (3.0, 1.0)
    files = config.Data(cfg.task.tasks[1], cfg.lengths, cache_dir=str(tmp_path / "cache"))
    assert data.open_batches(files, "pair", 2, 0).statistics.examples == 9
