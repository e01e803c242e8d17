# SPDX-License-Identifier: Apache-2.0
"""Environment in which libtpu compiles without a TPU; to be set before jax is imported."""

import importlib.util
import os

from t5x_lite.utils.extras import install_command

# Read by libtpu when it is loaded: it must not search for a chip, a metadata server or another
# process that uses it.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def prepare() -> None:
    """Sets the environment for libtpu; call it before jax is used.

    Raises:
      ValueError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"Compiling for TPU chips that are not there needs libtpu: {install_command('plan')}. "
            "--chips=h100x8 plans by arithmetic without it"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
