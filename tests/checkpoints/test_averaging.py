# SPDX-License-Identifier: Apache-2.0
"""Laws of the mean of checkpoints: its bits, its rounding, its memory, its provenance."""

import json
import re
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from conversion_toys import GPT2, LLAMA, T5, UMT5, Drawn, write_ours

from t5x_lite import average, config
from t5x_lite.checkpoints import averaging, weights
from t5x_lite.checkpoints.averaging import AveragedPart, AveragedWeights
from t5x_lite.checkpoints.opening import open_checkpoint
from t5x_lite.tokenizers import vocabularies

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)


def letters(count: int = 26):
    return vocabularies.SymbolVocabulary([chr(97 + i) for i in range(count)])


def write_run(folder, cfg=T5, seed: int = 0, vocabulary=None):
    """Writes a run folder, and returns its weights.

    Args:
      folder: the run folder.
      cfg: architecture.
      seed: seed of the weights.
      vocabulary: of inputs and targets; letters if None.
    """
    drawn = Drawn(cfg, seed=seed)
    write_ours(folder, cfg, drawn)
    vocabulary = vocabulary or letters()
    vocabularies.save_pair(folder / "vocabulary", vocabulary, vocabulary)
    return drawn


def parts_of(sources, factors):
    named = zip(sources, factors, strict=True)
    return [AveragedPart(f"run{n}", 0, s, factor) for n, (s, factor) in enumerate(named)]


def read_all(source) -> dict:
    """Every layer of every weight by path and layer."""
    return {
        (path, layer): source.read(path, layer)
        for path, leaf in source.leaves.items()
        for layer in weights.layer_numbers(leaf)
    }


@pytest.mark.parametrize("cfg", [T5, UMT5, LLAMA, GPT2], ids=["t5", "umt5", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])
def test_the_mean_of_equal_checkpoints_has_their_bits(cfg, dtype):
    same = Drawn(cfg, dtype)
    mean = AveragedWeights(parts_of([same] * 3, (0.1, 0.7, 1 / 3)))
    assert mean.names == same.names
    for (path, layer), values in read_all(mean).items():
        assert weights.equal_bits(values, np.ascontiguousarray(same.read(path, layer)))


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])
def test_a_mean_is_the_float64_one_rounded_once(dtype):
    drawn = [Drawn(T5, dtype, seed=seed) for seed in range(5)]
    factors = np.random.default_rng(0).uniform(0.01, 3, 5)
    mean = AveragedWeights(parts_of(drawn, factors.tolist()))
    for (path, layer), values in read_all(mean).items():
        exact = sum(
            factor * each.read(path, layer).astype(np.float64)
            for factor, each in zip(factors, drawn, strict=True)
        )
        exact /= factors.sum()
        # Sums of another order differ by 1e-16: where they lie between two numbers, by a rounding.
        assert np.array_equal(values, exact.astype(dtype)) or np.all(
            np.abs(values.astype(np.float64) - exact)
            <= 0.5000001 * np.spacing(np.abs(values)).astype(np.float64)
        )


def test_the_mean_of_dtypes_is_in_the_widest_or_in_the_one_that_is_named():
    drawn = Drawn(T5, ml_dtypes.bfloat16), Drawn(T5, np.float32, seed=1)
    parts = parts_of(drawn, (1.0, 1.0))
    kinds = [{dtype for _, dtype in AveragedWeights(parts, d).names.values()} for d in (None, "f2")]
    assert kinds == [{np.dtype("float32")}, {"f2"}]
    assert AveragedWeights(parts, np.dtype("f2")).read("embedding").dtype == np.float16


class Lazy:
    """One weight of 4 MB that is made anew by each read."""

    leaves = {"embedding": weights.Leaf("vocab embed", (1 << 10, 1 << 10))}
    names = {"embedding": ((1 << 10, 1 << 10), np.dtype(np.float32))}

    def read(self, path, layer=None):
        return np.ones(self.leaves[path].shape, np.float32)


def test_memory_does_not_grow_with_the_number_of_checkpoints():
    size = 4 << 20
    peaks = []
    for count in (2, 9):
        mean = AveragedWeights(parts_of([Lazy() for _ in range(count)], [1.0] * count))
        tracemalloc.start()
        mean.read("embedding")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The sum in float64, one checkpoint, and blocks.
    assert max(peaks) < 5.5 * size and peaks[1] < 1.05 * peaks[0]


def test_values_that_are_not_finite_are_named():
    broken = Drawn(T5)
    broken.arrays["decoder/layers/mlp/gate"][2, 0, 0] = np.nan
    mean = AveragedWeights(parts_of([Drawn(T5), broken], (1.0, 1.0)))
    with pytest.raises(ValueError, match="run1: decoder/layers/mlp/gate has values that are NaN"):
        read_all(mean)


def test_other_shapes_are_named():
    with pytest.raises(ValueError, match="(?s)run1 .*run0 .*different shapes.*/key: check"):
        AveragedWeights(parts_of([Drawn(T5), Drawn(LLAMA)], (1.0, 1.0)))


def test_the_command_writes_a_checkpoint_with_its_provenance(tmp_path, capsys):
    drawn = [write_run(tmp_path / str(seed), seed=seed) for seed in range(3)]
    sources = [f"--from={tmp_path / str(seed)}" for seed in range(3)]
    words = [*sources, "--weights=1,2,5", f"--to={tmp_path / 'mean'}"]
    assert average.main([*words, "--dry_run"]) == 0
    assert "0.6250" in capsys.readouterr().out and not (tmp_path / "mean").exists()
    assert average.main(words) == 0
    opened = open_checkpoint(tmp_path / "mean")
    assert opened.text.vocabularies[0].decode([3]) == letters().decode([3])
    first, second, third = (each.arrays["embedding"].astype(float) for each in drawn)
    exact = (first + 2 * second + 5 * third) / 8
    np.testing.assert_array_equal(opened.weights().read("embedding"), exact.astype(np.float32))
    record = json.loads((tmp_path / "mean/average.json").read_text())
    assert record["kind"] == "weighted" and not record["averaged_copies"]
    assert [each["share"] for each in record["checkpoints"]] == [0.125, 0.25, 0.625]
    assert record["checkpoints"][2]["source"] == str(tmp_path / "2")
    assert "Its weights are a mean (weighted) of: 0, step 0" in (
        tmp_path / "mean/README.md"
    ).read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        average.main(words)
    assert "is there already" in capsys.readouterr().err
    # A mean is a checkpoint like any other, also for another mean.
    again = [f"--from={tmp_path / 'mean'}", f"--from={tmp_path / 'mean'}"]
    assert average.main([*again, f"--to={tmp_path / 'again'}"]) == 0
    np.testing.assert_array_equal(
        open_checkpoint(tmp_path / "again").weights().read("embedding"), exact.astype(np.float32)
    )


def test_the_factors_of_an_exponential_mean_fall_from_the_newest_on():
    args = average.parser().parse(["--from=a", "--from=b", "--from=c", "--decay=0.5", "--to=x"])
    assert average.choose_factors(args, 3) == ("exponential", [0.25, 0.5, 1.0])


def other_model(folder):
    decoder = config.Stack(**(vars(T5.decoder) | {"activation": "silu"}))
    write_run(folder, config.Model(**(vars(T5) | {"decoder": decoder})))


def reversed_letters(folder):
    write_run(folder, vocabulary=vocabularies.SymbolVocabulary(list("zyxwvutsrqponmlkjihgfedcba")))


@pytest.mark.parametrize(
    "write, words, message",
    [
        (other_model, (), "are of different models: decoder's Stack.activation = 'gelu', saved as"),
        (lambda to: write_run(to, LLAMA), (), "Model.encoder is there in one of them"),
        (lambda to: write_run(to, vocabulary=letters(25)), (), "there are 2"),
        (reversed_letters, (), "different vocabularies: id .* is 'a' there and 'z' here"),
        (write_run, ("--weights=1,2,3",), "--weights has 3 factors, but there are 2 checkpoints"),
        (write_run, ("--last=2",), "--last chooses among the checkpoints of one run"),
        (write_run, ("--copy",), "has no averaged copy of its weights"),
    ],
    ids=["field", "layout", "size", "letters", "factors", "last", "copy"],
)
def test_what_cannot_be_averaged_is_refused(tmp_path, capsys, write, words, message):
    write_run(tmp_path / "one")
    write(tmp_path / "other")
    sources = [f"--from={tmp_path / name}" for name in ("one", "other")]
    with pytest.raises(SystemExit) as end:
        average.main([*sources, *words, f"--to={tmp_path / 'mean'}"])
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "One checkpoint is its own mean"),
        (("--last=2",), r"--last=2: .* has 1 checkpoints \(steps 0\)"),
        (("--steps=0,7",), "has no checkpoint of step 7; it has .0."),
        (("--steps=3,3",), "names a step twice"),
        (("--steps=3,x",), "is not a list of steps"),
        (("--weights=1,-2",), "is not a list of positive numbers"),
        (("--decay=0",), "must be in"),
    ],
)
def test_one_run_says_what_it_lacks(tmp_path, capsys, words, message):
    write_run(tmp_path / "one")
    with pytest.raises(SystemExit) as end:
        average.main([f"--from={tmp_path / 'one'}", *words, f"--to={tmp_path / 'mean'}"])
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_damaged_checkpoint_leaves_nothing_behind(tmp_path, capsys):
    for name in ("one", "other"):
        write_run(tmp_path / name)
    array = tmp_path / "other/checkpoints/0/params/embedding"
    chunk = max(array.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    sources = [f"--from={tmp_path / name}" for name in ("one", "other")]
    with pytest.raises(SystemExit) as end:
        average.main([*sources, f"--to={tmp_path / 'mean'}"])
    assert end.value.code == 1 and "the bits of embedding are not" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]


def test_adapters_are_averaged_alone_and_only_over_one_base(monkeypatch):
    """`check_same_model` compares digests of the bases and the adapters' own config."""

    class Adapters(dict):
        __getattr__ = dict.__getitem__

    def opened(rank=2, digest=1):
        lora = config.Lora(rank=rank, alpha=4.0)
        run = config.Run("x", T5, lora=lora, checkpoint=config.Checkpoint(initial="base"))
        adapters = Adapters(digests={"embedding": digest}, arrays="arrays")
        return Adapters(model=T5, run=run, path="x", adapters=adapters)

    averaging.check_same_model(opened(), opened())
    assert averaging.select_weights(opened()) == "arrays"
    with pytest.raises(ValueError, match="different models: Run.lora = Lora.rank=2"):
        averaging.check_same_model(opened(), opened(rank=3))
    with pytest.raises(ValueError, match="adapters of another base: embedding"):
        averaging.check_same_model(opened(), opened(digest=2))
