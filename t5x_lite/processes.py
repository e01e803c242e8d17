# SPDX-License-Identifier: Apache-2.0
"""Multi-process runs: initialization, exchange of texts, and a common end.

`jax.distributed` connects the processes; on TPU pods, SLURM and Kubernetes it detects the
coordinator. A process that fails or is lost ends all others with one message; otherwise they would
wait for it in a collective.
"""

import argparse
import contextlib
import errno
import hashlib
import itertools
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from t5x_lite import compat
from t5x_lite.utils.exit_status import TRY_AGAIN, exit_status

# Seconds: between heartbeats, until a silent process is lost, for others to read of an end.
BEAT, LOST, HEARD = 1.0, 30.0, 10.0
# Seconds to wait for the others at initialization (a pod's machines do not start at once).
MEET = 300
# Seconds to wait at a barrier for others that are alive: one may be indexing a large corpus.
PATIENCE = 24 * 3600
# Substrings of errors of collectives, barriers and the key-value store; not of out-of-memory.
SIGNS_OF_LOSS = ("Gloo", "CoordinationService", "UNAVAILABLE", "DEADLINE_EXCEEDED")
TPU_VENDOR = "0x1ae0"  # Google's PCI vendor id
PCI_DEVICES = Path("/sys/bus/pci/devices")
BOARD, TALK = "t5x_lite/", "t5x_lite_talk/"
GO_ON = "The same command, in all processes, goes on from the newest checkpoint"
talks = itertools.count()


class ProcessesError(ValueError):
    """The processes cannot connect, or differ in their inputs; the message says what to do."""


class Rendezvous(NamedTuple):
    """Arguments of `jax.distributed.initialize`; None where JAX detects them.

    Attributes:
      coordinator: HOST:PORT at which process 0 listens.
      processes: number of processes.
      process: index of this process.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


class ProcessEnd(NamedTuple):
    """Reason of a process's end: its exit status and a message."""

    status: int
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --coordinator, --processes and --process."""
    group = parser.add_argument_group(
        "several processes", "detected on TPU pods, SLURM and Kubernetes; elsewhere all three"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")


def parse_rendezvous(args: argparse.Namespace) -> Rendezvous | None:
    """Rendezvous of the flags or the environment; None for a single process.

    Raises:
      ProcessesError: only some of the flags are set, or they contradict each other.
    """
    rendezvous = Rendezvous(args.coordinator, args.processes, args.process)
    if rendezvous == Rendezvous():
        return rendezvous if detect_cluster(os.environ) else None
    missing = [f"--{name}" for name, value in rendezvous._asdict().items() if value is None]
    if missing:
        raise ProcessesError(f"{', '.join(missing)} missing: several processes need all three")
    coordinator, processes, process = args.coordinator, args.processes, args.process
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ProcessesError(f"--coordinator={coordinator} is not HOST:PORT")
    if not 0 <= process < processes:
        raise ProcessesError(
            f"--process={process} is not in 0..{processes - 1} (--processes={processes})"
        )
    return rendezvous if processes > 1 else None


def detect_cluster(environment: Mapping[str, str], devices: Path = PCI_DEVICES) -> str | None:
    """Detects a cluster that JAX supports: "slurm", "kubernetes" or "tpu"; None elsewhere.

    None also for a job of one process and for JAX_PLATFORMS without tpu.
    """
    if "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment:
        return "slurm" if int(environment.get("SLURM_NTASKS", "1")) > 1 else None
    if "tpu" not in environment.get("JAX_PLATFORMS", "tpu"):
        return None
    if "TPU_WORKER_HOSTNAMES" in environment:
        several = "," in environment["TPU_WORKER_HOSTNAMES"]
        return "tpu" if several or "MEGASCALE_COORDINATOR_ADDRESS" in environment else None
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "kubernetes"
    return "tpu" if has_tpu(devices) else None


def has_tpu(devices: Path = PCI_DEVICES) -> bool:
    """True if a TPU is on the bus of this machine."""
    return any(path.read_text().strip() == TPU_VENDOR for path in devices.glob("*/vendor"))


@contextlib.contextmanager
def claim_index(rendezvous: Rendezvous):
    """Context that holds the index of this process on this machine, on Linux.

    JAX itself lets a second process of one index wait for minutes.

    Raises:
      ProcessesError: another process of this machine holds it.
    """
    if rendezvous.coordinator is None or not sys.platform.startswith("linux"):
        yield
        return
    place = f"{rendezvous.coordinator}/{rendezvous.process}".encode()
    with socket.socket(socket.AF_UNIX) as holder:
        try:
            # In Linux's abstract namespace: no file is left, however the process ends.
            holder.bind(b"\0t5x_lite/" + hashlib.sha256(place).hexdigest().encode())
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise ProcessesError(
                f"Another process with --process={rendezvous.process} of --coordinator="
                f"{rendezvous.coordinator} runs on this machine: give each process an index of "
                "its own, or wait for the end of an earlier run"
            ) from error
        yield


def connect(rendezvous: Rendezvous, command: str) -> None:
    """Connects to the other processes; to be called before jax creates its first array.

    If they do not connect within MEET seconds, the process ends with a message (JAX would abort).

    Raises:
      ProcessesError: JAX cannot detect the other processes.
    """
    # `Watchdog` reports in one sentence what the coordinator would warn about.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    detection = "deactivate" if rendezvous.coordinator else None
    where = f" at {rendezvous.coordinator}" if rendezvous.coordinator else ""

    def give_up() -> None:
        print(
            f"{command}: error: the other processes have not come{where} within {MEET} seconds: "
            "start all of them, each with its own --process, where the coordinator's port can be "
            "reached",
            file=sys.stderr,
            flush=True,
        )
        os._exit(TRY_AGAIN)

    patience = threading.Timer(MEET, give_up)
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(
            *rendezvous, cluster_detection_method=detection, initialization_timeout=2 * MEET
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise ProcessesError(f"The processes could not meet{where}: {first_line(error)}") from error
    finally:
        patience.cancel()


class Watchdog(threading.Thread):
    """Sends heartbeats of this process, and ends it when another one fails or is lost.

    Its board is the key-value store of JAX's coordinator, with keys beat/I, a counter; ended/I, the
    reason why process I ends; heard/I, set once process I knows of an end.
    """

    def __init__(self, command: str, state: Any):
        super().__init__(daemon=True)
        self.command, self.client = command, state.client
        self.process, self.processes = state.process_id, state.num_processes
        self.over = threading.Event()
        self.heartbeats: dict[str, tuple[str, float]] = {}

    def run(self) -> None:
        for beat in itertools.count():
            if self.over.wait(BEAT):
                return
            try:
                self.put(f"beat/{self.process}", str(beat))
                board = self.board()
            except RuntimeError:
                # No coordinator: JAX itself ends a process that lost it.
                continue
            if end := self.find_end(board):
                print(f"{self.command}: error: {end.text}", file=sys.stderr)
                self.end(end.status)

    def put(self, name: str, value: str) -> None:
        """Writes an entry of the board."""
        self.client.key_value_set(BOARD + name, value, allow_overwrite=True)

    def board(self) -> dict[str, str]:
        """Entries of the board by name."""
        entries = self.client.key_value_dir_get(BOARD)
        return {name.removeprefix(BOARD): value for name, value in entries}

    def find_end(self, board: dict[str, str]) -> ProcessEnd | None:
        """Reason why this process has to end; None if there is none."""
        for name, value in sorted(board.items()):
            if name.startswith("ended/"):
                status, _, text = value.partition(" ")
                return ProcessEnd(
                    int(status), f"process {name.removeprefix('ended/')} ended: {text}"
                )
        now = time.monotonic()
        for process in range(self.processes):
            beat = board.get(f"beat/{process}", "")
            before, since = self.heartbeats.setdefault(f"beat/{process}", (beat, now))
            if beat != before:
                self.heartbeats[f"beat/{process}"] = beat, now
            elif now - since > LOST:
                text = f"process {process} of {self.processes} is lost. {GO_ON}"
                return ProcessEnd(TRY_AGAIN, text)
        return None

    def fail(self, error: BaseException) -> NoReturn:
        """Reports an error to the other processes, and ends this one."""
        self.over.set()
        status = TRY_AGAIN if is_lost(error) else exit_status(error)
        with contextlib.suppress(RuntimeError):
            self.put(f"ended/{self.process}", f"{status} {error_message(error)}")
        self.end(status)

    def end(self, status: int) -> NoReturn:
        """Ends this process at once: `jax.distributed.shutdown` waits for processes that are gone.

        Process 0 has the board, so it waits until the others have read it.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        deadline = time.monotonic() + HEARD
        with contextlib.suppress(RuntimeError):
            self.put(f"heard/{self.process}", "")
            while self.process == 0 and time.monotonic() < deadline:
                entries = self.board()
                if all(f"heard/{each}" in entries for each in range(self.processes)):
                    break
                time.sleep(BEAT / 4)
        os._exit(status)

    def finish(self) -> None:
        """Waits until every process has finished without error."""
        self.client.wait_at_barrier(f"{BOARD}done", PATIENCE * 1000)
        self.over.set()
        self.join()


@contextlib.contextmanager
def process_group(rendezvous: Rendezvous | None, command: str):
    """Context of a process of a multi-process run, from connection to the common end.

    An error in one process ends all, each with one message. None for a single process has no
    effect.
    """
    if rendezvous is None:
        yield
        return
    with claim_index(rendezvous):
        connect(rendezvous, command)
        with watch_others(command):
            yield


@contextlib.contextmanager
def watch_others(command: str):
    """Context of the work of a connected process: an error in one ends all."""
    watchdog = Watchdog(command, compat.distributed_state())
    watchdog.start()
    try:
        yield
        watchdog.finish()
    except BaseException as error:
        if isinstance(error, (ValueError, OSError)) or is_lost(error):
            print(f"{command}: error: {error_message(error)}", file=sys.stderr)
        else:
            traceback.print_exc()
        watchdog.fail(error)
    import jax

    jax.distributed.shutdown()


def is_multiprocess() -> bool:
    """Returns True in a multi-process run."""
    return compat.distributed_state().client is not None


def reached_preemption(step: int) -> bool:
    """Returns True if all processes have to stop after this step, because one got SIGTERM.

    Every process has to call it after every step.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def is_first() -> bool:
    """Returns True in process 0, which writes what is written once."""
    return compat.distributed_state().process_id == 0


def gather_texts(text: str) -> list[str]:
    """Returns the text of each process; every process has to call it."""
    state = compat.distributed_state()
    if state.client is None:
        return [text]
    talk = f"{TALK}{next(talks)}"
    state.client.key_value_set(f"{talk}/{state.process_id}", text)
    state.client.wait_at_barrier(talk, PATIENCE * 1000)
    texts = dict(state.client.key_value_dir_get(f"{talk}/"))
    return [texts[f"{talk}/{process}"] for process in range(state.num_processes)]


def broadcast_text(text: str) -> str:
    """Returns the text of process 0; every process has to call it."""
    return gather_texts(text)[0]


def barrier() -> None:
    """Waits until every process has called it."""
    gather_texts("")


def check_equal(what: str, text: str) -> None:
    """Checks that all processes have the same text, the description of `what`.

    Raises:
      ProcessesError: they differ; the message names the processes that differ from the first.
    """
    texts = gather_texts(text)
    others = [process for process, each in enumerate(texts) if each != texts[0]]
    if others:
        named = ", ".join(map(str, others[:8]))
        raise ProcessesError(
            f"{what} of process {named} differ from those of process 0: give every process the "
            "same command, the same files and the same versions"
        )


def is_lost(error: BaseException) -> bool:
    """Returns True for an error that is due to the loss of another process."""
    return any(sign in str(error) for sign in SIGNS_OF_LOSS)


def error_message(error: BaseException) -> str:
    """Message about an error for the log of every process."""
    if not is_lost(error):
        return str(error) or type(error).__name__
    return f"another process was lost ({first_line(error)}). {GO_ON}"


def first_line(error: BaseException) -> str:
    """First line of an error's message, or the name of its class."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def describe_error(error: BaseException) -> str:
    """Class, first line and place of an error that a user's function raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    message = f": {first_line(error)[:300]}" if str(error) else ""
    return f"{type(error).__name__}{message}{place}"
