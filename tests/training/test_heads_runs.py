# SPDX-License-Identifier: Apache-2.0
"""Laws of a run with heads: trained, resumed, measured, decoded, converted to other formats."""

import dataclasses
import json

import numpy as np
import pytest
from conversion_toys import T5, Drawn, write_ours

from t5x_lite import config, convert, decoding, interactive, model, sharding
from t5x_lite.checkpoints import manager
from t5x_lite.checkpoints.opening import open_checkpoint
from t5x_lite.checkpoints.weight_paths import flatten_tree
from t5x_lite.decoding import protocol
from t5x_lite.decoding.drafters import blockwise
from t5x_lite.tokenizers import vocabularies
from t5x_lite.training import loop, setup

WORDS = ["abba", "cab", "d"]
CFG = dataclasses.replace(T5, dtype="float32")
HEADED = dataclasses.replace(CFG, draft_heads=config.DraftHeads(3, "medusa"))


def write_run_folder(folder, cfg, drawn):
    """A run folder with drawn weights of cfg and a vocabulary of letters."""
    ours = write_ours(folder, cfg, drawn)
    symbols = vocabularies.SymbolVocabulary([chr(97 + i) for i in range(26)])
    vocabularies.save_pair(ours / "vocabulary", symbols, symbols)
    return ours


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    return write_run_folder(tmp_path_factory.mktemp("trunk") / "ours", CFG, Drawn(CFG))


def run_of(folder, trunk, steps, **changes) -> config.Run:
    """A run in a folder that trains heads for some steps on a frozen trunk, on words backwards;
    changes are fields of config.Run."""
    data = folder.parent / "words.jsonl"
    draw = np.random.default_rng(0)
    words = ["".join(map(chr, draw.integers(97, 101, 5))) for _ in range(64)]
    data.write_text("".join(json.dumps({"a": word, "b": word[::-1]}) + "\n" for word in words))
    vocabulary = config.Vocabulary("checkpoint", path=str(trunk))
    files = dict(inputs="a", targets="b", validation=str(data), vocabulary=vocabulary)
    parts = (config.ParamGroup(("heads.*",)), config.ParamGroup(("*",), rate=0))
    fields = dict(
        model_dir=str(folder),
        model=HEADED,
        data=config.Data(
            task=config.Files("words", str(data), **files),
            lengths={"inputs": 8, "targets": 8},
            cache_dir=str(folder.parent / "cache"),
        ),
        train=config.Train(steps, 8, param_groups=parts, tensorboard=False, log_every=2),
        schedule=config.Schedule("constant", 0.01),
        optimizer=config.Optimizer("adamw"),
        checkpoint=config.Checkpoint(initial=str(trunk)),
        evaluate=config.Evaluate(examples=4, batches=1, batch_size=8),
        decode=config.Decode(max_new_tokens=6),
    )
    return config.Run(**fields | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, trunk):
    """A run folder with trained heads, stopped once on its way; and its report."""
    folder = tmp_path_factory.mktemp("heads") / "run"
    loop.train(run_of(folder, trunk, 4))
    longer = run_of(folder, trunk, 8)
    return folder, loop.train(longer)


@pytest.mark.slow
def test_heads_train_on_a_trunk_that_keeps_every_bit(trained, trunk):
    folder, report = trained
    before, _ = manager.load_params(trunk)
    after, step = manager.load_params(folder)
    heads = after.pop("heads")
    assert step == 8 and np.abs(heads["square"]).max() > 0
    flat = flatten_tree(after, "/")
    for path, weight in flatten_tree(before, "/").items():
        np.testing.assert_array_equal(flat[path], weight)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["train/heads_accuracy"] <= 100 for line in lines if "train/loss" in line)
    assert report["exact_match"] >= 0


@pytest.mark.slow
def test_a_run_that_was_never_stopped_has_the_same_heads(trained, trunk, tmp_path):
    folder, _ = trained
    loop.train(run_of(tmp_path / "run", trunk, 8))
    one, other = (manager.load_params(each)[0]["heads"] for each in (folder, tmp_path / "run"))
    np.testing.assert_array_equal(one["square"], other["square"])


@pytest.mark.slow
def test_heads_change_nothing_that_is_written(trained, trunk):
    plain = interactive.load(trunk).generate(WORDS, max_new_tokens=6)
    assert interactive.load(trained[0]).generate(WORDS, max_new_tokens=6) == plain
    restored = open_checkpoint(trained[0]).load()
    params = decoding.prepare_params(HEADED, restored.params)
    decode = config.Decode(max_new_tokens=6)
    ids = [[*map(int, row)] for row in restored.vocabularies[0].encode_all(WORDS)]
    request = decoding.make_request(
        HEADED, ids, decode, batch=8, eos=restored.vocabularies[1].stops
    )
    drafting = decoding.Drafting(blockwise.Blockwise(protocol.chain(3)))
    generated = decoding.generate(HEADED, params, request, decode, drafting)
    expected = decoding.generate(HEADED, params, request, decode)
    np.testing.assert_array_equal(generated.tokens, expected.tokens)


def test_other_formats_get_the_trunk_and_report_it(trained, trunk, tmp_path, capsys):
    for source, name in ((trunk, "plain"), (trained[0], "heads")):
        convert.main([f"--from={source}", f"--to={tmp_path / name}", "--format=huggingface"])
    assert "Left out: the draft heads" in capsys.readouterr().err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "heads")]
    assert weights[0] == weights[1]
    convert.main([f"--from={trained[0]}", f"--to={tmp_path / 'again'}"])
    ours, there = (manager.load_params(each)[0] for each in (trained[0], tmp_path / "again"))
    np.testing.assert_array_equal(ours["heads"]["square"], there["heads"]["square"])


def test_weights_of_another_make_get_new_heads(trunk, tmp_path):
    convert.main([f"--from={trunk}", f"--to={tmp_path / 'hf'}", "--format=huggingface"])
    sharding.use_mesh(config.Mesh(fsdp=2, tensor=1, data=4))
    params = setup.initial_weights(str(tmp_path / "hf"), HEADED, model.shapes(HEADED))
    assert params["heads"]["square"].shape == (2, 8, 8)
    assert params["heads"]["square"].sharding.spec[1] == "fsdp"


def test_heads_of_another_shape_are_refused_by_name(trained):
    other = dataclasses.replace(CFG, draft_heads=config.DraftHeads(4, "medusa"))
    sharding.use_mesh(config.Mesh())
    for cfg in (other, CFG):
        with pytest.raises(setup.CheckpointError, match="heads.square"):
            setup.initial_weights(str(trained[0]), cfg, model.shapes(cfg))
