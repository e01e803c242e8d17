# SPDX-License-Identifier: Apache-2.0
"""Every call that depends on the version of a dependency, and every private name that is used.

Supported: jax 0.10.2 to 0.12. What a release changes is met here and nowhere else; a test holds the
rest of the package to public names.
"""

from typing import Any


def distributed_state() -> Any:
    """JAX's state of a group of processes, as `jax.distributed.initialize` leaves it.

    Returns:
      An object with `client` (its key-value store and barriers; None for a single process),
      `process_id` and `num_processes`.
    """
    # jax has no public access to the key-value store; orbax uses the same object.
    from jax._src import distributed

    return distributed.global_state
