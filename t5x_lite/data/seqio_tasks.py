# SPDX-License-Identifier: Apache-2.0
"""seqio's registry: Tasks and Mixtures that a user's module registered."""

from t5x_lite import config


def names() -> list[str]:
    import seqio

    return [*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()]


def find(cfg: config.Data):
    return None
