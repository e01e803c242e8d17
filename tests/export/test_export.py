# SPDX-License-Identifier: Apache-2.0
"""Laws of exported programs: the ids of greedy decoding, by jax alone, and refused mistakes."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import mark_exhaustive
from conversion_toys import GPT2, LLAMA, LONE, T5, Drawn, write_ours

from t5x_lite import convert, decoding, interactive
from t5x_lite.config import Decode, Model
from t5x_lite.export.programs import PLATFORMS
from t5x_lite.tokenizers import vocabularies

NEW = 10
MODELS = {"T5": T5, "LLAMA": LLAMA, "GPT2": GPT2, "LONE": LONE}
PROGRAMS = ["encode", "prefill", "step", "generate"]
BARE = ["--vocabulary=none"]
LOCATION = re.compile(r" loc\((?:[^()]|\([^()]*\))*\)")
# Modules of which none may be loaded where an export runs.
OURS = ("t5x_lite", "flax", "orbax", "safetensors", "tokenizers", "tensorflow", "torch")


def write_export(path: Path, model: Model) -> tuple[Path, Path]:
    """A run folder with drawn weights, and its export."""
    run = write_ours(path / "run", model, Drawn(model))
    symbols = vocabularies.SymbolVocabulary([chr(97 + i) for i in range(26)])
    vocabularies.save_pair(run / "vocabulary", symbols, symbols)
    sizes = ["--batch_size=3", "--input_length=6", "--row_length=16"]
    convert.main([f"--from={run}", f"--to={path / 'export'}", "--format=stablehlo", *sizes])
    return run, path / "export"


def draw_rows(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 40, size=rng.integers(1, 5)).tolist() for _ in range(count)]


def run_script(folder: Path, *batches: list[list[int]]) -> list:
    """Ids that the script of an export writes for batches of rows, with jax alone."""
    code = f"""
import json, runpy, sys
script = runpy.run_path({str(folder / "generate.py")!r})
print(json.dumps([script["generate"](rows, {NEW}) for rows in {batches}]))
loaded = {{name.partition(".")[0] for name in sys.modules}} & set({OURS})
assert not loaded, loaded
"""
    words = [sys.executable, "-I", "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def call_script(folder: Path, rows: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Ids that the script in a folder writes after rows, up to new_tokens, in this process."""
    with jax.set_mesh(None):
        return runpy.run_path(str(folder / "generate.py"))["generate"](rows, new_tokens)


def decode_greedily(
    run: Path, rows: list[list[int]], stops: list[int], **options
) -> list[list[int]]:
    """Ids that the model of a run itself decodes after rows, until one of stops; further options
    are fields of `Decode`."""
    predictor, decode = interactive.load(run).predictor, Decode(max_new_tokens=NEW, **options)
    # Rows for every device of the tests.
    batch = len(rows) * jax.device_count()
    request = decoding.make_request(predictor.cfg, rows, decode, batch=batch, eos=stops)
    result = decoding.generate(predictor.cfg, predictor.params, request, decode)
    pairs = zip(result.tokens[:, 0], result.lengths[:, 0], strict=True)
    return [tokens[:length].tolist() for tokens, length in pairs][: len(rows)]


@pytest.mark.slow  # decodes and exports each model, in two processes
@pytest.mark.parametrize("name", mark_exhaustive(MODELS, kept=["T5", "LLAMA"]))
def test_the_script_writes_the_ids_of_greedy_decoding_with_jax_alone(tmp_path, name):
    run, folder = write_export(tmp_path, MODELS[name])
    settings = json.loads((folder / "export.json").read_text())
    rows = draw_rows(3)
    ours = decode_greedily(run, rows, settings["stops"])
    # A row alone is filled up to the batch.
    assert run_script(folder, rows, rows[1:2]) == [ours, ours[1:2]]


@pytest.mark.slow  # decodes, and exports, in two processes
def test_the_script_begins_with_the_forced_token(tmp_path):
    run, folder = write_export(tmp_path, T5)
    settings, rows = json.loads((folder / "export.json").read_text()), draw_rows(3)
    assert settings["forced_bos_token_id"] == -1
    free = decode_greedily(run, rows, settings["stops"])
    forced = next(token for token in range(5, 40) if token not in {row[0] for row in free})
    changed = json.dumps(settings | {"forced_bos_token_id": forced})
    (folder / "export.json").write_text(changed)
    ours = decode_greedily(run, rows, settings["stops"], forced_bos_token_id=forced)
    assert all(row[0] == forced for row in ours)
    assert run_script(folder, rows) == [ours]


def test_a_rows_places_bound_its_text(folder):
    """A row of 16 places, of which the start token takes one, has 15 new ids at most."""
    texts = call_script(folder, draw_rows(3, seed=4), 100)
    stops = json.loads((folder / "export.json").read_text())["stops"]
    assert all(len(text) == 15 or text[-1] in stops for text in texts)
    assert any(len(text) == 15 for text in texts)
    shorter = call_script(folder, draw_rows(3, seed=4), 4)
    assert shorter == [text[:4] for text in texts]


def test_the_environment_does_not_change_programs(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("T5X_LITE_ATTENTION", "pallas")
    _, other = write_export(tmp_path, T5)
    for name in PROGRAMS:
        texts = []
        for each in (folder, other):
            program = jax.export.deserialize(bytearray((each / f"{name}.jax").read_bytes()))
            # Places in the source are numbered by what was traced before.
            lines = program.mlir_module().splitlines()
            lines = [LOCATION.sub("", line) for line in lines if not line.startswith("#loc")]
            assert any("stablehlo." in line for line in lines)
            texts.append(lines)
        assert texts[0] == texts[1]


def test_programs_name_no_file_of_this_machine(folder):
    for name in PROGRAMS:
        data = (folder / f"{name}.jax").read_bytes()
        assert len(data) > 1000 and b".py" not in data and str(Path.cwd()).encode() not in data


def test_the_script_has_thirty_lines_of_code():
    lines = Path("t5x_lite/export/generate.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 30


@pytest.mark.slow
def test_a_forced_first_token_is_exported(tmp_path):
    """A Hugging Face folder's forced_bos_token_id is the exported program's."""
    run = write_ours(tmp_path / "run", T5, Drawn(T5))
    convert.main([f"--from={run}", f"--to={tmp_path / 'hf'}", "--format=huggingface", *BARE])
    path = tmp_path / "hf/generation_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(settings | {"forced_bos_token_id": 7}))
    sizes = ["--batch_size=2", "--input_length=6", "--row_length=8"]
    to = tmp_path / "export"
    convert.main([f"--from={tmp_path / 'hf'}", f"--to={to}", "--format=stablehlo", *sizes, *BARE])
    assert json.loads((to / "export.json").read_text())["forced_bos_token_id"] == 7
    assert call_script(to, [[3, 4]], 3)[0][0] == 7


def test_the_card_names_the_script_and_no_door_that_does_not_open_the_folder(folder):
    card = (folder / "README.md").read_text()
    assert "python generate.py" in card and "interactive.load" not in card


def test_programs_are_for_all_platforms_in_the_sizes_of_the_options(folder):
    settings = json.loads((folder / "export.json").read_text())
    assert settings["version"] == 2 and settings["programs"] == PROGRAMS
    sizes = (settings["batch_size"], settings["input_length"], settings["row_length"])
    assert sizes == (3, 6, 16)
    for name in settings["programs"]:
        program = jax.export.deserialize(bytearray((folder / f"{name}.jax").read_bytes()))
        assert program.platforms == PLATFORMS and program.nr_devices == 1


@pytest.mark.parametrize(
    "options, words",
    [
        (["--dtype=bfloat16"], ["--dtype=bfloat16", "float32"]),
        (["--row_length=1"], ["--row_length=1", "no place"]),
        (["--batch_size=0"], ["--batch_size"]),
        (["--format=huggingface", "--row_length=8"], ["sizes of --format=stablehlo"]),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, capsys, options, words):
    run = write_ours(tmp_path / "run", T5, Drawn(T5))
    arguments = [f"--from={run}", f"--to={tmp_path / 'to'}", "--format=stablehlo", *options]
    with pytest.raises(SystemExit) as exit:
        convert.main([*arguments, "--vocabulary=none"])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not (tmp_path / "to").exists()


def test_positions_that_a_model_lacks_are_refused(tmp_path, capsys):
    run = write_ours(tmp_path / "run", GPT2, Drawn(GPT2))
    words = [f"--from={run}", f"--to={tmp_path / 'to'}", "--format=stablehlo", "--vocabulary=none"]
    with pytest.raises(SystemExit):
        convert.main([*words, "--input_length=8", "--row_length=17"])
    assert "--row_length=17: the model has 16 learned positions" in capsys.readouterr().err


@pytest.mark.parametrize(
    "rows",
    [[[3, 40]], [[3, -1]], [[3], []], [[3] * 7], [[3]] * 4, []],
    ids=["large", "negative", "empty", "long", "many", "none"],
)
def test_the_script_refuses_rows_that_do_not_fit(folder, rows):
    with pytest.raises(ValueError, match="takes 1 to 3 rows of 1 to 6 ids from 0 to 39"):
        call_script(folder, rows, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The export of a T5."""
    return write_export(tmp_path_factory.mktemp("export"), T5)[1]
