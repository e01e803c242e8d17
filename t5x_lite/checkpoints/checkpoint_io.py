# SPDX-License-Identifier: Apache-2.0
"""One checkpoint on disk: arrays written by orbax, and metadata as JSON.

<step>/params/   the weights, one array per path "encoder.layers.attention.query"
<step>/rest/     step, optimizer and skipped counts, likewise
<step>/note/     `CheckpointMetadata` as JSON, with shape, dtype and digest of every array

Orbax writes into a temporary folder and renames it, so a folder named by its step is complete. What
happens to it afterwards (a failing disk, a truncated copy) shows in the digests.
"""

import dataclasses
import errno
import functools
import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5x_lite import compat, processes
from t5x_lite.checkpoints import digests, metadata_fields, zarr_arrays
from t5x_lite.checkpoints.step_folders import is_step
from t5x_lite.checkpoints.train_state import TrainState
from t5x_lite.checkpoints.weight_paths import flatten_tree
from t5x_lite.utils import bounded_files, remote_paths
from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.exit_status import FAILURE
from t5x_lite.utils.paths import is_address, parse_path

# File of the metadata in a checkpoint's folder.
METADATA = Path("note", "metadata")
# Arrays that a message about shapes names at most.
SHOWN = 8
# What is missing or is not a file is damage; any other error of the system may pass.
WRONG_FILES = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# Of a store that TensorStore asked: nothing is known about its objects.
NO_ANSWER = re.compile(
    "UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|ABORTED|RESOURCE_EXHAUSTED|CURL"
)
OS_ERROR = re.compile(r"(?:os_error_code='|OS error )(\d+)")  # of tensorstore


class CheckpointError(ValueError):
    """A checkpoint cannot be written or used; the message says which and what to do."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint's files are not what was written."""

    exit_status = FAILURE


class UnreadableCheckpointError(CheckpointError):
    """A checkpoint's files cannot be read now, which says nothing about their content."""

    exit_status = FAILURE


class RemovedCheckpointError(CheckpointError):
    """A checkpoint was removed while it was read, as a run that trains does with older ones."""

    exit_status = FAILURE


class CheckpointWriteError(CheckpointError):
    """A checkpoint could not be written."""

    exit_status = FAILURE


class CheckpointMismatchError(CheckpointError):
    """A checkpoint belongs to another model, optimizer or step."""


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
      vocabulary: digest of the files of the run's vocabularies; None where it is not known.
      base: digest of every weight that "params" are adapters of, in float32, by path; empty where
        they are the weights.
    """

    step: int
    config: str
    data: dict = dataclasses.field(default_factory=dict)
    metrics: dict = dataclasses.field(default_factory=dict)
    totals: dict = dataclasses.field(default_factory=dict)
    best: tuple[str, bool] | None = None
    arrays: dict = dataclasses.field(default_factory=dict)
    vocabulary: str | None = None
    base: dict[str, int] = dataclasses.field(default_factory=dict)


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


def describe_arrays(arrays: dict[str, jax.Array]) -> dict[str, dict]:
    """Shape, dtype and digest of every array."""
    values = jax.device_get(digests.array_digests(arrays))
    return {
        name: {"shape": list(a.shape), "dtype": str(a.dtype), digests.MIXED: int(values[name])}
        for name, a in arrays.items()
    }


def metadata_json(metadata: CheckpointMetadata) -> dict:
    """Metadata as JSON-ready values, with a checksum over themselves."""
    values = dataclasses.asdict(metadata)
    vocabulary = values.pop("vocabulary")  # earlier versions take no other fields in a note
    return {"note": values, "check": metadata_checksum(values), "vocabulary": vocabulary}


def write_metadata(folder: Path, metadata: CheckpointMetadata) -> None:
    """Replaces the metadata of a complete checkpoint; readers see the old ones or the new ones."""
    write_atomically(folder / METADATA, json.dumps(metadata_json(metadata)))


def metadata_checksum(values: dict) -> int:
    """CRC-32 of the values as JSON."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def read_metadata(folder: Path) -> CheckpointMetadata:
    """Metadata of a checkpoint folder.

    Raises:
      CheckpointError: they are not as they were written, cannot be read now, or were removed; or
        the folder has the name of another step, which a run would save once more.
    """
    path = folder / METADATA
    try:
        content = bounded_files.read_json_object(path)
        values = content["note"]
        if content["check"] != metadata_checksum(values):
            raise ValueError("its checksum does not fit")
        metadata_fields.check_fields(values)
        best, vocabulary = values.get("best"), content.get("vocabulary")
        fields = {"best": best and tuple(best), "vocabulary": vocabulary}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise reading_error(folder, path, error) from error
    if newer := values.keys() - {field.name for field in dataclasses.fields(CheckpointMetadata)}:
        raise CheckpointMismatchError(
            f"{path} has fields that this version does not know ({', '.join(sorted(newer))}): "
            "read the checkpoint with the version that saved it"
        )
    metadata = CheckpointMetadata(**values | fields)
    if is_step(folder.name) and int(folder.name) != metadata.step:
        raise CheckpointMismatchError(
            f"{folder} holds the checkpoint of step {metadata.step}: rename the folder to "
            f"{metadata.step}, or remove it if it is a copy"
        )
    return metadata


def reading_error(folder: Path, path: Path, error: Exception) -> CheckpointError:
    """The error of a checkpoint of which a file cannot be read: removed, damaged, or a disk that
    does not answer.

    Args:
      folder: the checkpoint, named by its step.
      path: file or item that was read.
      error: error of the reader.
    """
    reason = processes.first_line(error.__cause__ or error)[:300]
    number = os_error_number(error)
    unanswered = is_address(path) and NO_ANSWER.search(str(error))
    if not unanswered and (number in WRONG_FILES or number is None):
        if not is_address(folder) and folder.is_symlink() and not folder.exists():
            return UnreadableCheckpointError(
                f"{folder} is a link to {folder.readlink()}, which is not there: mount its disk, "
                "or remove the link"
            )
        if not folder.exists():
            return RemovedCheckpointError(
                f"{folder} was removed while it was read, as a run that trains does with older "
                "ones: try again, or raise its Checkpoint.keep"
            )
        return DamagedCheckpointError(f"{path} cannot be read: {reason}")
    return UnreadableCheckpointError(
        f"{path} cannot be read now: {reason}. Nothing was changed; the same command works once "
        "the disk answers again"
    )


def os_error_number(error: BaseException | None) -> int | None:
    """Number of the operating system's error behind an error, also where only its text has it."""
    while error is not None:
        if isinstance(error, OSError):
            return error.errno
        if match := OS_ERROR.search(str(error)):
            return int(match[1])
        error = error.__cause__ or error.__context__
    return None


def stored_shapes(metadata: CheckpointMetadata, item: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of an item, "params" or "rest"."""
    return {name: tuple(a["shape"]) for name, a in metadata.arrays.get(item, {}).items()}


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
    wrong = [name for name in {**stored, **needed} if stored.get(name) != needed.get(name)]
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
      expected: a jax.ShapeDtypeStruct of the stored shape with its placement for each path; None
        for numpy arrays.

    Returns:
      An array for each path.

    Raises:
      CheckpointError: a file is damaged, cannot be read now, or was removed.
    """
    import orbax.checkpoint as ocp

    if expected is not None:
        arguments = ocp.checkpoint_utils.construct_restore_args(expected)
    else:
        expected = {
            name: jax.ShapeDtypeStruct(tuple(a["shape"]), a["dtype"])
            for name, a in metadata.arrays[item].items()
        }
        arguments = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in expected}
    wanted = ocp.args.PyTreeRestore(item=expected, restore_args=arguments)
    arrays, problem = {}, None
    try:
        ocdbt = (folder / item / "manifest.ocdbt").exists()
        for name in expected:
            zarr_arrays.open_array(folder / item, name, ocdbt)
        # The handler alone: a Checkpointer waits for all processes, also for one that has failed.
        handler: Any = ocp.PyTreeCheckpointHandler()
        arrays = handler.restore(orbax_path(folder / item), args=wanted)
    except (jax.errors.JaxRuntimeError, MemoryError):
        # The device or the host is too small: that says nothing about the files.
        raise
    except Exception as error:  # orbax raises a bare Exception for a chunk it cannot read
        problem = reading_error(folder, folder / item, error)
    check_all_processes(problem)
    check_digests(folder / item, metadata.arrays[item], arrays)
    return arrays


def open_writer(folder: Path, timeout: int) -> Any:
    """Orbax's writer of checkpoints, which writes in threads of its own.

    Args:
      folder: folder of the checkpoints.
      timeout: seconds for one checkpoint.
    """
    import orbax.checkpoint as ocp

    if not is_address(folder):
        return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), timeout_secs=timeout)
    prepare_orbax()
    atomicity = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(atomicity_options=atomicity)
        ),
        timeout_secs=timeout,
        atomicity_options=atomicity,
        # Else training waits for four requests, two after two: is the folder there already? The
        # thread that creates it asks too.
        file_options=ocp.options.FileOptions(skip_sync_file_validations=True),
    )


@functools.cache
def prepare_orbax() -> None:
    """Lets orbax write to stores, for this process."""
    remote_paths.prepare_stores()
    compat.set_orbax_stores(
        is_address,
        lambda path: str(parse_path(path)) if is_address(path) else os.path.normpath(path),
        lambda path: remote_paths.key_value_store(parse_path(path)),
    )


def orbax_path(path: Path) -> Any:
    """A path as orbax takes it: absolute, an address in the class of paths that it uses itself."""
    if not is_address(path):
        return path.absolute()
    prepare_orbax()
    from etils import epath

    return epath.Path(str(path))


def check_all_processes(problem: CheckpointError | None) -> None:
    """Raises an error in every process if any has a problem: all use one checkpoint.

    A checkpoint that one process cannot read now is not damaged for any.
    """
    texts = processes.gather_texts(f"{type(problem).__name__} {problem}" if problem else "")
    problems = [text.partition(" ") for text in texts if text]
    kinds = UnreadableCheckpointError, RemovedCheckpointError, DamagedCheckpointError
    for kind in (CheckpointMismatchError, *kinds):
        if same := [text for name, _, text in problems if name == kind.__name__]:
            raise kind("; ".join(same)[:1000])


def check_digests(path: Path, described: Mapping[str, Mapping], arrays: Mapping[str, Any]) -> None:
    """Compares the digests of arrays with those that were written.

    Args:
      path: folder of the item, for the message.
      described: metadata of each array.
      arrays: numpy or jax arrays by the same names.

    Raises:
      DamagedCheckpointError: names the first arrays that differ.
    """
    if wrong := digests.changed_arrays(described, arrays):
        raise DamagedCheckpointError(
            f"{path}: the bits of {', '.join(wrong[:4])} are not those that were saved"
        )
