# SPDX-License-Identifier: Apache-2.0
"""Learning rate against step."""

import jax.numpy as jnp
import optax

from t5x_lite import config


def learning_rate(cfg: config.Schedule, steps: int) -> optax.Schedule:
    """The rate at every step in 0..steps - 1, as a function that can be traced."""
    shape = SHAPES[cfg.kind]

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        # Rises through 1/warmup, 2/warmup ...: a rate of 0 would waste the first step.
        rise = jnp.minimum(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
        return cfg.peak * rise * shape(cfg, steps, step)

    return rate


def progress(cfg: config.Schedule, steps: int, step):
    """0 at the end of the warm-up, 1 at the last step."""
    return jnp.clip((step - cfg.warmup) / max(1, steps - 1 - cfg.warmup), 0.0, 1.0)


def constant(cfg: config.Schedule, steps: int, step):
    return jnp.ones_like(step)


def rsqrt(cfg: config.Schedule, steps: int, step):
    return jnp.sqrt(cfg.warmup / jnp.maximum(step, cfg.warmup))


def linear(cfg: config.Schedule, steps: int, step):
    return 1 - (1 - cfg.floor) * progress(cfg, steps, step)


def cosine(cfg: config.Schedule, steps: int, step):
    fall = 0.5 * (1 + jnp.cos(jnp.pi * progress(cfg, steps, step)))
    return cfg.floor + (1 - cfg.floor) * fall


def wsd(cfg: config.Schedule, steps: int, step):
    """Warm-up, stable, decay: linear to the floor over the last `decay` of all steps."""
    length = max(1.0, cfg.decay * steps)
    return 1 - (1 - cfg.floor) * jnp.clip((step - (steps - 1 - length)) / length, 0.0, 1.0)


SHAPES = {"constant": constant, "rsqrt": rsqrt, "linear": linear, "cosine": cosine, "wsd": wsd}
