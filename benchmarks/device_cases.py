# SPDX-License-Identifier: Apache-2.0
"""Cases of device.py, the most telling first, and what roofline predicts of each.

  python benchmarks/device_cases.py [--json benchmarks/results/device_predicted.json]

A case is a process of its own: what crashes, hangs or fills the memory ends that case alone.
"""

import argparse
import functools
import math
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import report
from attention_systems import Case as Attention

# The lengths at which T5 was trained, and those of its long inputs.
SHORT, LONG = {"inputs": 512, "targets": 114}, {"inputs": 2048, "targets": 512}
# Measured on an H200: a copy, bytes read and written, and a product of 8192 x 8192 in bfloat16 of
# drawn numbers. Data sheet: 4.8e12 and 989e12.
COPY_BYTES, PRODUCT_FLOPS = 4.3e12, 788e12


class Case(NamedTuple):
    """A measurement of device.py.

    Attributes:
      stage: name of the stage.
      name: name within the stage.
      seconds: limit, starting and compiling included.
      settings: arguments of the function that measures it.
      tiny: those that --rehearse replaces; None leaves the case out there.
    """

    stage: str
    name: str
    seconds: float
    settings: dict[str, Any]
    tiny: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        return f"{self.stage}: {self.name}"

    def arguments(self, rehearse: bool) -> dict[str, Any]:
        return self.settings | (self.tiny or {}) if rehearse else self.settings


# Seconds of each stage in one run of ten minutes; what a stage leaves goes to the cases that others
# had no time for.
STAGES = {
    "machine": 40.0,
    "correctness": 130.0,
    "training": 150.0,
    "attention": 120.0,
    "decoding": 90.0,
    "twins": 120.0,
}


def training(
    model: str, lengths: dict, rows: int, system: str, seconds: float, tiny: bool = False
) -> Case:
    """Case of a training step.

    Args:
      model: file of configs/models.
      lengths: ids by feature.
      rows: of a batch.
      system: "auto", "pallas" (Model.attention) or "transformers".
      seconds: limit.
      tiny: has a rehearsal.
    """
    name = f"{model} {lengths['inputs']}/{lengths['targets']} x {rows}, {system}"
    settings = {"model": model, "lengths": lengths, "rows": rows, "system": system}
    small = {"model": "t5_1_1_small", "lengths": {"inputs": 16, "targets": 8}, "rows": 2}
    small["bindings"] = ("config.Stack.layers=1", "config.Stack.embed=32", "config.Model.vocab=256")
    return Case("training", name, seconds, settings, small if tiny else None)


def attention(name: str, seconds: float, tiny: bool = False, **settings: Any) -> Case:
    """Case of attention at several lengths.

    Args:
      name: of the case.
      seconds: limit.
      tiny: has a rehearsal.
      **settings: fields of attention_systems.Case; `lengths` or `caches` instead of the length.
    """
    lengths = "caches" if "caches" in settings else "lengths"
    small = {lengths: [64], "heads": 2, "head_dim": 64, "tokens": 64}
    return Case("attention", name, seconds, settings, small if tiny else None)


def decoding(model: str, batch: int, drafters: tuple[str, ...], tiny: bool = False) -> Case:
    """Case of decoding.

    Args:
      model: file of configs/models.
      batch: rows.
      drafters: names, with the tokens of a block.
      tiny: has a rehearsal.
    """
    settings = {"model": model, "rows": batch, "drafters": drafters, "inputs": 64, "tokens": 128}
    small = {"model": "t5_tiny", "rows": 2, "inputs": 8, "tokens": 8}
    small["bindings"] = ("config.Model.vocab=256",)
    return Case("decoding", f"{model} x {batch}", 45, settings, small if tiny else None)


PLAIN = ("plain:1", "lookup:8")
PACKED = dict(biased=True, causal=False, backward=True, texts=4)
CAUSAL = dict(biased=False, causal=True, backward=True)
TWINS = ("Stack.layers=8", "Stack.embed=512", "Stack.heads=8", "Stack.head_dim=64")
TWINS += ("Stack.mlp=1024",)
TINY_TWINS = {"steps": 2, "rows": 2}
TINY_TWINS["bindings"] = ("Stack.layers=1", "Stack.embed=16", "Stack.heads=2", "Stack.head_dim=8")
TINY_TWINS["bindings"] += ("Stack.mlp=16", "Compare.examples=2", "Decode.max_new_tokens=2")
TINY_TWINS["bindings"] += ('Data.lengths={"inputs": 32, "targets": 16}',)
CASES = (
    Case(
        "machine",
        "ceilings",
        40,
        {"elements": 2**29, "size": 8192},
        {"elements": 2**20, "size": 256},
    ),
    Case("correctness", "flash, bfloat16", 60, {"dtype": "bfloat16", "seeds": 3}, {"seeds": 1}),
    Case("correctness", "step of t5_tiny", 50, {"model": "t5_tiny"}, {"layers": 1}),
    training("t5_1_1_large", SHORT, 96, "auto", 100, tiny=True),
    training("t5_1_1_large", SHORT, 96, "pallas", 100),
    attention("T5 bias, packed", 90, tiny=True, lengths=[2048, 8192, 512, 16384], **PACKED),
    Case("correctness", "decode, bfloat16", 50, {"dtype": "bfloat16", "seeds": 2}, {"seeds": 1}),
    attention("cache", 60, tiny=True, caches=[4096, 32768], widths=[1, 8], biased=True),
    training("t5_1_1_xl", SHORT, 48, "auto", 120),
    decoding("t5_1_0_base", 1, PLAIN, tiny=True),
    decoding("gemma_2b", 8, PLAIN),
    Case("correctness", "greedy t5_tiny", 50, {"model": "t5_tiny"}, {"layers": 1}),
    Case("correctness", "flash, float32", 60, {"dtype": "float32", "seeds": 2}),
    Case("correctness", "step of t5gemma_tiny", 60, {"model": "t5gemma_tiny"}),
    Case("correctness", "step of smollm2_135m", 60, {"model": "smollm2_135m", "layers": 2}),
    Case("correctness", "greedy t5gemma_tiny", 50, {"model": "t5gemma_tiny"}),
    Case("correctness", "greedy smollm2_135m", 50, {"model": "smollm2_135m", "layers": 2}),
    training("t5_1_1_large", SHORT, 96, "transformers", 150, tiny=True),
    training("t5_1_1_large", LONG, 24, "auto", 100),
    training("t5_1_1_large", LONG, 24, "pallas", 100),
    training("tinyllama_1_1b", LONG, 24, "auto", 100),
    training("t5_1_1_base", SHORT, 256, "auto", 80),
    attention("no bias, causal", 80, lengths=[2048, 8192], **CAUSAL),
    attention("T5 bias, causal", 80, lengths=[2048, 8192], **CAUSAL | {"biased": True}),
    decoding("t5_1_0_base", 64, PLAIN),
    decoding("t5_1_0_base", 8, PLAIN),
    decoding("gemma_2b", 1, PLAIN),
    decoding("gemma_2b", 64, PLAIN),
    training("t5_1_1_xl", LONG, 12, "auto", 120),
    training("tinyllama_1_1b", LONG, 24, "transformers", 150),
    Case("twins", "30M parameters", 120, {"steps": 300, "rows": 64, "bindings": TWINS}, TINY_TWINS),
)


def run_of(
    model: str, lengths: dict, rows: int, system: str = "auto", bindings: Iterable[str] = ()
):
    """The run of a training case.

    Args:
      model: file of configs/models.
      lengths: ids by feature.
      rows: of a batch.
      system: Model.attention; that of transformers counts as "auto".
      bindings: of gin.
    """
    from t5x_lite.config import gin_file

    how = "auto" if system == "transformers" else system
    texts = ["MODEL_DIR=unused", "MIXTURE_OR_TASK_NAME=unused", "TRAIN_STEPS=1000"]
    texts += [f"BATCH_SIZE={rows}", f"TASK_FEATURE_LENGTHS={lengths}"]
    texts += ['config.Schedule.kind="constant"', "config.Schedule.peak=0.001"]
    texts += [f'config.Model.attention="{how}"', 'config.Model.dtype="bfloat16"', *bindings]
    return gin_file.load_run(["runs/common.gin", f"models/{model}.gin"], texts)


def attention_cases(settings: dict[str, Any]) -> list[Attention]:
    """Shapes of a case of attention, in the order of its lengths."""
    fields = {"heads": 12, "head_dim": 64, "tokens": 32768} | settings
    lengths = fields.pop("lengths", None)
    caches, widths = fields.pop("caches", ()), fields.pop("widths", (1,))
    tokens = fields.pop("tokens")
    if lengths is not None:
        return [Attention(length, max(1, tokens // length), **fields) for length in lengths]
    fields["rows"] = 16 if tokens > 64 else 2
    one = [Attention(length, width=width, **fields) for length in caches for width in widths]
    # As many layers as make 1 GiB: more than the chip's cache.
    return [
        replace(case, layers=max(1, min(16, 2**30 // case.cache_bytes))) if tokens > 64 else case
        for case in one
    ]


def attention_floor(case: Attention, dense: bool) -> float:
    """Seconds of the products over visible pairs, or of the bytes, whichever are more.

    Forward two products of a pair, backward five more (FlashAttention-2, Dao, 2023, section 3.1).

    Args:
      case: of whole rows.
      dense: the bias is an array of all pairs, read and its gradient written.
    """
    pairs = case.length**2 / (1 if dense else case.texts) / (2 if case.causal else 1)
    products = 7 if case.backward else 2
    flops = 2 * products * case.rows * case.heads * case.head_dim * pairs
    array = 2 * case.rows * case.length * case.heads * case.head_dim
    moved = array * (4 + 8 * case.backward)
    if dense and case.biased:
        moved += 2 * case.heads * case.length**2 * (1 + 2 * case.backward)
    return max(flops / PRODUCT_FLOPS, moved / COPY_BYTES)


def predict_attention(case: Case) -> list[report.Row]:
    """Rows of each shape: products of visible pairs; a cache at the speed of a copy."""
    rows = []
    for shape in attention_cases(case.settings):
        if shape.width:
            rows.append(report.Row(case.stage, shape.name, "GB/s", COPY_BYTES / 1e9))
            continue
        milliseconds = 1e3 * attention_floor(shape, dense=False)
        rows.append(report.Row(case.stage, shape.name, "milliseconds", milliseconds))
        if shape.biased:
            milliseconds = 1e3 * attention_floor(shape, dense=True)
            metric = "milliseconds, bias as an array"
            rows.append(report.Row(case.stage, shape.name, metric, milliseconds))
    return rows


def score_bytes(run) -> int:
    """Bytes of the arrays of all pairs that plain XLA makes of attention with a bias in a step.

    Float32, forward 4 times written or read (scores, maximum, sum, probabilities in bfloat16
    both ways), backward 8 times.

    Args:
      run: the run of a training case.
    """
    rows, (inputs, targets) = run.train.batch_size, run.data.lengths.values()
    encoder, decoder = run.model.encoder, run.model.decoder
    pairs = 0 if encoder is None else encoder.layers * encoder.heads * inputs**2
    if encoder is not None:
        pairs += decoder.layers * decoder.heads * targets**2
    return 12 * 4 * rows * pairs


def predict_training(case: Case) -> list[report.Row]:
    """Rows of the plan's arithmetic: sequences per second, MFU and memory of the step.

    The products at the measured rate; with plain XLA's attention the arrays of pairs beside them.
    """
    from t5x_lite.planning import arithmetic, chips

    if case.settings["system"] == "transformers":
        return []
    run, chip = run_of(**case.settings), chips.parse_chips("h200x1")
    step = arithmetic.figures(run, chip, arithmetic.step_shapes(run))
    assert step.flops is not None and step.moved is not None
    seconds = max(step.flops / PRODUCT_FLOPS, step.moved / COPY_BYTES)
    if case.settings["system"] == "auto":
        seconds += score_bytes(run) / COPY_BYTES
    values = {
        "sequences/s": run.train.batch_size / seconds,
        "MFU": step.model_flops / seconds / chip.chip.peak,
        "peak GB": step.memory.peak / 1e9,
    }
    return [report.Row(case.stage, case.name, metric, value) for metric, value in values.items()]


def predict_decoding(case: Case) -> list[report.Row]:
    """Rows of the bytes that a token reads: the decoder's weights and the caches."""
    import jax

    from t5x_lite import config, sharding
    from t5x_lite.planning import steps

    settings = case.settings
    lengths = {"inputs": settings["inputs"], "targets": settings["tokens"]}
    run = run_of(settings["model"], lengths, settings["rows"])
    sharding.use_mesh(config.Mesh(), jax.devices("cpu")[:1])
    step = steps.decode(
        run, jax.devices("cpu")[:1], steps.Decoding(settings["rows"], settings["tokens"])
    )
    # An encoder's weights are read once for a text, not for a token.
    encoder = run.model.encoder
    share = 1.0 if encoder is None else decoder_share(run.model)
    moved = step.kinds["parameters"] * share + step.kinds["cache"]
    speed = settings["rows"] * COPY_BYTES / moved
    return [report.Row(case.stage, case.name, "tokens/s, plain:1", speed)]


def decoder_share(cfg) -> float:
    """The decoder's part of a model's weights."""
    from t5x_lite import model
    from t5x_lite.checkpoints.weight_paths import flatten_tree

    sizes = {name: math.prod(leaf.shape) for name, leaf in flatten_tree(model.shapes(cfg)).items()}
    encoder = sum(size for name, size in sizes.items() if name.startswith("encoder"))
    return 1 - encoder / sum(sizes.values())


PREDICTED = {
    "attention": predict_attention,
    "training": predict_training,
    "decoding": predict_decoding,
}


@functools.cache
def predictions() -> list[report.Row]:
    """Rows of all cases that roofline has a word on."""
    rows = []
    for case in CASES:
        predict = PREDICTED.get(case.stage)
        rows += predict(case) if predict else []
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    print(report.table(predictions()))
    if options.json:
        report.write(options.json, predictions(), ["jax", "jaxlib"])


if __name__ == "__main__":
    main()
