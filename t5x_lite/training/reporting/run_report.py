# SPDX-License-Identifier: Apache-2.0
"""The report at the end of a run: held-out metrics, times and sizes."""

from typing import Any

import jax

REPORT = "report.json"


def collect_report(
    training: Any, metrics: dict[str, float], total_seconds: float
) -> dict[str, Any]:
    """Values of report.json; all but the times are a function of the config.

    Args:
      training: the `loop.Training` that has come to its end.
      metrics: held-out metrics of its last step.
      total_seconds: seconds of this process.
    """
    evaluator, state = training.evaluator, training.state
    return {
        "steps": int(state.step),
        "split": training.run.data.eval_split if evaluator else None,
        **metrics,
        "not_computed": evaluator.failures if evaluator else {},
        "train_loss": training.last_metrics.get("loss"),
        "skipped_steps": int(state.skipped),
        **training.totals.report(),
        "compile_seconds": training.compile_seconds,
        "evaluate_seconds": training.evaluate_seconds,
        "total_seconds": total_seconds,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "device": f"{jax.device_count()} {jax.devices()[0].device_kind}",
    }
