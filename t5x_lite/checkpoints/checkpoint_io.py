# SPDX-License-Identifier: Apache-2.0
"""One checkpoint on disk: arrays written by orbax, and metadata as JSON.

<step>/params/   the weights, one array per path "encoder.layers.attention.query"
<step>/rest/     step, optimizer and skipped counts, likewise
<step>/note/     `CheckpointMetadata` as JSON, with shape, dtype and digest of every array

Orbax writes into a temporary folder and renames it, so a folder named by its step is complete. What
happens to it afterwards (a failing disk, a truncated copy) shows in the digests.
"""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import processes
from t5x_lite.checkpoints.train_state import TrainState
from t5x_lite.checkpoints.weight_paths import flatten_tree
from t5x_lite.utils.exit_status import FAILURE

# Arrays that a message about shapes names at most.
SHOWN = 8


class CheckpointError(ValueError):
    """A checkpoint cannot be written or used; the message says which and what to do."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint's files are not what was written."""

    exit_status = FAILURE


class CheckpointWriteError(CheckpointError):
    """A checkpoint could not be written."""

    exit_status = FAILURE


class CheckpointMismatchError(CheckpointError):
    """A checkpoint belongs to another model or optimizer."""


@dataclasses.dataclass(frozen=True)
class CheckpointMetadata:
    """Metadata of a checkpoint: everything besides its arrays.

    Attributes:
      step: training steps done.
      config: the run's resolved config as text.
      data: position in the streams of training data.
      metrics: evaluation at this step; empty if there was none.
      totals: sums of progress that go on over restarts.
      best: the metric that names the best checkpoint, and whether higher is better.
      arrays: shape, dtype and digest of every array, by item ("params", "rest") and path.
    """

    step: int
    config: str
    data: dict = dataclasses.field(default_factory=dict)
    metrics: dict = dataclasses.field(default_factory=dict)
    totals: dict = dataclasses.field(default_factory=dict)
    best: tuple[str, bool] | None = None
    arrays: dict = dataclasses.field(default_factory=dict)


def state_items(state: TrainState) -> dict[str, dict[str, Any]]:
    """A state as the two flat items of a checkpoint, "params" and "rest"."""
    return {
        "params": flatten_tree(state.params),
        "rest": flatten_tree(non_param_state(state)),
    }


def non_param_state(state: TrainState) -> dict[str, Any]:
    """Fields of a state without the weights."""
    return {name: part for name, part in state._asdict().items() if name != "params"}


def join_items(items: dict[str, dict[str, Any]], expected: TrainState) -> TrainState:
    """The state with the arrays of `items`, in the structure of `expected`."""

    def fill(tree: Any, arrays: dict[str, Any]) -> Any:
        leaves = [arrays[name] for name in flatten_tree(tree)]
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)

    rest = fill(non_param_state(expected), items["rest"])
    return TrainState(params=fill(expected.params, items["params"]), **rest)


def array_digest(array: jax.Array) -> jax.Array:
    """32 bits that differ if any one element does: bits times odd numbers, summed modulo 2^32.

    Integer sums do not depend on their order, so every mesh gives the same digest.
    """
    bits = to_bits(array)
    while bits.ndim:
        odd = 2 * jnp.arange(bits.shape[-1], dtype=jnp.uint32) + 1
        bits = jnp.sum(bits * odd, axis=-1, dtype=jnp.uint32)
    return bits


@jax.jit
def array_digests(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """`array_digest` of every array, uint32 []."""
    return {name: array_digest(array) for name, array in arrays.items()}


def to_bits(array: jax.Array) -> jax.Array:
    """The bits of each element as uint32, in the shape of the array."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def numpy_digest(array: np.ndarray) -> int:
    """`array_digest` without a device."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize]
    bits = np.ascontiguousarray(array).view(unsigned).astype(np.uint32)
    while bits.ndim:
        odd = 2 * np.arange(bits.shape[-1], dtype=np.uint32) + 1
        bits = np.sum(bits * odd, axis=-1, dtype=np.uint32)
    return int(bits)


def describe_arrays(arrays: dict[str, jax.Array]) -> dict[str, dict]:
    """Shape, dtype and digest of every array."""
    digests = jax.device_get(array_digests(arrays))
    return {
        name: {"shape": list(a.shape), "dtype": str(a.dtype), "digest": int(digests[name])}
        for name, a in arrays.items()
    }


def metadata_json(metadata: CheckpointMetadata) -> dict:
    """Metadata as JSON-ready values, with a checksum over themselves."""
    values = dataclasses.asdict(metadata)
    return {"note": values, "check": metadata_checksum(values)}


def metadata_checksum(values: dict) -> int:
    """CRC-32 of the values as JSON."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def read_metadata(folder: Path) -> CheckpointMetadata:
    """Metadata of a checkpoint folder.

    Raises:
      DamagedCheckpointError: they are not as they were written.
    """
    path = folder / "note" / "metadata"
    try:
        content = json.loads(path.read_text())
        values = content["note"]
        if content["check"] != metadata_checksum(values):
            raise ValueError("its checksum does not fit")
        best = values["best"] and tuple(values["best"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error
    return CheckpointMetadata(**values | {"best": best})


def stored_shapes(metadata: CheckpointMetadata, item: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of an item, "params" or "rest"."""
    return {name: tuple(a["shape"]) for name, a in metadata.arrays[item].items()}


def check_shapes(
    stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, Any], owner: str
) -> None:
    """Compares the shapes of stored arrays with those that a run needs.

    Args:
      stored: shapes in the checkpoint by path.
      expected: arrays, or jax.ShapeDtypeStruct, by path.
      owner: beginning of the message, "FOLDER is of another model".

    Raises:
      CheckpointMismatchError: names the arrays whose shapes differ, or that are missing.
    """
    needed = {name: tuple(leaf.shape) for name, leaf in expected.items()}
    wrong = [name for name in stored | needed if stored.get(name) != needed.get(name)]
    if not wrong:
        return
    lines = [
        f"  {name}: checkpoint {stored.get(name, 'has none')}, run {needed.get(name, 'has none')}"
        for name in wrong[:SHOWN]
    ]
    more = [f"  and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
    raise CheckpointMismatchError("\n".join([f"{owner}:", *lines, *more]))


def restore_arrays(
    folder: Path,
    item: str,
    metadata: CheckpointMetadata,
    expected: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Reads the arrays of an item and compares their digests.

    Args:
      folder: the checkpoint, named by its step.
      item: "params" or "rest".
      metadata: of this checkpoint.
      expected: a jax.ShapeDtypeStruct with its placement for each path; None for numpy arrays.

    Returns:
      An array for each path.

    Raises:
      CheckpointMismatchError: shapes differ from `expected`.
      DamagedCheckpointError: a file cannot be read, or has other bits than were written.
    """
    import orbax.checkpoint as ocp

    if expected is not None:
        part = "model" if item == "params" else "optimizer"
        check_shapes(stored_shapes(metadata, item), expected, f"{folder} is of another {part}")
        arguments = ocp.checkpoint_utils.construct_restore_args(expected)
    else:
        expected = {
            name: jax.ShapeDtypeStruct(tuple(a["shape"]), a["dtype"])
            for name, a in metadata.arrays[item].items()
        }
        arguments = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in expected}
    wanted = ocp.args.PyTreeRestore(item=expected, restore_args=arguments)
    arrays, damage = {}, ""
    try:
        # The handler alone: a Checkpointer waits for all processes, also for one that has failed.
        arrays = ocp.PyTreeCheckpointHandler().restore((folder / item).absolute(), args=wanted)
    except (jax.errors.JaxRuntimeError, MemoryError):
        # The device or the host is too small: that says nothing about the files.
        raise
    except Exception as error:  # orbax raises a bare Exception for a chunk it cannot read
        reason = processes.first_line(error.__cause__ or error)[:300]
        damage = f"{folder / item} cannot be read: {reason}"
    check_all_processes(damage)
    check_digests(folder / item, metadata.arrays[item], arrays)
    return arrays


def check_all_processes(damage: str) -> None:
    """Raises DamagedCheckpointError in every process if any has damage: all use one checkpoint."""
    if damages := "".join(processes.gather_texts(damage)):
        raise DamagedCheckpointError(damages[:1000])


def check_digests(path: Path, described: Mapping[str, Mapping], arrays: Mapping[str, Any]) -> None:
    """Compares the digests of arrays with those that were written.

    Args:
      path: folder of the item, for the message.
      described: metadata of each array, with its "digest".
      arrays: numpy or jax arrays by the same names.

    Raises:
      DamagedCheckpointError: names the first arrays that differ.
    """
    if any(isinstance(array, np.ndarray) for array in arrays.values()):
        digests = {name: numpy_digest(array) for name, array in arrays.items()}
    else:
        digests = jax.device_get(array_digests(arrays))
    wrong = [name for name, a in described.items() if int(digests[name]) != a["digest"]]
    if wrong:
        raise DamagedCheckpointError(
            f"{path}: the bits of {', '.join(wrong[:4])} are not those that were saved"
        )
