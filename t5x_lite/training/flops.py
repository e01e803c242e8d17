# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a training step, and the peak of chips."""

from typing import TypeVar

from t5x_lite import config
from t5x_lite.config.training_run import TrainingRun

Number = TypeVar("Number", int, float)

# Dense bfloat16 peak per chip, in FLOP/s, from the vendors' data sheets; matched by the start of
# jax's device_kind, the longest match first.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
}

FORMULA = "3 x 2 x (weights x tokens + 2 x layers x heads x head_dim x queries x keys)"


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of a chip in bfloat16; None if it is not known."""
    matches = [kind for kind in PEAKS if device_kind.startswith(kind)]
    return PEAKS[max(matches, key=len)] if matches else None


def row_lengths(layout: str, lengths: dict[str, int]) -> tuple[int, int]:
    """Positions of a row for inputs and for targets."""
    inputs, targets = lengths.get("inputs", 0), lengths["targets"]
    if layout == "decoder_only":
        return 0, inputs + targets
    return (targets, targets) if layout == "encoder_only" else (inputs, targets)


def step_flops(model: config.Model, rows: int, lengths: dict[str, int]) -> int:
    """Floating-point operations of one training step, padding included.

    `FORMULA`: two operations per weight and token, two matrix products per attention, and three
    times the forward pass, since the backward pass is two of it. What is recomputed by remat is
    not counted, and causal attention is counted in full (PaLM, appendix B).

    Args:
      model: config of the model.
      rows: rows of a batch.
      lengths: Data.lengths, tokens by feature.
    """
    inputs, targets = row_lengths(model.batch_layout, lengths)
    outputs = model.vocab
    if model.readout is not None:
        # Every stack reads the inputs.
        outputs = 0 if model.readout.kind == "vector" else model.readout.size
        targets = inputs
    forward = 0
    encoder, decoder = model.encoder, model.decoder
    if encoder:
        forward += self_attention_and_mlp_flops(encoder, inputs)
    doubled = model.canvas is not None and model.canvas.doubles_rows(targets)
    read = 2 * targets if doubled else targets
    if decoder:
        forward += self_attention_and_mlp_flops(decoder, read)
    if encoder and decoder:
        forward += cross_attention_flops(decoder, read, inputs)
    forward += 2 * model.last_stack.embed * outputs * targets
    return 3 * rows * forward


def run_flops(run: TrainingRun) -> int:
    """`step_flops` of a run; two thirds of it with adapters, as frozen weights have no gradient."""
    whole = step_flops(run.model, step_rows(run), run.data.lengths)
    return whole if run.lora is None else 2 * whole // 3


def batch_rows(run: TrainingRun) -> int:
    """Rows of a step's batch: samples of rewards are one in a row."""
    return run.train.batch_size * (1 if run.grpo is None else run.grpo.samples)


def step_rows(run: TrainingRun) -> int:
    """Rows that a step trains on, each as often as it does; sampling and references not counted."""
    return batch_rows(run) * (1 if run.grpo is None else run.grpo.updates)


def run_formula(run: TrainingRun) -> str:
    """`FORMULA` of a run."""
    return FORMULA if run.lora is None else FORMULA.replace("3", "2", 1)


def self_attention_and_mlp_flops(stack: config.Stack, length: Number) -> Number:
    """Operations of a stack's forward pass over one row, without cross-attention."""
    projections = stack.embed * stack.head_dim * 2 * (stack.heads + stack.key_heads)
    mlp = stack.embed * stack.mlp * (3 if stack.gated else 2)
    keys = length if stack.chunk is None else min(length, stack.chunk)
    scores = 2 * stack.heads * stack.head_dim * keys
    return 2 * stack.layers * length * (projections + mlp + scores)


def cross_attention_flops(stack: config.Stack, targets: Number, inputs: Number) -> Number:
    """Operations of a decoder's cross-attention over one row.

    Args:
      stack: config of the decoder.
      targets: target positions.
      inputs: encoder positions.
    """
    per_target = stack.embed * stack.head_dim * 2 * stack.heads
    per_input = stack.embed * stack.head_dim * 2 * stack.key_heads
    scores = 2 * stack.heads * stack.head_dim * targets * inputs
    return 2 * stack.layers * (targets * per_target + inputs * per_input + scores)
