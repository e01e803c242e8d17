# SPDX-License-Identifier: Apache-2.0
"""Learning rate schedules.

A shape is a factor of Schedule.peak after the warm-up, as a function of the step.
"""

import jax.numpy as jnp
import optax

from t5x_lite import config
from t5x_lite.config.training_run import TrainingRun


def learning_rate(cfg: config.Schedule, steps: int) -> optax.Schedule:
    """Learning rate at steps 0..steps - 1, as a function that can be traced."""
    shape = SHAPES[cfg.kind]

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        # Rises through 1/warmup, 2/warmup ...: a rate of 0 would waste the first step.
        rise = jnp.minimum(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
        return cfg.peak * rise * shape(cfg, steps, step)

    return rate


def list_warnings(run: TrainingRun) -> list[str]:
    """Sentences about a warm-up that the run does not outlast; such a rate never has its peak."""
    cfg, steps, warnings = run.schedule, run.train.steps, []
    if cfg.warmup >= steps:
        warnings.append(
            f"Schedule.warmup = {cfg.warmup} takes all of the {steps} steps (Train.steps): the "
            "learning rate rises to the end and never falls"
        )
    elif cfg.kind == "wsd" and steps - 1 - max(1.0, cfg.decay * steps) < cfg.warmup - 1:
        warnings.append(
            f"Schedule.decay = {cfg.decay:g} begins inside of Schedule.warmup = {cfg.warmup}, with "
            f"{steps} steps (Train.steps): the learning rate never reaches Schedule.peak"
        )
    for group in run.train.param_groups:
        if group.warmup and group.begin + group.warmup > steps:
            warnings.append(
                f"ParamGroup.begin + warmup = {group.begin + group.warmup} is beyond the {steps} "
                f"steps (Train.steps): {', '.join(group.weights)} never train at their whole rate"
            )
    return warnings


def decay_progress(cfg: config.Schedule, steps: int, step):
    """Fraction of the decay that is done: 0 at the end of the warm-up, 1 at the last step.

    Args:
      cfg: config of the schedule.
      steps: Train.steps.
      step: float32 scalar.
    """
    return jnp.clip((step - cfg.warmup) / max(1, steps - 1 - cfg.warmup), 0.0, 1.0)


def constant_shape(cfg: config.Schedule, steps: int, step):
    """No decay: 1 at every step.

    Args:
      cfg: config of the schedule.
      steps: Train.steps.
      step: float32 scalar.
    """
    return jnp.ones_like(step)


def rsqrt_shape(cfg: config.Schedule, steps: int, step):
    """Inverse square root, as T5 was pretrained: sqrt(warmup / step).

    Args:
      cfg: config of the schedule.
      steps: Train.steps.
      step: float32 scalar.
    """
    return jnp.sqrt(cfg.warmup / jnp.maximum(step, cfg.warmup))


def linear_shape(cfg: config.Schedule, steps: int, step):
    """Linear decay to the floor.

    Args:
      cfg: config of the schedule.
      steps: Train.steps.
      step: float32 scalar.
    """
    return 1 - (1 - cfg.floor) * decay_progress(cfg, steps, step)


def cosine_shape(cfg: config.Schedule, steps: int, step):
    """Cosine decay to the floor (Loshchilov and Hutter, 2017).

    Args:
      cfg: config of the schedule.
      steps: Train.steps.
      step: float32 scalar.
    """
    fall = 0.5 * (1 + jnp.cos(jnp.pi * decay_progress(cfg, steps, step)))
    return cfg.floor + (1 - cfg.floor) * fall


def wsd_shape(cfg: config.Schedule, steps: int, step):
    """Warm-up, stable, decay: linear to the floor over the last `decay` of all steps.

    Args:
      cfg: config of the schedule.
      steps: Train.steps.
      step: float32 scalar.
    """
    length = max(1.0, cfg.decay * steps)
    return 1 - (1 - cfg.floor) * jnp.clip((step - (steps - 1 - length)) / length, 0.0, 1.0)


SHAPES = {
    "constant": constant_shape,
    "rsqrt": rsqrt_shape,
    "linear": linear_shape,
    "cosine": cosine_shape,
    "wsd": wsd_shape,
}
