# SPDX-License-Identifier: Apache-2.0
"""Laws of runs with adapters: what trains, what is saved, what a base is, what is refused."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_batch
from conversion_toys import T5, Drawn, write_ours
from hub_toys import write_folders
from lora_parity import make_step, place, stacked
from test_fine_tuning import flags

from t5x_lite import config, convert, interactive, model, sharding, train
from t5x_lite.checkpoints import adapters as saved_adapters
from t5x_lite.checkpoints import checkpoint_io, manager, train_state
from t5x_lite.checkpoints.opening import open_checkpoint
from t5x_lite.checkpoints.train_state import tree_bytes
from t5x_lite.checkpoints.weight_paths import flatten_tree, nest_tree
from t5x_lite.checkpoints.weights import place_weights
from t5x_lite.model import adapters, quantization
from t5x_lite.model.layers import project
from t5x_lite.tokenizers import vocabularies
from t5x_lite.training import frozen_base

LONG = pytest.mark.exhaustive
LORA = config.Lora(rank=2, alpha=4.0, weights=("*.query", "*.out", "*.gate"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture
def place_of_run(tmp_path, monkeypatch):
    """A folder with data of letters, beside which the configs of the clone are found."""
    monkeypatch.chdir(Path(__file__).parents[2])
    rows = [{"inputs": word, "targets": word[::-1]} for word in ("abc", "bca", "cab", "aab") * 4]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def lora_flags(folder, source, *more: str, steps: int = 2) -> list[str]:
    fields = {"rank": 2, "alpha": 4, "dropout": 0.1}
    bound = [f"--gin.config.Lora.{name}={value}" for name, value in fields.items()]
    first, *rest = flags(folder, source, *bound, *more, steps=steps)
    return [first, "--gin_file=configs/adaptation/lora.gin", *rest]


def toy_run(lora: config.Lora = LORA, mesh: config.Mesh | None = None, **train) -> config.Run:
    return config.Run(
        model_dir="unused",
        model=dataclasses.replace(T5, dtype="float32"),
        lora=lora,
        checkpoint=config.Checkpoint(initial="unused"),
        data=config.Data(task="unused", lengths={"inputs": 12, "targets": 12}),
        train=config.Train(steps=200, batch_size=8, **train),
        schedule=config.Schedule("constant", 0.01),
        optimizer=config.Optimizer("adamw"),
        mesh=mesh or config.Mesh(),
    )


def toy_base(run: config.Run) -> frozen_base.FrozenBase:
    """Random weights as the run keeps them, on its mesh."""
    freeze = adapters.freezer(run.lora, run.model.dtype)
    drawn = Drawn(run.model)
    for array in drawn.arrays.values():
        array *= 0.3
    return frozen_base.FrozenBase(place_weights(drawn, run.model, keep=freeze), {})


def small_batch(seed: int = 0):
    batch = toy_batch("encoder_decoder", rows=8, seed=seed)
    small = {name: getattr(batch, name) % 40 for name in ("inputs", "targets")}
    return place(batch._replace(**small))


def take_steps(run: config.Run, count: int):
    """State and losses after steps on batches of seeds 0, 1 ..., and the base."""
    sharding.use_mesh(run.mesh)
    base = toy_base(run)
    update, stepper = make_step(run)
    state = train_state.begin_state(frozen_base.new_adapters(run, base), update)
    losses = []
    for seed in range(count):
        state, metrics = stepper(state, small_batch(seed), None, base.params)
        losses.append(metrics.sums.loss / metrics.sums.weights)
    return state, jax.device_get(losses), base


@pytest.mark.slow
def test_a_run_saves_adapters_alone_and_goes_on_bitwise(place_of_run, folders):
    assert train.main(lora_flags(place_of_run, folders / "hf", steps=4)) == 0
    metadata = checkpoint_io.read_metadata(place_of_run / "run/checkpoints/4")
    names = set(metadata.arrays["params"])
    assert {name.rpartition(".")[2] for name in names} == {"a", "b"} and len(names) == 2 * 18
    kept = [name for name in metadata.arrays["rest"] if re.search(r"\.(a|b)$", name)]
    assert len(kept) == 2 * len(names)  # both moments of AdamW, and none of frozen weights
    assert not any("embedding" in name for name in metadata.arrays["rest"])
    base = stacked(open_checkpoint(folders / "hf").weights())
    digests = saved_adapters.digest_weights(open_checkpoint(folders / "hf").weights())
    assert metadata.base == digests and digests.keys() == base.keys()
    # Stopped after two steps and gone on, in another folder.
    other = place_of_run / "other"
    again = [f"--gin.MODEL_DIR={other}"]
    assert train.main(lora_flags(place_of_run, folders / "hf", *again, steps=2)) == 0
    assert train.main(lora_flags(place_of_run, folders / "hf", *again, steps=4)) == 0
    once, twice = (manager.load_params(path)[0] for path in (place_of_run / "run", other))
    jax.tree.map(np.testing.assert_array_equal, once, twice)
    assert any(np.any(array) for name, array in flatten_tree(once).items() if name[-2:] == ".b")
    assert interactive.load(place_of_run / "run").generate("abc") is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    "quantize", ["int4:4", *(pytest.param(each, marks=LONG) for each in (None, "int8"))]
)
def test_a_hundred_steps_leave_every_bit_of_the_base(quantize):
    run = toy_run(dataclasses.replace(LORA, quantize=quantize, dora=True))
    state, losses, base = take_steps(run, 100)
    jax.tree.map(np.testing.assert_array_equal, base.params, toy_base(run).params)
    assert quantization.has_quantized(base.params) == (quantize is not None)
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    first = frozen_base.new_adapters(run, base)
    moved = jax.tree.map(lambda old, new: np.any(old != new), first, state.params)
    assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_the_optimizers_bytes_are_those_of_adapters():
    run = toy_run()
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    base, batch = toy_base(run), small_batch()
    update, stepper = make_step(run)
    state = train_state.begin_state(frozen_base.new_adapters(run, base), update)
    trained = tree_bytes(state.params)
    # Two moments of AdamW, and its and the groups' counts.
    assert 2 * trained <= tree_bytes(state.optimizer) < 2 * trained + 64
    compiled = stepper.lower(state, batch, None, base.params).compile()
    memory = compiled.memory_analysis()
    # Relative positions are read in the order of the inputs, not from input_positions.
    read = batch._replace(input_positions=None)
    assert memory.argument_size_in_bytes == tree_bytes((state, read, base.params))
    # What comes out is the state and the metrics: no frozen weight.
    assert memory.output_size_in_bytes < 3 * trained + 4096 < tree_bytes(base.params)


@pytest.mark.slow
@pytest.mark.parametrize("dora", [pytest.param(False, marks=LONG), True])
def test_new_adapters_change_nothing_and_a_frozen_base_in_bits_is_its_rounded_weights(dora):
    lora = dataclasses.replace(LORA, quantize="int4:4", dora=dora)
    run = toy_run(lora)
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    base, batch = toy_base(run), small_batch()
    fresh = frozen_base.new_adapters(run, base)
    rounded = quantization.dequantize_params(base.params)

    def loss(adapters_tree, params, lora):
        params = adapters.attach_adapters(params, adapters_tree, lora)
        logits = model.Transformer(run.model).apply({"params": params}, batch)
        return jnp.sum(jnp.square(logits)) / logits.size

    def alone(params):
        logits = model.Transformer(run.model).apply({"params": params}, batch)
        return jnp.sum(jnp.square(logits)) / logits.size

    np.testing.assert_allclose(loss(fresh, base.params, lora), alone(rounded), rtol=1e-6)
    keys = iter(jax.random.split(jax.random.key(3), 100))
    drawn = jax.tree.map(lambda x: 0.3 * jax.random.normal(next(keys), x.shape), fresh)
    plain = dataclasses.replace(lora, quantize=None)
    value, gradient = jax.value_and_grad(loss)(drawn, base.params, lora)
    expected, exact = jax.value_and_grad(loss)(drawn, rounded, plain)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (gradient, exact)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [pytest.param(None, marks=LONG), "int8"])
def test_every_mesh_gives_the_same_losses(quantize):
    lora = dataclasses.replace(LORA, dora=True, quantize=quantize)
    cfg = dataclasses.replace(
        T5,
        dtype="float32",
        encoder=dataclasses.replace(T5.encoder, heads=4),
        decoder=dataclasses.replace(T5.decoder, heads=4),
    )
    run = dataclasses.replace(toy_run(lora), model=cfg)
    _, expected, _ = take_steps(run, 3)
    cube = config.Mesh(data=2, fsdp=2, tensor=2)
    _, actual, _ = take_steps(dataclasses.replace(run, mesh=cube), 3)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_dropout_is_on_what_adapters_read_and_only_while_they_train():
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    x = jnp.arange(1.0, 25.0).reshape(2, 3, 4)
    lora = dataclasses.replace(LORA, dropout=0.5)
    base = {"w": jnp.zeros((1, 4, 5))}
    tree = {"w": {"a": jnp.ones((1, 4, 2)), "b": jnp.ones((1, 2, 5))}}

    def apply(key):
        attached = adapters.attach_adapters(base, tree, lora, key)["w"]
        one = jax.tree.map(lambda leaf: leaf[0], attached)
        return np.asarray(project(x, one, "embed -> mlp"))

    still = apply(None)
    np.testing.assert_allclose(still, np.repeat(4 * x.sum(-1, keepdims=True), 5, axis=-1))
    kept = np.stack([apply(jax.random.key(seed)) for seed in range(200)])
    # A mask per row, shared by its tokens: twice the sum of the features that are kept.
    assert {*np.unique((kept[:, 0] / 8).round(4) % 1)} == {0.0}
    np.testing.assert_allclose(kept.mean(0), still, rtol=0.2)
    assert len(np.unique(kept[:, 0, 0, 0])) > 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "dora, quantize", [pytest.param(False, None, marks=LONG), (True, "int4:4")]
)
def test_adapters_train_in_bfloat16_as_in_float32(dora, quantize):
    run = toy_run(dataclasses.replace(LORA, quantize=quantize, dora=dora))
    _, expected, _ = take_steps(run, 5)
    narrow = dataclasses.replace(run, model=dataclasses.replace(run.model, dtype="bfloat16"))
    state, losses, _ = take_steps(narrow, 5)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.params)} == {"float32"}
    np.testing.assert_allclose(losses, expected, rtol=0.02)


@pytest.mark.slow
def test_merged_weights_compute_what_the_adapters_did(place_of_run, folders):
    quantized = "--gin.config.Lora.quantize=int8"
    assert train.main(lora_flags(place_of_run, folders / "hf", quantized, steps=3)) == 0
    opened = open_checkpoint(place_of_run / "run")
    loaded = opened.load()
    run = dataclasses.replace(opened.run, model_dir=str(place_of_run / "run"))
    base = frozen_base.load_base(run)
    saved = nest_tree(jax.tree.map(jnp.asarray, flatten_tree(manager.load_params(opened.path)[0])))
    live = frozen_base.whole_params(run, saved, base)
    batch = small_batch()
    transformer = model.Transformer(run.model)
    logits = [transformer.apply({"params": params}, batch) for params in (loaded.params, live)]
    np.testing.assert_allclose(*map(np.asarray, logits), atol=2e-5 * np.abs(logits[0]).max())
    assert loaded.run.lora is None


@pytest.mark.slow
def test_adapters_of_another_base_are_refused(place_of_run, folders, capsys):
    assert train.main(lora_flags(place_of_run, folders / "hf", steps=2)) == 0
    other = write_ours(place_of_run / "other", T5, Drawn(T5, seed=5))
    shutil.copytree(folders / "ours" / "vocabulary", other / "vocabulary")
    capsys.readouterr()
    moved = [f"--gin.config.Checkpoint.initial={other}", "--gin.config.Model.dtype=float32"]
    with pytest.raises(SystemExit, match="2"):
        train.main(lora_flags(place_of_run, folders / "hf", *moved, steps=3))
    assert "adapters of another base" in capsys.readouterr().err
    (place_of_run / "run" / "base").symlink_to(other)
    with pytest.raises(ValueError, match="adapters of another base"):
        open_checkpoint(place_of_run / "run").load()


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--gin.config.Lora.rank=0", "Lora.rank must be at least 1; got 0"),
        ('--gin.config.Lora.weights=("*.querry",)', "names no matrix of a layer. Near: .*query"),
        ('--gin.config.Lora.weights=("embedding",)', "'embedding', which names no matrix"),
        ("--gin.config.Lora.weights=()", "Lora.weights is empty"),
        ("--gin.config.Lora.quantize=int5", "int5"),
        ("--gin.config.Lora.quantize=int8_activations", "rounds activations too"),
        ("--gin.config.Lora.quantize=int4:5", "groups of 5 do not divide"),
        ("--gin.config.Checkpoint.initial=None", "Run.lora adapts the weights of a checkpoint"),
    ],
)
def test_what_cannot_train_is_refused_at_the_door(flag, message, place_of_run, folders, capsys):
    words = lora_flags(place_of_run, folders / "hf", flag, "--dry_run")
    with pytest.raises(SystemExit, match="2"):
        train.main(words)
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


@pytest.mark.slow
def test_groups_of_adapters_have_rates_of_their_own():
    groups = (config.ParamGroup(("*.b",), rate=4.0), config.ParamGroup(("*.a",), rate=0))
    run = dataclasses.replace(toy_run(param_groups=groups), optimizer=config.Optimizer("sgd"))
    plain = dataclasses.replace(toy_run(), optimizer=config.Optimizer("sgd"))
    states = [flatten_tree(take_steps(each, 1)[0].params) for each in (run, plain)]
    first = flatten_tree(frozen_base.new_adapters(run, toy_base(run)))
    for name, start in first.items():
        moved, usual = (np.asarray(state[name]) - np.asarray(start) for state in states)
        np.testing.assert_allclose(moved, (4 if name.endswith(".b") else 0) * usual, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shares", [True, False], ids=["shared base", "separate base"])
def test_adapters_of_shared_weights_are_written_for_both_towers(place_of_run, shares):
    path, patterns = place_of_run, ("decoder.layers.mlp.*",)
    decoder = dataclasses.replace(T5.decoder, layers=2)
    apart = dataclasses.replace(T5, decoder=decoder)
    shared = dataclasses.replace(apart, shared_weights=patterns)
    cfg = shared if shares else apart
    base = write_ours(path / "base", cfg, Drawn(cfg))
    letters = vocabularies.SymbolVocabulary([chr(97 + i) for i in range(26)])
    vocabularies.save_pair(base / "vocabulary", letters, letters)
    bound = [f"--gin.config.Model.shared_weights={patterns}", "--gin.config.Schedule.peak=0.05"]
    bound.append('--gin.config.Lora.weights=("encoder.*.mlp.*",)')
    assert train.main(lora_flags(path, base, *bound, steps=1)) == 0

    def scores(source: Path) -> list[float]:
        session = interactive.load(source)
        return [session.score(*pair) for pair in (("abc", "cba"), ("bca", "aab"))]

    adapted = scores(path / "run")
    assert adapted != pytest.approx(scores(base), rel=1e-3)
    words = ["--format=huggingface", f"--from={path}/run", f"--to={path}/merged", "--merge"]
    assert convert.main(words) == 0
    assert scores(path / "merged") == pytest.approx(adapted, rel=1e-5)
    words = [f"--from={path}/run", f"--to={path}/peft", "--format=peft"]
    if not shares:
        with pytest.raises(SystemExit):
            convert.main(words)
        return
    assert convert.main(words) == 0
    words = [f"--from={base}", f"--to={path}/peft/base", "--format=huggingface"]
    assert convert.main(words) == 0
    assert scores(path / "peft") == pytest.approx(adapted, rel=1e-5)
