# SPDX-License-Identifier: Apache-2.0
"""Laws of sweeps and claims: fits recover what was planted, runs go on, verdicts keep a level."""

import dataclasses
import json
import subprocess

import jax
import numpy as np
import pytest
from conftest import toy_model

from t5x_lite import compare, config, data, train
from t5x_lite.checkpoints.opening import open_checkpoint
from t5x_lite.comparison import (
    claim_rows,
    measurements,
    quality,
    scaling,
    sweep,
    train_twins,
    twins,
)
from t5x_lite.comparison.example_losses import ExampleLosses, read_losses, write_losses
from t5x_lite.config.resized import resize_model
from t5x_lite.config.training_run import require_comparison
from t5x_lite.evaluation.evaluate import Evaluator

COSTS = [2e4, 6e4, 2e5, 8e5, 3e6]


def planted(draw, exponent, examples=200, seeds=5):
    """Losses by example of five sizes whose mean is 0.5 + 40 / N^exponent.

    Args:
      draw: random generator.
      exponent: of the law.
      examples: number of examples.
      seeds: number of seeds.
    """
    shared, tokens = draw.normal(0, 0.3, examples), np.full(examples, 5)

    def run(cost):
        noise = draw.normal(0, 0.05, examples) + draw.normal(0, 0.01)
        nats = 5 * (0.5 + 40 / cost**exponent + shared + noise)
        return ExampleLosses(nats, tokens, np.zeros(examples, int))

    return [[run(cost) for _ in range(seeds)] for cost in COSTS]


@pytest.mark.parametrize(
    "floor, factor, exponent", [(0.5, 40, 0.35), (0.2, 3, 0.1), (1.5, 500, 0.7), (0, 9, 0.25)]
)
def test_a_fit_recovers_the_planted_law(floor, factor, exponent):
    losses = floor + factor / np.array(COSTS) ** exponent
    law = scaling.fit_law(COSTS, np.array([losses, 2 * losses]))
    np.testing.assert_allclose(law.exponent, exponent, rtol=1e-3)
    np.testing.assert_allclose(law.floor, [floor, 2 * floor], atol=1e-3)
    for cost in (1e4, 1e5, 1e7):
        expected = floor + factor / cost**exponent
        np.testing.assert_allclose(law.losses_at(cost), [expected, 2 * expected], rtol=1e-3)


def test_losses_that_do_not_fall_have_no_negative_part():
    law = scaling.fit_law(COSTS, np.array([[2.0, 2.1, 2.2, 2.3, 2.4], [3.0] * 5]))
    assert np.all(law.floor >= 0) and np.all(law.factor >= 0)
    np.testing.assert_allclose(law.losses_at(1e5), [2.19, 3.0], rtol=0.01)


def test_intervals_of_the_exponent_cover_what_was_planted():
    draw, inside = np.random.default_rng(0), 0
    for _ in range(60):
        losses = scaling.resample_losses(planted(draw, 0.35), draw, 200)
        interval = scaling.bootstrap_interval(scaling.fit_law(COSTS, losses).exponent)
        inside += interval.low <= 0.35 <= interval.high
        assert interval.high - interval.low < 0.2
    # 57 expected, with a standard deviation of 1.7.
    assert inside >= 52


def test_a_size_keeps_the_shape_of_the_model():
    cfg = toy_model("encoder_decoder", embed=32, heads=4, kv_heads=2, head_dim=8, mlp=64)
    half = resize_model(cfg, 3, 16).decoder
    assert (half.layers, half.embed, half.heads, half.kv_heads, half.mlp) == (3, 16, 2, 1, 32)
    assert half.head_dim == cfg.decoder.head_dim
    with pytest.raises(ValueError, match=r"A model of width 12 would have 1.5 for Stack.heads"):
        resize_model(cfg, 1, 12)


def test_a_sweep_is_a_comparison_of_each_size_with_each_position(tmp_path):
    run = load(
        tmp_path,
        "config.Compare.depths=(1, 2)",
        "config.Compare.widths=(16, 32)",
        "config.Compare.positions=('none', 'alibi')",
    )
    variants = {each.name: each for each in sweep.list_variants(run)}
    assert list(variants) == ["1x16-none", "1x16-alibi", "2x32-none", "2x32-alibi"]
    last = variants["2x32-alibi"]
    assert last.run.model_dir == str(tmp_path / "out" / "2x32-alibi") and last.size == 1
    stacks = last.run.model.encoder, last.run.model.decoder
    assert {(each.layers, each.embed, each.positions) for each in stacks} == {(2, 32, "alibi")}
    # Each is a comparison that can be run alone.
    assert [sweep.list_variants(each.run)[0].run for each in variants.values()] == [
        each.run for each in variants.values()
    ]
    assert sweep.list_variants(load(tmp_path))[0].name == ""


SWEPT = """
include "runs/common.gin"
include "models/g2p.gin"
config.Run.compare = @config.Compare()
MODEL_DIR = "{folder}/out"
TRAIN_STEPS = 4
BATCH_SIZE = 8
MIXTURE_OR_TASK_NAME = "letter_successors"
TASK_FEATURE_LENGTHS = {{"inputs": 32, "targets": 32}}
config.Data.cache_dir = "{folder}/cache"
config.Stack.layers = 1
config.Stack.embed = 16
config.Stack.heads = 1
config.Stack.mlp = 32
config.Stack.positions = "rotary"
config.Schedule.kind = "constant"
config.Schedule.peak = 0.001
config.Train.tensorboard = False
config.Evaluate.examples = 0
config.Evaluate.batches = 1
config.Compare.twins = ("encoder_decoder", "causal_decoder@inference")
config.Compare.seeds = 1
config.Compare.examples = 1450
config.Compare.decoded = 0
config.Compare.repeats = 0
config.Compare.drafters = ()
config.Compare.quantized = ()
config.Compare.lengths = (11, 21)
"""


@pytest.fixture
def in_process(monkeypatch):
    """Training in this process, where programs are compiled already; a list of the runs."""
    trained = []

    def run(command, check):
        trained.append(command[3])
        return subprocess.CompletedProcess(command, train.main(command[3:]))

    monkeypatch.setattr(train_twins.subprocess, "run", run)
    return trained


def load(folder, *bindings):
    gin = folder / "sweep.gin"
    gin.write_text(SWEPT.format(folder=folder))
    return require_comparison(data.load_run([str(gin)], bindings))


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_its_runs_are_those_of_the_run_alone(
    tmp_path, in_process, monkeypatch
):
    load(tmp_path)
    sweep_it = [
        f"--gin_file={tmp_path / 'sweep.gin'}",
        "--gin.config.Compare.positions=('rotary',)",
    ]
    kept = train_twins.subprocess.run

    def killed(command, check):
        if len(in_process) == 1:
            return subprocess.CompletedProcess(command, -9)
        return kept(command, check)

    monkeypatch.setattr(train_twins.subprocess, "run", killed)
    with pytest.raises(SystemExit) as end:
        compare.main(sweep_it)
    assert end.value.code == 137
    first = tmp_path / "out" / "rotary" / "encoder_decoder-0" / "report.json"
    before = first.stat().st_mtime_ns
    assert not (tmp_path / "out" / "sweep.html").exists()
    monkeypatch.setattr(train_twins.subprocess, "run", kept)
    assert compare.main(sweep_it) == 0
    assert len(in_process) == 2 and first.stat().st_mtime_ns == before

    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    rows = content["By length of targets"][1:]
    assert len(rows) == 2 * 3
    assert {row[2] for row in rows} == {"1 to 11", "12 to 21", "over 21"}
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert "nan" not in page.partition("data:image")[0] and "No law is fitted" in page

    alone = f"--gin_file={tmp_path / 'out' / 'rotary' / 'encoder_decoder-0.gin'}"
    assert train.main([alone, f"--gin.config.Run.model_dir='{tmp_path}/alone'"]) == 0
    opened = open_checkpoint(str(tmp_path / "alone"))
    there = open_checkpoint(str(tmp_path / "out" / "rotary" / "encoder_decoder-0"))
    pair = [jax.tree.leaves(each.load().params) for each in (opened, there)]
    assert all(np.array_equal(a, b) for a, b in zip(*pair, strict=True))

    # The loss of all examples, each in a row of its own, is that of the split in packed rows.
    run = dataclasses.replace(load(tmp_path), model=opened.model)
    run = dataclasses.replace(run, evaluate=dataclasses.replace(run.evaluate, batches=10**6))
    losses = read_losses(tmp_path / "out" / "rotary" / "measured" / "encoder_decoder-0.npz")
    assert losses.tokens[:3].tolist() == [3, 4, 5]
    packed = Evaluator(run, "test").losses(opened.load().params)
    assert losses.loss() == pytest.approx(packed["loss"], rel=1e-5)


def test_losses_by_example_are_read_back_and_a_damaged_file_says_how_to_go_on(tmp_path):
    path = tmp_path / "measured" / "causal_decoder-1.npz"
    losses = ExampleLosses(np.array([1.5, 2.25]), np.array([3, 4]), np.array([0, 1]))
    write_losses(path, losses)
    for before, after in zip(losses, read_losses(path), strict=True):
        np.testing.assert_array_equal(before, after)
    whole = path.read_bytes()
    for content in (whole[:100], whole[: len(whole) // 2], b"", b"no zip"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="remove causal_decoder-1.json beside it"):
            read_losses(path)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"depths": (1, 2)}, "Compare.depths has 2 and Compare.widths 0"),
        ({"depths": (1, 1), "widths": (16, 16)}, "name a size twice"),
        ({"positions": ("none", "none")}, "Compare.positions names one twice"),
        ({"lengths": (20, 10)}, "Compare.lengths must rise"),
        ({"twins": ("encoder_decoder", "casual_decoder")}, "did you mean causal_decoder"),
        ({"twins": ("encoder_decoder", "causal_encoder@training")}, "is not one of"),
        ({"twins": ("encoder_decoder", "adapted")}, "bind Compare.pretraining"),
        (
            {"seeds": 1, "trained": {"causal_decoder": ("a",)}, "positions": ("none",)},
            "leave out depths, widths and positions",
        ),
    ],
)
def test_a_sweep_that_cannot_be_made_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        config.Compare(**changes)


PRETRAINING = """config.Compare.pretraining = @pretraining/config.Data()
pretraining/config.Data.task = "letter_successors"
pretraining/config.Data.lengths = {"inputs": 32, "targets": 32}
config.Compare.pretraining_steps = 8
"""


@pytest.mark.slow
def test_each_twin_is_what_its_name_says(tmp_path):
    names = (
        "encoder_decoder",
        "shallow_decoder@inference",
        "causal_decoder@training",
        "tuned_prefix_decoder",
        *("causal_encoder", "chunked_encoder", "merged_attention", "tied_embeddings"),
        *("averaged", "adapted", "scratch"),
    )
    (tmp_path / "sweep.gin").write_text(SWEPT.format(folder=tmp_path) + PRETRAINING)
    wide = [
        "config.Compare.chunk=4",
        "config.Stack.embed=32",
        "config.Stack.mlp=64",
        "config.Stack.layers=4",
    ]
    run = require_comparison(
        data.load_run(
            [str(tmp_path / "sweep.gin")],
            [*wide, f"config.Compare.twins={names}", "TRAIN_STEPS=100"],
        )
    )
    family = {twin.name: twin for twin in twins.make_family(run)}
    rows = {name: measurements.describe_twin(run, twin) for name, twin in family.items()}
    base = rows["encoder_decoder"]
    for name, axis in [
        ("shallow_decoder@inference", "inference"),
        ("causal_decoder@training", "training"),
    ]:
        assert abs(rows[name][f"{axis}_flops"] / base[f"{axis}_flops"] - 1) < 0.1
    assert rows["shallow_decoder@inference"]["decoder_layers"] == 1
    assert family["causal_encoder"].model.encoder.causal == (True,)
    assert family["chunked_encoder"].model.encoder.chunk == run.compare.chunk
    assert rows["chunked_encoder"]["inference_flops"] < base["inference_flops"]
    assert family["merged_attention"].model.decoder.merged and family["tied_embeddings"].model.tied
    assert rows["merged_attention"]["parameters"] < base["parameters"]

    ends = {name: twins.twin_run(run, twin, 1) for name, twin in family.items()}
    begins = {name: twins.pretraining_run(run, twin, 1) for name, twin in family.items()}
    assert len({end.model_dir for end in ends.values()}) == len(names)
    assert {end.seed for end in ends.values()} == {run.seed + 1}
    assert begins["scratch"] is None and ends["scratch"].checkpoint.initial is None
    prefix = begins["tuned_prefix_decoder"]
    assert not prefix.model.prefix_lm and ends["tuned_prefix_decoder"].model.prefix_lm
    assert ends["tuned_prefix_decoder"].checkpoint.initial == prefix.model_dir
    assert begins["adapted"].model.encoder is None and begins["adapted"].train.steps > 0
    assert ends["adapted"].adaptation.source == begins["adapted"].model_dir
    assert ends["averaged"].train.average.last == 5
    assert begins["encoder_decoder"].data == run.compare.pretraining


def estimates(draw, means, seeds=5):
    """Statistics of rows whose seeds are drawn with standard deviation 1.

    Args:
      draw: random generator.
      means: their means above what the claim needs, by row.
      seeds: number of seeds.
    """
    return {
        name: quality.combine_estimates(
            (draw.normal(mean, 1, seeds) + claim_rows.ROWS[name].least).tolist(), [[]] * seeds
        )
        for name, mean in means.items()
    }


def test_by_chance_at_most_one_page_of_twenty_has_a_verdict():
    draw, wrong = np.random.default_rng(1), 0
    for _ in range(400):
        decisions = claim_rows.decide_rows(estimates(draw, dict.fromkeys(claim_rows.ROWS, 0.0)), 5)
        wrong += any("cannot" not in each.verdict for each in decisions)
    # Binomial of 400 at 0.05 has a standard deviation of 1.1 %.
    assert wrong / 400 < 0.08


def test_a_verdict_says_what_its_interval_says():
    draw = np.random.default_rng(2)
    means = {"length": 20.0, "causal_encoder": -20.0, "first_token": 0.1, "averaging": 0.0}
    decisions = claim_rows.decide_rows(estimates(draw, means), 5)
    verdicts = {each.name: each.verdict for each in decisions}
    assert verdicts["length"] == "holds" and verdicts["causal_encoder"] == "does not hold"
    assert "cannot" in verdicts["first_token"] and "cannot" in verdicts["averaging"]
    for each in decisions:
        excluded = abs(each.estimate.value - claim_rows.ROWS[each.name].least) > each.half
        assert excluded == ("cannot" not in each.verdict)
    # Holm, 1979: the smallest of four p-values is tested at a quarter of the level.
    assert sorted(each.level for each in decisions) == pytest.approx(
        [0.0125, 0.05 / 3, 0.025, 0.05]
    )
    few = claim_rows.decide_rows(estimates(draw, means, 4), 4)
    assert {each.verdict for each in few} == {"cannot be told with 4 seed(s)"}
    alone = {"length": quality.MetricEstimate(1.0, float("nan"))}
    assert "cannot" in claim_rows.decide_rows(alone, 5)[0].verdict


def test_statistics_are_what_was_planted():
    lengths = np.repeat([5, 15, 25], 40)

    def losses(short, far):
        nats = np.select([lengths == 5, lengths == 15], [short, short], far) * lengths
        return [ExampleLosses(nats + 1e-9 * seed, lengths, np.zeros(120, int)) for seed in range(5)]

    seconds = {"encoder_decoder": [[1.0, 2.0]] * 5, "causal_decoder": [[2.0, 7.0]] * 5}
    record = {
        "lengths": (10, 20),
        "losses": {"encoder_decoder": losses(1.0, 1.5), "causal_decoder": losses(0.9, 4.0)}
        | {"merged_attention": losses(1.02, 1.53)},
        "speed": [
            {"twin": twin, "rows": 1, "inputs": 8, "outputs": 8, "seconds": turns}
            for twin, turns in seconds.items()
        ],
    }
    planted = {"length": 2.6, "merged_attention": 0.03, "first_token": 0.5, "throughput": 5.0}
    for name, value in planted.items():
        assert claim_rows.ROWS[name].statistic(record).value == pytest.approx(value), name


@pytest.mark.slow
def test_a_claim_is_decided_alone_and_again_from_what_is_kept(tmp_path, in_process, capsys):
    rows = 'config.Compare.claims = ("adapted", "inference_flops")\n'
    (tmp_path / "claims.gin").write_text(SWEPT.format(folder=tmp_path) + PRETRAINING + rows)
    alone = [f"--gin_file={tmp_path / 'claims.gin'}", "--rows=adapted", "--quick"]
    assert compare.main([*alone, "--gin.config.Compare.quick_steps=2"]) == 0
    # Three twins, of which two are pretrained.
    assert len(in_process) == 5
    folder = tmp_path / "out" / "quick"
    (row,) = json.loads((folder / "claims.json").read_text())["rows"]
    assert row["name"] == "adapted" and row["verdict"] == "cannot be told with 1 seed(s)"
    assert "adapted: +0%, +0%, +0%" in (folder / "claims.html").read_text()
    assert compare.main([*alone, "--gin.config.Compare.quick_steps=2"]) == 0
    assert len(in_process) == 5
    capsys.readouterr()
    for words in ("--rows=adopted", "--gin.config.Compare.claims=('adopted',)"):
        with pytest.raises(SystemExit) as end:
            compare.main([alone[0], words])
        assert end.value.code == 2 and "did you mean adapted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row, words", [("length", "needs Compare.lengths"), ("throughput", "needs Compare.repeats")]
)
def test_a_row_that_cannot_be_decided_is_refused(row, words):
    with pytest.raises(ValueError, match=words):
        claim_rows.check_rows(config.Compare(claims=(row,), repeats=0))
