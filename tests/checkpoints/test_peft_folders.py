# SPDX-License-Identifier: Apache-2.0
"""Laws of adapters in files: folders of peft there and back, merged weights, what is refused."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from adapter_toys import draw_adapters
from conversion_toys import GPT2, T5, Drawn, write_ours
from hub_toys import write_folders
from lora_parity import draw_pair
from safetensors.numpy import load_file

from t5x_lite import config, convert, infer, interactive
from t5x_lite.checkpoints import adapters as saved_adapters
from t5x_lite.checkpoints.formats.huggingface import gpt2, peft
from t5x_lite.checkpoints.opening import WEIGHTS_ONLY, open_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("folders"))


PEFT_REFUSED = {
    "bias": ("all", "bias = 'all' is not implemented"),
    "modules_to_save": (["lm_head"], "modules_to_save"),
    "layers_to_transform": ([0], "layers_to_transform"),
    "rank_pattern": ({"q": 4}, "rank_pattern"),
    "use_qalora": (True, "use_qalora"),
    "trainable_token_indices": ([1], "trainable_token_indices"),
    "init_lora_weights": ("pissa", "changes the weights of the base"),
    "peft_type": ("IA3", "IA3 is not implemented"),
    "r": (0, "Lora.rank must be at least 1; got 0"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return draw_pair("llama", "lora", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("field", PEFT_REFUSED)
def test_what_is_not_implemented_of_peft_is_named(field, llama, tmp_path):
    value, message = PEFT_REFUSED[field]
    folder = shutil.copytree(llama.folder, tmp_path / "copy")
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(content | {field: value}))
    with pytest.raises(ValueError, match=re.escape(message)):
        open_checkpoint(folder, options=WEIGHTS_ONLY)


@pytest.mark.slow
@pytest.mark.parametrize("toy, kind", [("llama", "lora"), ("t5", "dora"), ("t5gemma", "rslora")])
def test_a_folder_of_peft_there_and_back_has_the_same_bits_and_merges_as_peft_does(
    toy, kind, tmp_path
):
    drawn = draw_pair(toy, kind, tmp_path)
    words = ["--vocabulary=none"]
    assert convert.main([f"--from={drawn.folder}", f"--to={tmp_path / 'ours'}", *words]) == 0
    back = [f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'back'}", "--format=peft", *words]
    assert convert.main(back) == 0
    there, again = (
        load_file(path / "adapter_model.safetensors") for path in (drawn.folder, tmp_path / "back")
    )
    assert there.keys() == again.keys()
    for name, values in there.items():
        np.testing.assert_array_equal(again[name], values, err_msg=name)
    fields = [
        json.loads((path / "adapter_config.json").read_text())
        for path in (drawn.folder, tmp_path / "back")
    ]
    for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "peft_type", "bias"):
        assert fields[0][name] == fields[1][name], name
    assert sorted(fields[0]["target_modules"]) == fields[1]["target_modules"]
    merge = [f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'hf'}", "--merge", *words]
    assert convert.main([*merge, "--format=huggingface"]) == 0
    theirs = drawn.pair.theirs.merge_and_unload().state_dict()
    merged = load_file(tmp_path / "hf" / "model.safetensors")
    for name, values in merged.items():
        np.testing.assert_allclose(values, theirs[name].numpy(), atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def adapters_of(folders):
    """Two folders of peft over one base, by name."""
    return {name: draw_adapters(folders, T5, seed) for seed, name in enumerate(("one", "two"))}


@pytest.mark.slow
def test_sessions_with_adapters_share_a_base_and_score_as_merged_ones(folders, adapters_of):
    base = interactive.load(folders / "hf")
    alone = base.score("abc", "cba")
    sessions = {name: base.with_adapters(path) for name, path in adapters_of.items()}
    for name, session in sessions.items():
        merged = interactive.load(adapters_of[name]).score("abc", "cba")
        np.testing.assert_allclose(session.score("abc", "cba"), merged, rtol=1e-4)
        assert abs(merged - alone) > 1e-3
        shared = base.predictor.params["embedding"]
        assert session.predictor.params["embedding"] is shared
    assert base.score("abc", "cba") == alone
    with pytest.raises(ValueError, match="does not train"):
        sessions["one"].train_step("abc", "cba")
    with pytest.raises(ValueError, match="has no adapters"):
        base.with_adapters(folders / "hf")


@pytest.mark.slow
def test_lines_of_an_input_name_their_adapters(folders, adapters_of, tmp_path, capsys):
    names = [None, "two", "one", "three", "two", 7]
    rows = [{"input": "abc", "out": "cba"} | ({"adapter": name} if name else {}) for name in names]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = [f"--adapter={name}={path}" for name, path in adapters_of.items()]
    words = [f"--checkpoint={folders / 'hf'}", f"--input={tmp_path / 'in.jsonl'}", *named]
    infer.main([*words, f"--output={tmp_path / 'out.jsonl'}", "--targets=out"])
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    base = interactive.load(folders / "hf")
    sessions = {None: base} | {name: base.with_adapters(path) for name, path in adapters_of.items()}
    for row, line in zip(rows, lines, strict=True):
        name = row.get("adapter")
        if name in sessions:
            score = sessions[name].score("abc", "cba")
            assert line == row | {"log_probability": pytest.approx(score, abs=2e-4)}
        else:
            assert line["error"] == f"adapter {name!r} is none of --adapter: one, two"
    assert len({line.get("log_probability") for line in lines}) == 4
    # Other adapters would write other lines after these.
    capsys.readouterr()
    words[-1] = f"--adapter=two={adapters_of['one']}"
    with pytest.raises(SystemExit, match="2"):
        infer.main([*words, f"--output={tmp_path / 'out.jsonl'}", "--targets=out"])
    assert "was written with adapters" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--input=a.jsonl", "--adapter=one"], "'one' is not written as NAME=PATH"),
        (["--input=a.txt", "--adapter=one=runs/a"], "--adapter is named by lines of JSONL"),
        (["--input=a.jsonl", "--adapter=one=runs/a", "--verify"], "leave out --adapter"),
    ],
)
def test_adapters_that_no_line_could_name_are_refused(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        infer.main(["--checkpoint=runs/never", *words])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--merge"], "--merge is for a checkpoint of adapters"),
        (["--format=peft"], "--format=peft is for a checkpoint of adapters"),
    ],
)
def test_a_whole_model_has_no_adapters_to_convert(flags, message, folders, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        convert.main([f"--from={folders / 'hf'}", f"--to={tmp_path / 'out'}", *flags])
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_adapters_are_not_written_as_a_whole_model(adapters_of, tmp_path, capsys):
    words = [f"--from={adapters_of['one']}", f"--to={tmp_path / 'out'}"]
    with pytest.raises(SystemExit, match="2"):
        convert.main([*words, "--format=huggingface"])
    assert "add --merge for the whole model" in capsys.readouterr().err


def test_an_adapter_of_another_model_names_the_tensors(adapters_of, folders, tmp_path):
    folder = shutil.copytree(adapters_of["one"], tmp_path / "copy")
    stacks = {
        name: dataclasses.replace(getattr(T5, name), mlp=24) for name in ("encoder", "decoder")
    }
    wider = dataclasses.replace(T5, **stacks)
    write_ours(tmp_path / "wider", wider, Drawn(wider))
    (folder / "base").symlink_to(tmp_path / "wider")
    with pytest.raises(ValueError, match=r"(?s)not adapters of .*decoder.*wi_0.lora_B.weight"):
        open_checkpoint(folder, options=WEIGHTS_ONLY)


def copy_adapter(adapters_of, folder, base):
    """Copies a folder of peft, and names another base in it.

    Args:
      adapters_of: folders by name.
      folder: the copy.
      base: the base that it names.
    """
    shutil.copytree(adapters_of["one"], folder)
    content = json.loads((folder / "adapter_config.json").read_text())
    content["base_model_name_or_path"] = base
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("way", ["itself", "two", "link", "run"])
def test_adapters_whose_base_leads_back_to_them_are_refused(way, adapters_of, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    copy_adapter(adapters_of, one, str(two if way == "two" else one))
    if way == "two":
        copy_adapter(adapters_of, two, str(one))
    if way == "link":
        (one / "base").symlink_to(".")
    if way == "run":
        words = [f"--from={adapters_of['one']}", f"--to={two}", "--vocabulary=none"]
        assert convert.main(words) == 0
        (two / "base").symlink_to("../two")
        one = two
    with pytest.raises(ValueError, match="has adapters whose base leads back to them"):
        open_checkpoint(one, options=WEIGHTS_ONLY)
    assert open_checkpoint(adapters_of["one"], options=WEIGHTS_ONLY).adapters is not None


def test_adapters_of_adapters_are_read(adapters_of, tmp_path):
    folder = copy_adapter(adapters_of, tmp_path / "two", str(adapters_of["two"]))
    assert open_checkpoint(folder, options=WEIGHTS_ONLY).adapters.base.adapters is not None


@pytest.mark.parametrize("base", [5, 1.5, True, ["a"], {"a": 1}])
@pytest.mark.parametrize("field", ["base_model_name_or_path", "revision"])
def test_a_base_that_is_no_text_is_refused(field, base, adapters_of, tmp_path):
    folder = copy_adapter(adapters_of, tmp_path / "one", "base")
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(content | {field: base}))
    with pytest.raises(ValueError, match="adapter_config.json names a base by"):
        open_checkpoint(folder, options=WEIGHTS_ONLY)


def test_a_weight_that_is_part_of_a_larger_one_is_named():
    axes = saved_adapters.model_axes(GPT2)
    lora = config.Lora(rank=2, alpha=2.0, weights=("*.query",))
    with pytest.raises(ValueError, match="c_attn.weight holds several weights side by side"):
        peft.adapter_entries(gpt2.entries(GPT2), lora, axes)
