# SPDX-License-Identifier: Apache-2.0
"""What a step costs in floating-point operations, and what chips can do."""

from t5x_lite import config

# Dense bfloat16 peak per chip, in FLOP/s, from the makers' data sheets; matched by the beginning of
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


def peak(device_kind: str) -> float | None:
    """FLOP/s that a chip can reach in bfloat16, or None where it is not known."""
    matches = [kind for kind in PEAKS if device_kind.startswith(kind)]
    return PEAKS[max(matches, key=len)] if matches else None


def row_lengths(layout: str, lengths: dict[str, int]) -> tuple[int, int]:
    """Places of a row for inputs and for targets."""
    inputs, targets = lengths.get("inputs", 0), lengths["targets"]
    if layout == "joined":
        return 0, inputs + targets
    return (targets, targets) if layout == "aligned" else (inputs, targets)


def step_flops(model: config.Model, rows: int, lengths: dict[str, int]) -> int:
    """Floating-point operations of one training step on `rows` rows, padding included.

    `FORMULA`: two operations per weight and token, two matrix products per attention, and three
    times the forward pass, since the backward pass is two of it. What is recomputed by remat is
    not counted, and causal attention is counted whole (PaLM, appendix B).
    """
    inputs, targets = row_lengths(model.layout, lengths)
    forward = 0
    if model.encoder:
        forward += self_attention_and_mlp(model.encoder, inputs)
    if model.decoder:
        forward += self_attention_and_mlp(model.decoder, targets)
    if model.layout == "pair":
        forward += cross_attention(model.decoder, targets, inputs)
    width = (model.decoder or model.encoder).embed
    forward += 2 * width * model.vocab * targets
    return 3 * rows * forward


def self_attention_and_mlp(stack: config.Stack, length: int) -> int:
    """Operations of a tower's forward pass over one row."""
    projections = stack.embed * stack.head_dim * 2 * (stack.heads + stack.key_heads)
    mlp = stack.embed * stack.mlp * (3 if stack.gated else 2)
    scores = 2 * stack.heads * stack.head_dim * length
    return 2 * stack.layers * length * (projections + mlp + scores)


def cross_attention(stack: config.Stack, targets: int, inputs: int) -> int:
    """Operations of a decoder's cross-attention over one row."""
    per_target = stack.embed * stack.head_dim * 2 * stack.heads
    per_input = stack.embed * stack.head_dim * 2 * stack.key_heads
    scores = 2 * stack.heads * stack.head_dim * targets * inputs
    return 2 * stack.layers * (targets * per_target + inputs * per_input + scores)
