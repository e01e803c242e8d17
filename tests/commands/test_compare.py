# SPDX-License-Identifier: Apache-2.0
"""Laws of the comparison: matched costs match, and one command trains, measures and reports."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import FAMILIES, toy_model

from t5x_lite import compare, config, convert, decoding, model, sharding
from t5x_lite.comparison import claims, costs, plots, report, speed, twins
from t5x_lite.training import flops as step_costs

LENGTHS = costs.Lengths(20.0, 12.0)
# Deep enough that a layer less or more is less than a tenth of it.
PAIRS = {
    "t5": toy_model("encoder_decoder", layers=6, embed=64, mlp=128),
    "t5gemma": toy_model("encoder_decoder", **FAMILIES["t5gemma"], layers=6, embed=64, mlp=128),
}


@pytest.mark.slow
@pytest.mark.parametrize("matched", ["parameters", "training", "inference"])
@pytest.mark.parametrize("name", PAIRS)
def test_twins_cost_what_the_encoder_decoder_costs(name, matched):
    sharding.use_mesh(config.Mesh())
    pair = PAIRS[name]

    def cost(cfg):
        return costs.matched_cost(cfg, LENGTHS, matched)

    for kind, layouts in [
        ("causal_decoder", "decoder_only"),
        ("shallow_decoder", "encoder_decoder"),
    ]:
        twin_cfg = twins.match_cost(twins.SHAPES[kind](pair, 1), cost, cost(pair))
        assert twin_cfg.layout == layouts
        # A step of the MLP's width moves all layers at once: that much cannot be met.
        step = cost(twins.widen_mlp(twin_cfg, twins.MULTIPLE)) - cost(twin_cfg)
        assert abs(cost(twin_cfg) - cost(pair)) <= step / 2 + 1e-6
        assert abs(cost(twin_cfg) / cost(pair) - 1) < 0.05
    prefix = twins.SHAPES["prefix_decoder"](pair, 1)(3)
    assert prefix.prefix_lm
    assert dataclasses.replace(prefix, prefix_lm=False) == twins.SHAPES["causal_decoder"](pair, 1)(
        3
    )


def test_operations_to_learn_are_those_of_a_training_step():
    pair, lengths = PAIRS["t5"], {"inputs": 20, "targets": 12}
    assert costs.training_flops(pair, LENGTHS) == step_costs.step_flops(pair, 1, lengths)
    lone = twins.decoder_only_twin(pair, 3, False)
    assert costs.training_flops(lone, LENGTHS) == step_costs.step_flops(lone, 1, lengths)


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
def test_the_cache_takes_the_bytes_of_its_arrays(layout):
    sharding.use_mesh(config.Mesh())
    cfg = toy_model(layout, kv_heads=2)
    slots = 12 if layout == "encoder_decoder" else 32
    stored = jax.eval_shape(lambda: model.empty_cache(cfg, 8, slots, scan=False))
    if layout == "encoder_decoder":
        encoded = jax.ShapeDtypeStruct(
            (8, 20, 16), np.float32, sharding=sharding.named_sharding("batch length width")
        )

        def read(params, x):
            return model.Transformer(cfg).apply(
                {"params": params}, x, method=model.Transformer.cross_kv
            )

        stored = stored, jax.eval_shape(read, model.shapes(cfg), encoded)
    bytes_held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored))
    assert bytes_held == 8 * costs.cache_bytes(cfg, 20, 12, 4)


def test_padding_is_counted_as_by_hand():
    lengths = np.array([[4, 2], [8, 1], [1, 1], [2, 3], [9, 9]])
    shares = costs.padding_shares(lengths, (10, 10), 2)
    assert shares["to the longest allowed"] == 1 - 40 / 100
    # Pairs (4, 8) and (2, 1), then (1, 2) and (1, 3); the fifth has no partner.
    assert shares["to the longest of 2"] == 1 - 22 / (16 + 4 + 4 + 6)


@pytest.mark.slow
def test_speed_is_measured_for_every_case_and_twin():
    sharding.use_mesh(config.Mesh())
    pair = toy_model("encoder_decoder")
    lone = twins.decoder_only_twin(pair, 3, True)
    key = jax.random.key(0)

    def ready(cfg):
        return decoding.prepare_params(cfg, model.initialize(cfg, key))

    models = [speed.TwinModel(name, cfg, ready(cfg)) for name, cfg in (("a", pair), ("b", lone))]
    rows = speed.time_twins(models, speed.SpeedCase(8, 5, 4), 2)
    assert [row["twin"] for row in rows] == ["a", "b"]
    for row in rows:
        assert min(row["first_token_ms"], row["last_token_ms"]) > 0


def test_a_rate_lost_in_noise_is_no_number():
    case = speed.SpeedCase(8, 5, 5)
    assert speed.token_rates(case, np.array([2.0, 4.0, 8.0])) == (8.0, [32 / 6, 32 / 3])
    for gaps in ([0.0, 0.0, 0.0], [-1.0, 1.0, 5.0], [1e-9, 1e-9, 3.0], [-2.0, -1.0, 1.0]):
        assert speed.token_rates(case, np.array(gaps)) == (None, None)
    times = {"rows": 1, "inputs": 8, "outputs": 8, "first_token_ms": 1.0, "last_token_ms": 1.0}
    none = {"tokens_per_second": None, "tokens_per_second_quartiles": None}
    speeds = [times | none | {"twin": twin} for twin in ("encoder_decoder", "causal_decoder")]
    assert claims.throughput_claim(speeds).measured == "lost in noise at 1 x (8 in, 8 out)"
    assert report.speed_table({"speed": speeds})[1][-1] == "lost in noise"


COMPARED = """
include "runs/common.gin"
include "models/g2p.gin"
config.Run.compare = @config.Compare()
MODEL_DIR = "{folder}/out"
TRAIN_STEPS = 4
BATCH_SIZE = 8
MIXTURE_OR_TASK_NAME = @config.Files()
TASK_FEATURE_LENGTHS = {{"inputs": 32, "targets": 32}}
config.Files.name = "letters"
config.Files.train = "{folder}/letters.jsonl"
config.Files.validation = "{folder}/letters.jsonl"
config.Files.test = "{folder}/letters.jsonl"
config.Files.inputs = "inputs"
config.Files.vocabulary = @config.Vocabulary()
config.Vocabulary.kind = "bytes"
config.Data.cache_dir = "{folder}/cache"
config.Model.vocab = 384
config.Schedule.kind = "constant"
config.Schedule.peak = 0.001
config.Compare.twins = ("encoder_decoder", "causal_decoder")
config.Compare.seeds = 1
config.Compare.quantized = ("int4_activations",)
config.Compare.rows = (8,)
config.Compare.input_lengths = (8,)
config.Compare.output_lengths = (4,)
config.Compare.repeats = 2
config.Decode.max_new_tokens = 4
"""


def refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        compare.main(arguments)
    assert end.value.code == 2


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a small comparison."""
    folder = tmp_path_factory.mktemp("compared")
    lines = [json.dumps({"inputs": "ab" * (i % 5 + 1), "targets": "ba"}) for i in range(40)]
    (folder / "letters.jsonl").write_text("\n".join(lines))
    (folder / "compare.gin").write_text(COMPARED.format(folder=folder))
    assert compare.main([f"--gin_file={folder / 'compare.gin'}"]) == 0
    return folder


@pytest.mark.slow
def test_one_command_trains_measures_and_writes_a_page_that_stands_alone(compared, capsys):
    record = json.loads((compared / "out" / "report.json").read_text())
    assert record["metrics"] and "target_tokens" not in record["metrics"]
    for (measured,) in record["quality"].values():
        assert list(measured["quantized"]) == ["int4_activations"]
        few = measured["quantized"]["int4_activations"]
        assert 0 < abs(few["metrics"]["loss"] - measured["metrics"]["loss"]) < 1
    assert {each["twin"] for each in record["speed"]} == {"encoder_decoder", "causal_decoder"}
    assert all(record["curves"].values()) or not (compared / "out" / "learning.png").exists()
    page = (compared / "out" / "report.html").read_text()
    assert "nan" not in page.partition("data:image")[0]
    assert "data:image/png;base64," in page
    assert not any(link in page for link in ("http://", "https://", 'src="/', "<script"))
    # The second time nothing is trained or measured again.
    capsys.readouterr()
    before = (compared / "out" / "measured" / "speed.json").stat().st_mtime_ns
    assert compare.main([f"--gin_file={compared / 'compare.gin'}"]) == 0
    assert "measuring" not in capsys.readouterr().out
    assert (compared / "out" / "measured" / "speed.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_finished_runs_are_taken_as_they_are(compared, tmp_path, capsys):
    """Same numbers as where they were trained; their folders are only read."""
    first = compared / "out"

    def stored():
        return sorted(path for path in first.rglob("*") if path.is_file())

    there = stored()
    paths = {name: (f"{first}/{name}-0",) for name in ("encoder_decoder", "causal_decoder")}
    bound = f"--gin.config.Compare.trained={paths}"
    again = [f"--gin_file={compared / 'compare.gin'}", f"--gin.MODEL_DIR='{tmp_path}/again'", bound]
    # Of the model that is bound nothing is left but what the twins not taken would be matched to.
    assert compare.main([*again, "--gin.config.Stack.layers=3"]) == 0
    assert stored() == there
    records = [
        json.loads((folder / "report.json").read_text()) for folder in (first, tmp_path / "again")
    ]
    for name in paths:
        (one,), (other,) = (record["quality"][name] for record in records)
        assert one["metrics"] == other["metrics"] and one["quantized"] == other["quantized"]
    assert records[0]["curves"] == records[1]["curves"]
    assert [each["parameters"] for each in records[0]["twins"]] == [
        each["parameters"] for each in records[1]["twins"]
    ]
    assert "taken as they are" in (tmp_path / "again" / "report.html").read_text()
    capsys.readouterr()
    swapped = {"causal_decoder": paths["encoder_decoder"]}
    refused([*again, f"--gin.config.Compare.trained={swapped}"])
    assert "is not a causal decoder" in capsys.readouterr().err
    absent = {"causal_decoder": (f"{tmp_path}/absent",)}
    refused([*again, f"--gin.config.Compare.trained={absent}"])
    assert "absent" in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_of_another_make_is_taken_and_measures_the_same(compared, tmp_path):
    first, foreign = compared / "out", tmp_path / "huggingface"
    own_run = f"{first}/encoder_decoder-0"
    convert.main([f"--from={own_run}", f"--to={foreign}", "--format=huggingface"])
    paths = {"encoder_decoder": (str(foreign),), "causal_decoder": (f"{first}/causal_decoder-0",)}
    again = [f"--gin_file={compared / 'compare.gin'}", f"--gin.MODEL_DIR='{tmp_path}/again'"]
    assert compare.main([*again, f"--gin.config.Compare.trained={paths}"]) == 0
    (one,), (other,) = (
        json.loads((folder / "report.json").read_text())["quality"]["encoder_decoder"]
        for folder in (first, tmp_path / "again")
    )
    assert other["metrics"] == pytest.approx(one["metrics"], rel=1e-5)


@pytest.mark.slow
def test_checkpoints_that_cannot_be_set_beside_the_others_are_refused(compared, tmp_path, capsys):
    first = compared / "out"

    def bound(paths):
        return f"--gin.config.Compare.trained={paths}"

    there = [f"--gin_file={compared / 'compare.gin'}", f"--gin.MODEL_DIR='{tmp_path}/again'"]
    two = {"encoder_decoder": (f"{first}/encoder_decoder-0", f"{first}/causal_decoder-0")}
    refused([*there, "--gin.config.Compare.seeds=2", bound(two)])
    assert "are not of the same model" in capsys.readouterr().err
    # The data's vocabulary has an id that the twin was not trained with.
    one = {"encoder_decoder": (f"{first}/encoder_decoder-0",)}
    named = """--gin.config.Vocabulary.names=("[X]",)"""
    refused([*there, named, bound(one)])
    assert "has other ids than the data" in capsys.readouterr().err
    assert not (tmp_path / "again" / "encoder_decoder-0").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"trained": {"prefix_decoder": ("a",)}, "twins": config.Compare().twins[:2]},
            "not in twins",
        ),
        ({"trained": {"causal_decoder": ("a", "b")}}, "Compare.seeds is 3"),
        ({"twins": ("causal_decoder", "prefix_decoder")}, "needs encoder_decoder"),
        ({"twins": ("encoder_decoder",)}, "fewer than two"),
        ({"seeds": 0}, "Compare.seeds"),
        ({"output_lengths": (1,)}, "at least 2"),
        ({"rows": ()}, "Compare.rows"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        config.Compare(**changes)


def test_what_could_not_be_measured_is_refused_before_anything_is_trained(tmp_path, capsys):
    gin = tmp_path / "compare.gin"
    gin.write_text(COMPARED.format(folder=tmp_path))
    wrong = {"quantized=('int9',)": "int9", "drafters=('lokup',)": "did you mean lookup?"}
    for binding, words in (wrong | {"split=tset": "has no split 'tset'"}).items():
        refused([f"--gin_file={gin}", f"--gin.config.Compare.{binding}"])
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_measured_at_its_end_alone_is_no_curve(tmp_path):
    path = tmp_path / "learning.png"
    ends = {"encoder_decoder": [[[500, 2.0]]], "causal_decoder": [[]]}
    assert plots.draw_curves({"curves": ends}, path) is None and not path.exists()
    both = ends | {"causal_decoder": [[], [[0, 3.0], [500, 2.0]]]}
    assert plots.draw_curves({"curves": both}, path) == path and path.exists()


def test_a_config_that_compares_nothing_says_what_to_bind(capsys):
    refused(["--gin_file=configs/runs/quickstart.gin"])
    assert "config.Run.compare = @config.Compare()" in capsys.readouterr().err
