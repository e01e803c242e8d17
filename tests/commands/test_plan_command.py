# SPDX-License-Identifier: Apache-2.0
"""The plan command's doors: what it refuses and with which remedy, and plans by arithmetic."""

import json
import re
import subprocess
import sys

import pytest

from t5x_lite import plan
from t5x_lite.planning import preparing

FILE = "--gin_file=configs/runs/pretrain.gin"
TAUGHT = "--gin.config.Run.distillation=@config.Distillation()"
TEACHER = "--gin.config.Distillation.teacher=./some/folder"
PREFIX = "--gin.config.Data.objective=@config.PrefixLM()"
SMALL = ["--gin.config.Stack.layers=2", "--gin.BATCH_SIZE=64"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--topology=h100x8"], "GPUs are --chips=h100x8"),
        (["--chips=h100"], "--chips=h100: write a chip"),
        (["--chips=h100x8", "--search"], "are for a --topology"),
        (["--chips=h100x8", "--parameters"], "are for a --topology"),
        (["--chips=h100x8", "--decode"], "--decode is compiled for a --topology"),
        (["--topology=v5e:2x2", "--decode", "--search"], "--search and --parameters are of"),
        (["--topology=v5e:2x2", "--serve", "--parameters"], "--serve plans decoding"),
        (["--chips=v5ex1", "--serve", "--decode"], "not allowed with argument --serve"),
        (["--chips=v5ex1", "--inputs=9"], "--inputs is of decoding: add --serve"),
        (["--chips=v5ex1", "--serve", "--quantize=int3"], "quantize 'int3' is not one of"),
        (["--chips=v5ex1", "--serve", "--cache_dtype=int5"], "--cache_dtype"),
        (["--topology=v5e:2x2", "--serve", "--cache_dtype=int8"], "--cache_dtype is not compiled"),
        (["--topology=v5e:2x2", "--decode", "--plot=a.png"], "--plot draws --phases"),
        (["--chips=v5ex8", "--serve", "--decode_rows=12"], "--decode_rows=12 cannot be split"),
        (["--chips=v5ex8", "--phases", "--decode_rows=12"], "--decode_rows=12 cannot be split"),
        (["--chips=v5ex1", "--phases", "--gin.config.Model.decoder=None"], "encoder alone"),
        (["--topology=v5e:2x2", "--price=-1"], "--price must be at least 0; got -1.0"),
        (["--chips=h100x8", "--efficiency=0"], "--efficiency must be in (0, 1]; got 0.0"),
        (["--chips=h100x8", "--efficiency=40"], "--efficiency must be in (0, 1]; got 40.0"),
        (["--topology=v5e:2x2", "--decode", "--decode_rows=0"], "must be at least 1"),
        (["--topology=v5e:2x2", "--decode_length=-3"], "must be at least 1"),
        (["--chips=h100x8", "--gin.config.Mesh.tensor=3"], "covers 6 devices, but there are 8"),
        (["--chips=h100x8", "--gin.config.Stack.layrs=3"], "layrs"),
        (["--chips=h100x8", "--gin_file=none.gin"], "No config file none.gin"),
        (["--chips=h100x8", PREFIX, TAUGHT, TEACHER], "knows of no teacher"),
        (["--chips=h100x8", "stray"], "unknown argument 'stray'"),
        (["--chips=h100x8", "--gin.BATCH_SIZE=12"], "cannot be split over 8"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_remedy(capsys, flags, words):
    with pytest.raises(SystemExit) as end:
        plan.main([FILE, *SMALL, *flags])
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_a_slice_or_chips_must_be_named(capsys):
    for flags in ([], ["--topology=v5e:2x2", "--chips=h100x8"]):
        with pytest.raises(SystemExit):
            plan.main([FILE, *flags])
        assert "--topology" in capsys.readouterr().err


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(preparing.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install '.*\[plan\]'"):
        preparing.prepare()


def test_arithmetic_needs_no_libtpu_and_says_what_it_is(tmp_path):
    path = tmp_path / "plan.json"
    code = (
        "import sys; sys.modules['libtpu'] = None; from t5x_lite import plan; "
        f"sys.exit(plan.main({[FILE, *SMALL, '--chips=h100x8', f'--json={path}', '--price=2']}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "by arithmetic alone, not compiled" in done.stdout and "FITS" in done.stdout
    record = json.loads(path.read_text())
    assert record["source"] == "arithmetic" and record["chips"] == 8
    best, assumed = record["estimate"], record["expected"]
    assert best["cost"] > 0 and assumed["efficiency"] == 0.4
    assert assumed["cost"] == pytest.approx(best["cost"] / 0.4)
    assert assumed["tokens_per_second"] == pytest.approx(0.4 * best["tokens_per_second"])
    # No rate without the words that say what it is.
    heads = re.search(r"as scheduled +at best +at 40 % of it", done.stdout)
    row = re.search(r"speed .*tokens a step +([\d,]+) +([\d,]+)", done.stdout)
    assert heads and row
    speeds = [int(cell.replace(",", "")) for cell in row.groups()]
    assert speeds == [round(each["tokens_per_second"]) for each in (best, assumed)]


def test_arithmetic_says_by_how_much_a_run_does_not_fit(capsys):
    flags = ["--gin_file=configs/models/t5_1_1_xxl.gin", "--gin.BATCH_SIZE=128"]
    assert plan.main([FILE, *flags, "--chips=h100x8"]) == 1
    output = capsys.readouterr().out
    assert "DOES NOT FIT" in output and "Mesh.fsdp" in output
    split = ["--gin.config.Mesh.fsdp=8", "--gin.config.Mesh.data=1"]
    assert plan.main([FILE, *flags, *split, "--chips=h200x8"]) == 0
    assert "FITS" in capsys.readouterr().out


def test_a_server_is_planned_with_its_price_and_drawn(tmp_path, capsys):
    path, plot = tmp_path / "server.json", tmp_path / "roof.png"
    server = [
        "--serve",
        "--chips=v5ex1",
        "--inputs=100",
        "--decode_length=20",
        "--cache_dtype=int8",
    ]
    assert plan.main([FILE, *SMALL, *server, f"--json={path}", f"--plot={plot}"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"FITS: [\d,]+ rows of 100 ids and 20 new tokens", output)
    words = " ".join(output.split())
    assert "1.20 for an hour of a chip, in dollars (cloud.google.com/tpu/pricing" in words
    record = json.loads(path.read_text())
    assert record["source"] == "arithmetic" and record["price"] == 1.2
    best = record["points"][-1]
    assert best["tokens_per_second"] == pytest.approx(20 * best["requests_per_second"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    again = [*server, f"--json={path}", "--price=2.4", "--decode_rows=7"]
    assert plan.main([FILE, *SMALL, *again]) == 0
    assert "dollars" not in capsys.readouterr().out
    dearer = json.loads(path.read_text())["points"]
    assert [point["rows"] for point in dearer] == [1, 4, 7]
    assert dearer[0]["whole_price"] == pytest.approx(2 * record["points"][0]["whole_price"])
    assert plan.main([FILE, *SMALL, "--serve", "--chips=v5ex1", f"--decode_rows={10**9}"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_phases_of_a_chip_are_on_one_roofline(tmp_path, capsys):
    path = tmp_path / "phases.json"
    flags = ["--phases", "--chips=h200x2", "--decode_rows=8", f"--json={path}"]
    assert plan.main([FILE, *SMALL, *flags]) == 0
    assert "FLOPs a byte (ridge 206)" in " ".join(capsys.readouterr().out.split())
    listed = json.loads(path.read_text())["phases"]
    assert [(each["name"], each["rows"]) for each in listed] == [
        ("encode", 1),
        ("decode", 1),
        ("decode", 4),
    ]
    assert listed[1]["bound"] == "memory" and listed[1]["intensity"] < listed[2]["intensity"]
