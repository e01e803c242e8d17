# SPDX-License-Identifier: Apache-2.0
"""Laws of the command: whole or absent, little memory, nothing written over, all reported."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import mark_exhaustive
from conversion_toys import (
    T5,
    Drawn,
    assert_restores,
    write_hugging_face,
    write_ours,
    write_safetensors,
)

from t5x_lite import config, convert
from t5x_lite.checkpoints import matching, unfinished, zarr_arrays
from t5x_lite.checkpoints.formats import safetensors_files
from t5x_lite.checkpoints.formats.huggingface import llama, t5
from t5x_lite.checkpoints.formats.t5x import read_gin_model
from t5x_lite.checkpoints.run_folder import SavedWeights
from t5x_lite.checkpoints.unfinished import OutputError
from t5x_lite.tokenizers import vocabularies

MODULE = [sys.executable, "-m", "t5x_lite.convert"]
QUIETLY = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def run(*arguments, **flags):
    return convert.main([*map(str, arguments), *(f"--{name}={v}" for name, v in flags.items())])


def refused(capsys, *arguments, **flags) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, **flags)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def drawn():
    return Drawn(T5)


@pytest.fixture
def ours(tmp_path, drawn):
    """A run folder with a vocabulary."""
    folder = write_ours(tmp_path / "ours", T5, drawn)
    symbols = vocabularies.SymbolVocabulary([chr(97 + i) for i in range(26)])
    vocabularies.save_pair(folder / "vocabulary", symbols, symbols)
    return folder


def test_a_run_goes_to_hugging_face_and_back(tmp_path, ours, drawn, capsys):
    run(f"--from={ours}", to=tmp_path / "hf", format="huggingface", shard_size="5KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) == 5
    run(f"--from={tmp_path / 'hf'}", to=tmp_path / "back")
    assert_restores(tmp_path / "back", drawn)
    pair = vocabularies.load_pair(tmp_path / "back" / "vocabulary")
    assert pair[1].encode("abc") == [3, 4, 5] and pair[1].eos == 1
    assert "float32, as they are" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["t5x", "t5x_scanned"])
def test_a_run_goes_to_t5x_and_back(tmp_path, ours, drawn, layout):
    run(f"--from={ours}", to=tmp_path / "checkpoint_5", format=layout)
    model, vocabulary = ours / "config.gin", ours
    run(f"--from={tmp_path}", to=tmp_path / "back", model=model, vocabulary=vocabulary)
    assert_restores(tmp_path / "back", drawn)
    assert SavedWeights(tmp_path / "back").run.model == T5


def test_a_preset_names_the_model_of_a_t5x_checkpoint():
    model = read_gin_model("models/t5_1_1_small.gin")
    assert (model.encoder.layers, model.encoder.embed, model.vocab) == (8, 512, 32128)


def test_dry_run_prints_the_table_and_writes_nothing(tmp_path, ours, capsys):
    run("--dry_run", f"--from={ours}", to=tmp_path / "hf", format="huggingface")
    output = capsys.readouterr().out
    assert "encoder.block.{layer}.layer.0.SelfAttention.q.weight" in output
    assert "[12, 8] x 2" in output and "transposed, heads head_dim joined" in output
    assert not (tmp_path / "hf").exists()


def test_dry_run_prints_what_does_not_match_on_either_side(tmp_path, drawn, capsys):
    folder = write_hugging_face(tmp_path / "hf", t5, T5, drawn)
    source = safetensors_files.open_safetensors(folder)
    renamed_tensors = {name: np.array(source.read(name)) for name in source.names}
    # A terminal would obey the end of this name.
    escape = "renamed\x1b[2J"
    renamed_tensors[escape] = renamed_tensors.pop("encoder.final_layer_norm.weight")
    write_safetensors(folder / "model.safetensors", renamed_tensors)
    flags = {"to": tmp_path / "out", "vocabulary": "none"}
    with pytest.raises(SystemExit) as stopped:
        run("--dry_run", f"--from={folder}", **flags)
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert "! encoder.final_layer_norm.weight: missing" in output.out
    assert r"! renamed\x1b[2J: no weight of ours" in output.out
    assert f"{folder}: 2 tensors do not fit, marked with !" in output.err
    message = refused(capsys, f"--from={folder}", **flags)
    assert r"renamed\x1b[2J" in message and "\x1b" not in output.out + message
    run(
        f"--from={folder}",
        f"--allow={escape.replace('[', '[[]')}",
        "--allow=encoder.final*",
        **flags,
    )
    assert SavedWeights(tmp_path / "out").read("encoder/norm").tolist() == [1.0] * 8


def test_what_is_there_is_never_written_over(tmp_path, ours, capsys):
    there = tmp_path / "there"
    there.mkdir()
    run(f"--from={ours}", to=there, dtype="bfloat16")
    before = {path: path.stat().st_mtime_ns for path in there.rglob("*")}
    assert "is there already" in refused(capsys, f"--from={ours}", to=there)
    assert before == {path: path.stat().st_mtime_ns for path in there.rglob("*")}
    assert SavedWeights(there).names["embedding"][1].name == "bfloat16"


@pytest.mark.slow
def test_a_converted_checkpoint_decodes_and_scores_in_every_dtype(tmp_path, ours):
    from t5x_lite import interactive

    scores = {}
    for dtype in ("float32", "bfloat16", "float16"):
        run(f"--from={ours}", to=tmp_path / dtype, dtype=dtype)
        session = interactive.load(tmp_path / dtype)
        scores[dtype] = session.score("abc", "cba")
        assert isinstance(session.generate("abc", max_new_tokens=4), str)
    assert abs(scores["float16"] - scores["float32"]) < 0.05 * abs(scores["float32"])
    assert abs(scores["bfloat16"] - scores["float32"]) < 0.3 * abs(scores["float32"])


def test_an_empty_folder_may_be_named_in_any_way(tmp_path, ours, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    run(f"--from={ours}", to=".")
    assert SavedWeights(tmp_path / "empty").step == 0
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(OutputError, match="is there already"):
        unfinished.check_output_folder(tmp_path / "link")


def test_a_folder_that_only_looks_unfinished_is_left_alone(tmp_path):
    mine = tmp_path / "out.unfinished"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    with (
        pytest.raises(OutputError, match="not from a conversion"),
        unfinished.unfinished_folder(tmp_path / "out"),
    ):
        pass
    assert (mine / "thesis.txt").exists()


def test_two_conversions_do_not_share_an_output(tmp_path):
    with unfinished.unfinished_folder(tmp_path / "out") as work:
        (work / "half").write_text("x")
        with (
            pytest.raises(OutputError, match="Another process"),
            unfinished.unfinished_folder(tmp_path / "out"),
        ):
            pass
        assert (work / "half").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["half"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), unfinished.unfinished_folder(tmp_path / "out") as work:
        (work / "half").write_text("x")
        raise KeyError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_what_is_being_written(tmp_path, number):
    """Else the folder that is removed comes back: its writers make it as they go on."""

    def ended(number, frame):
        return sys.exit(128 + number)

    before = signal.signal(number, ended)
    try:
        with (
            pytest.raises(SystemExit),
            unfinished.unfinished_folder(tmp_path / "out"),
            unfinished.delay_signals() as answer,
        ):
            answer()
            signal.raise_signal(number)
            passed = True
            answer()
            passed = False
        assert passed and signal.getsignal(number) is ended and not list(tmp_path.iterdir())
        with pytest.raises(SystemExit), unfinished.delay_signals():
            signal.raise_signal(number)
        with pytest.raises(SystemExit), unfinished.delay_signals():
            signal.raise_signal(number)
            signal.raise_signal(number)
            pytest.fail("the second signal was held back")
    finally:
        signal.signal(number, before)


def test_an_error_while_a_block_is_written_waits_for_it(tmp_path):
    shape = (4, 2**22)
    writer = zarr_arrays.ArrayWriter(tmp_path, "x", shape, np.dtype(np.float32))

    def fails(first_row, block):
        raise KeyError

    with pytest.raises(KeyError):
        writer.write(np.ones(shape, np.float32), None, fails)
    assert (tmp_path / "x" / "0.0").stat().st_size == zarr_arrays.CHUNK


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, ours, monkeypatch, capsys):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(100, 90, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "GB free" in refused(capsys, f"--from={ours}", to=tmp_path / "hf", format="huggingface")
    assert not list(tmp_path.glob("hf*"))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"from": "absent"}, "There is no absent"),
        ({"family": "gpt2", "format": "huggingface"}, "gpt2"),
        ({"family": "bert", "format": "huggingface"}, "bert"),
        ({"step": 3}, "no checkpoint"),
        ({"model": "x.gin"}, "--model is for T5X"),
        ({"vocabulary": "nowhere"}, "--vocabulary=nowhere is none of"),
        ({"shard_size": "many"}, "not a size such as 5GB"),
        ({"dtype": "int8"}, "int8"),
        ({"shards": 3}, "did you mean --shard_size"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, ours, capsys, flags, message):
    output = refused(capsys, **({"from": ours, "to": tmp_path / "out"} | flags))
    assert message in output and "Traceback" not in output
    assert not list(tmp_path.glob("out*"))


def test_a_vocabulary_larger_than_the_model_is_told(tmp_path, ours, capsys):
    flags = {"from": ours, "to": tmp_path / "out", "vocabulary": "bytes"}
    assert "259 ids, more than the 40" in refused(capsys, **flags)


def large(folder, layers: int, embed: int, mlp: int) -> tuple[config.Model, int]:
    """A Llama whose weights are zeros in holes of a file: it takes no disk; and its bytes.

    Args:
      folder: folder to write.
      layers: number of layers.
      embed: width.
      mlp: hidden units of the MLP.
    """
    stack = dict(layers=layers, embed=embed, heads=8, head_dim=embed // 8, mlp=mlp)
    rotary = dict(activation="silu", positions="rotary", query_scale=(embed // 8) ** -0.5)
    cfg = config.Model(vocab=1000, tied=True, decoder=config.Stack(**stack, **rotary))
    leaves = matching.model_leaves(cfg)
    from t5x_lite.checkpoints import safetensors_writer, transfer

    class Zeros:
        names = {path: (leaf.shape, np.dtype(np.float32)) for path, leaf in leaves.items()}

    Zeros.leaves = leaves
    tensors = transfer.group_by_tensor(Zeros, cfg, llama.entries(cfg))
    names = transfer.describe_tensors(Zeros, tensors, None)
    folder.mkdir()
    header = safetensors_writer.encode_header(names)
    total = sum(map(safetensors_writer.tensor_bytes, names.values()))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + total)
    import json

    (folder / "config.json").write_text(json.dumps(llama.config_json(cfg)))
    return cfg, total


@pytest.mark.slow
@pytest.mark.parametrize("way", ["--format=ours", "--format=huggingface"])
def test_killed_halfway_nothing_looks_whole_and_the_next_goes_through(tmp_path, way):
    origin, to = tmp_path / "origin", tmp_path / "out"
    large(origin, layers=8, embed=512, mlp=2048)
    command = [*MODULE, f"--from={origin}", f"--to={to}", "--vocabulary=none", way]
    process = subprocess.Popen(command, env=QUIETLY, stderr=subprocess.DEVNULL)
    work = to.with_name("out.unfinished")
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if sum(path.stat().st_size for path in work.rglob("*") if path.is_file()) > 10_000_000:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and work.exists() and not to.exists()
    done = subprocess.run(command, env=QUIETLY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert to.exists() and not work.exists() and not (to / unfinished.LOCK).exists()


@pytest.mark.slow
def test_terminated_halfway_it_cleans_up(tmp_path):
    origin, to = tmp_path / "origin", tmp_path / "out"
    large(origin, layers=24, embed=512, mlp=2048)  # enough time to be seen at work
    command = [*MODULE, f"--from={origin}", f"--to={to}", "--vocabulary=none"]
    process = subprocess.Popen(command, env=QUIETLY, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while process.poll() is None and not list(tmp_path.glob("out.unfinished/checkpoints/*")):
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["origin"]


MEASURED = """
import sys
from t5x_lite import convert
convert.main(sys.argv[1:])
# Not getrusage: what the parent held before this program began counts there.
print("PEAK", next(line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "first, second",
    mark_exhaustive(
        [
            (("origin", "ours", "ours"), ("ours", "exported", "huggingface")),
            (("origin", "exported", "huggingface"), ("exported", "ours", "ours")),
            (("origin", "ours", "ours"), ("ours", "copied", "ours")),
        ],
        kept=[(("origin", "ours", "ours"), ("ours", "exported", "huggingface"))],
    ),
)
def test_memory_is_that_of_a_layer_and_not_of_the_stack(tmp_path, first, second):
    """2 GB in stacks of 0.6 GB, in layers of 17 MB: the bound is the largest tensor and 1 GB."""
    origin = tmp_path / "origin"
    cfg, total = large(origin, layers=36, embed=1024, mlp=4096)
    assert total > 2e9
    largest = max(4 * np.prod(leaf.shape) for leaf in matching.model_leaves(cfg).values())
    layer = 4 * 1024 * 4096
    # No more than two folders of 2 GB stand at a time.
    for begin, to, format in (first, second):
        flags = [f"--from={tmp_path / begin}", f"--to={tmp_path / to}", f"--format={format}"]
        command = [sys.executable, "-c", MEASURED, *flags, "--vocabulary=none"]
        done = subprocess.run(command, env=QUIETLY, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        shutil.rmtree(tmp_path / begin)
        peak = 1024 * int(done.stdout.split("PEAK")[1])
        assert peak < layer + 1e9 < largest + 1e9, (format, peak)


def test_a_20b_model_is_planned_without_its_weights():
    """UL2's size: no tensor that is in memory at once is larger than its vocabulary's."""
    stack = dict(layers=32, embed=4096, heads=16, head_dim=256, mlp=16384, activation="silu")
    cfg = config.Model(vocab=32128, encoder=config.Stack(**stack), decoder=config.Stack(**stack))
    leaves = matching.model_leaves(cfg)
    assert 19e9 < matching.count_parameters(leaves) < 20.5e9
    pieces = matching.map_weights(cfg, t5.entries(cfg), leaves)
    assert max(int(np.prod(piece.tensor_shape)) for piece in pieces) == 32128 * 4096
    assert max(int(np.prod(leaf.shape)) for leaf in leaves.values()) == 32 * 4096 * 16384
