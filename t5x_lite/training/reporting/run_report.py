# SPDX-License-Identifier: Apache-2.0
"""The report at the end of a run: held-out metrics, times and sizes."""

from typing import Any

import jax

REPORT = "report.json"


def collect_report(training: Any, total_seconds: float) -> dict[str, Any]:
    """Values of report.json; all but the times are a function of the config.

    Args:
      training: the `loop.Training` that has come to its end.
      total_seconds: seconds of this process.
    """
    held_out, state = training.held_out, training.state
    return {
        "steps": int(state.step),
        "split": held_out.split if held_out.evaluator else None,
        **held_out.values,
        "not_computed": held_out.failures,
        "train_loss": training.progress.newest.get("loss") if training.progress else None,
        "skipped_steps": int(state.skipped),
        **training.totals.report(),
        "compile_seconds": training.compile_seconds,
        "evaluate_seconds": held_out.seconds,
        **({"callback_seconds": dict(seconds)} if (seconds := training.callbacks.seconds) else {}),
        "total_seconds": total_seconds,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "device": f"{jax.device_count()} {jax.devices()[0].device_kind}",
    }
