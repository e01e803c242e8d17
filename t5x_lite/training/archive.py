# SPDX-License-Identifier: Apache-2.0
"""One checkpoint on disk: arrays written by orbax, and a note about them as JSON.

<step>/params/   the weights, one array per path "encoder.layers.attention.query"
<step>/rest/     step, optimizer and skipped counts, likewise
<step>/note/     `Note` as JSON, with shape, dtype and digest of every array

Orbax writes into a temporary folder and renames it, so a folder named by its step is whole. What
happens to it afterwards (a failing disk, a truncated copy) shows in the digests.
"""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import processes
from t5x_lite.training import state as states


class CheckpointError(ValueError):
    """A checkpoint cannot be written or used; the message says which and what to do."""


class Damaged(CheckpointError):
    """A checkpoint's files are not what was written."""


class Mismatch(CheckpointError):
    """A checkpoint belongs to another model or optimizer."""


@dataclasses.dataclass(frozen=True)
class Note:
    """What a checkpoint says besides its arrays.

    `config` is the run's resolved text, `data` the position in streams, `metrics` the evaluation at
    this step (empty if there was none), `totals` what progress adds up over restarts, `best` the
    metric that names the best checkpoint and whether higher is better.
    """

    step: int
    config: str
    data: dict = dataclasses.field(default_factory=dict)
    metrics: dict = dataclasses.field(default_factory=dict)
    totals: dict = dataclasses.field(default_factory=dict)
    best: tuple[str, bool] | None = None
    arrays: dict = dataclasses.field(default_factory=dict)


def flatten(tree: Any) -> dict[str, Any]:
    return dict(zip(states.names(tree), jax.tree.leaves(tree), strict=True))


def parts(state: states.TrainState) -> dict[str, dict[str, Any]]:
    """A state as the two flat items of a checkpoint."""
    return {"params": flatten(state.params), "rest": flatten(all_but_params(state))}


def all_but_params(state: states.TrainState) -> dict[str, Any]:
    return {name: part for name, part in state._asdict().items() if name != "params"}


def join(items: dict[str, dict[str, Any]], expected: states.TrainState) -> states.TrainState:
    """The state of which `items` are the parts, in the structure of `expected`."""
    fill = lambda tree, flat: jax.tree.unflatten(
        jax.tree.structure(tree), [flat[name] for name in states.names(tree)]
    )
    rest = fill(all_but_params(expected), items["rest"])
    return states.TrainState(params=fill(expected.params, items["params"]), **rest)


def digest(array: jax.Array) -> jax.Array:
    """32 bits that differ if any one element does: bits times odd numbers, summed modulo 2^32.

    Integer sums do not depend on their order, so every mesh gives the same digest.
    """
    bits = as_bits(array)
    while bits.ndim:
        odd = 2 * jnp.arange(bits.shape[-1], dtype=jnp.uint32) + 1
        bits = jnp.sum(bits * odd, axis=-1, dtype=jnp.uint32)
    return bits


@jax.jit
def digest_all(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: digest(array) for name, array in arrays.items()}


def as_bits(array: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def digest_of_numpy(array: np.ndarray) -> int:
    """`digest` without a device."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize]
    bits = np.ascontiguousarray(array).view(unsigned).astype(np.uint32)
    while bits.ndim:
        odd = 2 * np.arange(bits.shape[-1], dtype=np.uint32) + 1
        bits = np.sum(bits * odd, axis=-1, dtype=np.uint32)
    return int(bits)


def describe(arrays: dict[str, jax.Array]) -> dict[str, dict]:
    """Shape, dtype and digest of every array."""
    digests = jax.device_get(digest_all(arrays))
    return {
        name: {"shape": list(a.shape), "dtype": str(a.dtype), "digest": int(digests[name])}
        for name, a in arrays.items()
    }


def note_text(note: Note) -> dict:
    """The note as JSON-ready values, with a check sum over itself."""
    values = dataclasses.asdict(note)
    return {"note": values, "check": check(values)}


def check(values: dict) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def read_note(folder: Path) -> Note:
    """The note of a checkpoint folder; raises Damaged where it is not as written."""
    path = folder / "note" / "metadata"
    try:
        read = json.loads(path.read_text())
        if read["check"] != check(read["note"]):
            raise ValueError("its check sum does not fit")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path} cannot be read: {error}") from error
    values = read["note"]
    return Note(**values | {"best": values["best"] and tuple(values["best"])})


def compare_shapes(note: Note, item: str, expected: dict[str, Any], folder: Path) -> None:
    """Raises Mismatch naming the arrays whose shape differs from `expected`, or are missing."""
    there = {name: tuple(a["shape"]) for name, a in note.arrays[item].items()}
    wanted = {name: tuple(leaf.shape) for name, leaf in expected.items()}
    wrong = [name for name in there | wanted if there.get(name) != wanted.get(name)]
    if not wrong:
        return
    lines = [
        f"  {name}: checkpoint {there.get(name, 'has none')}, run {wanted.get(name, 'has none')}"
        for name in wrong[:8]
    ]
    more = [f"  and {len(wrong) - 8} more"] if len(wrong) > 8 else []
    what = "model" if item == "params" else "optimizer"
    raise Mismatch("\n".join([f"{folder} is of another {what}:", *lines, *more]))


def restore(folder: Path, item: str, note: Note, expected: dict[str, Any] | None = None) -> dict:
    """The arrays of an item, digests compared; placed as `expected` says, or numpy without it.

    Raises Mismatch for other shapes and Damaged for other bits.
    """
    import orbax.checkpoint as ocp

    if expected is not None:
        compare_shapes(note, item, expected, folder)
        arguments = ocp.checkpoint_utils.construct_restore_args(expected)
    else:
        expected = {
            name: jax.ShapeDtypeStruct(tuple(a["shape"]), a["dtype"])
            for name, a in note.arrays[item].items()
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
        damage = f"{folder / item} cannot be read: {first_line(error.__cause__ or error)}"
    check_everywhere(damage)
    compare_digests(folder / item, note.arrays[item], arrays)
    return arrays


def check_everywhere(damage: str) -> None:
    """Raises Damaged in every process if there is damage in any: all use the same checkpoint."""
    if found := "".join(processes.everyone(damage)):
        raise Damaged(found[:1000])


def compare_digests(path: Path, described: dict, arrays: dict) -> None:
    if any(isinstance(array, np.ndarray) for array in arrays.values()):
        digests = {name: digest_of_numpy(array) for name, array in arrays.items()}
    else:
        digests = jax.device_get(digest_all(arrays))
    wrong = [name for name, a in described.items() if int(digests[name]) != a["digest"]]
    if wrong:
        raise Damaged(f"{path}: the bits of {', '.join(wrong[:4])} are not those that were saved")


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
