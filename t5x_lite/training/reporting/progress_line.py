# SPDX-License-Identifier: Apache-2.0
"""Line of metrics that a run shows beside its progress."""

from t5x_lite.cli.progress import format_count, format_duration


def format_metrics(values: dict[str, float], left: float | None) -> str:
    """One line of metrics; `left` is the estimate of seconds to go, None if there is none."""
    parts = [] if left is None else [f"ETA {format_duration(left)}"]
    parts += [
        f"loss {values['loss']:.4f}",
        f"{format_count(values['target_tokens_per_second'])} target tok/s",
        f"{format_count(values['tokens_per_second'])} tok/s",
        f"padding {values['padding']:.0%}",
        f"waiting {values['waiting']:.0%}",
    ]
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    if values["skipped"]:
        parts.append(f"skipped {values['skipped']}")
    return "  ".join(parts)
