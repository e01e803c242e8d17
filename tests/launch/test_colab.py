# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from top to bottom, in a small form, and are kept as they are to be opened."""

import ast
import importlib
import os
import re
import runpy
import shutil
import tomllib
from pathlib import Path

import nbformat
import pytest
from conftest import COMPILE_QUICKLY
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "colab"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

# What takes the place of a notebook's parameters.
SMALL = {
    "1_first_steps": "LENGTH, DRAWS = 6, 1",
    "2_train_your_data": "EXAMPLES, HELD_OUT, STEPS, BATCH_SIZE = 200, 8, 4, 8",
    "3_adapt_a_decoder": "DECODER_STEPS, PAIR_STEPS, BATCH_SIZE, MEASURED, LAYERS = 2, 5, 8, 1, 1",
    "4_parallel_decoding": """\
MODEL, LENGTH, WIDTHS, WIDTH = "runs/colab/dates/run", 8, (4,), 4
DECODERS, TEXTS = ("lookup",), {"a date": "14 July 1789"}""",
    "5_compare_twins": """\
STEPS, LAYERS, SEEDS, EXAMPLES, LENGTHS = 2, 1, 1, 8, (4,)
TWINS, DRAFTERS, QUANTIZED = ("encoder_decoder", "causal_decoder"), (), ()""",
    "6_plan_a_tpu_run": """\
CONFIG, PRICE, TOPOLOGIES = "configs/runs/quickstart.gin", 1.2, ("v5e:2x2",)
BINDINGS = {"config.Stack.layers": 1, "config.Train.unroll": 1}
LARGE, LARGE_TOPOLOGY = "configs/models/g2p.gin", "v5e:2x2\"""",
}
# Their commands have tests of their own; these take 40 s of a core each, and are run for a release.
# The fourth runs the second, too.
LONG = {"1_first_steps", "3_adapt_a_decoder", "5_compare_twins", "6_plan_a_tpu_run"}
# Which notebook leaves the model that another one takes in its small form.
AFTER = {"4_parallel_decoding": "2_train_your_data"}


def tagged(notebook, tag: str):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def small(path: Path):
    """The notebook with parameters that take seconds."""
    notebook = nbformat.read(path, as_version=4)
    tagged(notebook, "parameters")[0].source = SMALL[path.stem]
    return notebook


def environment(folder: Path) -> dict[str, str]:
    """Of the kernels: one device, quick compilation, and no file outside the folder."""
    return os.environ | {"HOME": str(folder), "XLA_FLAGS": COMPILE_QUICKLY}


@pytest.fixture(scope="module")
def execute(tmp_path_factory):
    """Executes a notebook by name in one folder that all share, each once."""
    folder, done = tmp_path_factory.mktemp("colab"), {}
    shutil.copy(FOLDER / "install.py", folder)

    def executed(name: str):
        if name in AFTER:
            executed(AFTER[name])
        if name not in done:
            done[name] = notebook = small(FOLDER / f"{name}.ipynb")
            where = {"metadata": {"path": str(folder)}}
            client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where)
            client.execute(env=environment(folder))
        return done[name]

    return executed


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.exhaustive] if name in LONG else []) for name in SMALL],
)
def test_a_notebook_runs_from_top_to_bottom(name, execute):
    for cell in execute(name).cells:
        if cell.cell_type == "code":
            kinds = [output.output_type for output in cell.outputs]
            assert cell.execution_count and "error" not in kinds
            # What a cell ends with draws itself once, and nothing else draws it too.
            assert "execute_result" not in kinds or "display_data" not in kinds, cell.source


def test_every_notebook_has_a_small_form():
    assert [path.stem for path in NOTEBOOKS] == list(SMALL)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_as_it_is_to_be_opened(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4 and notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    first, *rest = notebook.cells
    assert first.cell_type == "markdown" and "SPDX-License-Identifier: Apache-2.0" in first.source
    code = [cell for cell in rest if cell.cell_type == "code"]
    assert [cell.metadata.get("tags") for cell in code[:2]] == [["install"], ["parameters"]]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)


def names_bound(source: str) -> set[str]:
    return {
        node.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_small_form_has_all_parameters_and_no_others(path):
    kept_source = tagged(nbformat.read(path, as_version=4), "parameters")[0].source
    assert names_bound(SMALL[path.stem]) == names_bound(kept_source)


def test_the_first_cell_is_one_line_that_works_as_it_is():
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for path in NOTEBOOKS:
        cell = tagged(nbformat.read(path, as_version=4), "install")[0].source
        line = re.fullmatch(r"%run (\w+\.py) (\w+)", cell)
        assert line and (FOLDER / line[1]).exists() and line[2] in known


@pytest.mark.parametrize("chips", ["", "cuda", "tpu"])
def test_a_notebook_installs_the_clone_with_the_chips_of_the_runtime(chips, monkeypatch):
    words = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: "here" if chips == "cuda" else None)
    monkeypatch.setattr("glob.glob", lambda path: [path] if chips == "tpu" else [])
    monkeypatch.setattr("subprocess.run", lambda command, check: words.extend(command))
    monkeypatch.setattr("sys.argv", ["install.py", "gguf"])
    runpy.run_path(str(FOLDER / "install.py"), run_name="__main__")
    assert words[-1] == f"{ROOT}[gguf,{chips}]" if chips else f"{ROOT}[gguf]"


def code_of(cell) -> str:
    """The Python of a cell, without Jupyter's own commands."""
    lines = cell.source.splitlines() if cell.cell_type == "code" else []
    return "\n".join(line for line in lines if not line.startswith("%"))


def imports():
    """(notebook, module, name) of everything that a notebook imports from the package."""
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            for node in ast.walk(ast.parse(code_of(cell))):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("t5x_lite"):
                    for alias in node.names:
                        yield path.stem, node.module, alias.name


@pytest.mark.parametrize("notebook, module, name", sorted(set(imports())))
def test_what_a_notebook_imports_is_there(notebook, module, name):
    imported = importlib.import_module(module)
    assert hasattr(imported, name) or importlib.import_module(f"{module}.{name}")


def test_files_and_pages_that_a_notebook_names_are_there():
    for path in NOTEBOOKS:
        text = path.read_text()
        for name in re.findall(r"\b((?:configs|benchmarks|docs)/[\w./]+\.\w+)", text):
            assert (ROOT / name).exists(), f"{path.name} names {name}"
        for link in re.findall(r"\]\((\w+\.ipynb)\)", text):
            assert (FOLDER / link).exists(), f"{path.name} links to {link}"
