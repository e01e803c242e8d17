# SPDX-License-Identifier: Apache-2.0
"""Every call that depends on the version of a dependency, and every private name that is used.

Supported: jax 0.10.2 to 0.12. What a release changes is met here and nowhere else; a test holds the
rest of the package to public names.
"""

import contextlib
import types
from collections.abc import Callable, Generator
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


def set_orbax_stores(
    is_address: Callable[[str], bool],
    normalize: Callable[[str], str],
    describe: Callable[[str], dict[str, Any]],
) -> None:
    """Lets orbax read and write arrays in s3:// by TensorStore, as it does in gs://.

    Orbax 0.12 takes any other address for a path of this machine. etils, which it lists stores by,
    has decided by the first path of the process whether TensorFlow does that.

    Args:
      is_address: true for the address of a store.
      normalize: a path or an address in its usual form.
      describe: TensorStore's description of the place of an address.
    """
    from etils.epath import gpath
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    vars(tensorstore_utils)["_use_gcs_driver"] = is_address
    vars(tensorstore_utils)["_normalize_path"] = normalize
    vars(gcs_utils)["get_kvstore_for_gcs"] = describe
    vars(gpath)["_is_tf_installed"] = bool  # false


def has_mosaic_gpu(interpreted: bool = False) -> bool:
    """True if this jax has what the kernels for Mosaic GPU call: from 0.11 on, to lower them.

    Args:
      interpreted: to interpret them on a CPU, or to run the kernel over a cache: from 0.12 on.
    """
    import jax

    major, minor, *_ = jax.__version__.split(".")
    return (int(major), int(minor)) >= (0, 12 if interpreted else 11)


@contextlib.contextmanager
def assume_cudnn(version: int) -> Generator[None]:
    """Context in which jax lowers cuDNN's attention as if that version of cuDNN were installed.

    For programs of a GPU that is not there: without cuDNN jax 0.10 to 0.12 refuses to trace them.
    """
    from jax._src.cudnn import fused_attention_stablehlo

    names = vars(fused_attention_stablehlo)
    installed = names["cuda_versions"]
    names["cuda_versions"] = types.SimpleNamespace(cudnn_get_version=lambda: version)
    try:
        yield
    finally:
        names["cuda_versions"] = installed
