# SPDX-License-Identifier: Apache-2.0
"""Several processes that run as one: how they meet, agree, and end together.

JAX's own coordinator introduces them; on TPU pods, SLURM and Kubernetes it finds itself. One that
fails or is lost ends all the others with one message, where they would wait for it in a collective.
"""

import argparse
import contextlib
import itertools
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

from t5x_lite import compat

# Seconds: between signs of life, until a silent process is lost, until others have heard of an end.
BEAT, LOST, HEARD = 1.0, 30.0, 10.0
# Exit statuses: a mistake, and another process that was lost (sysexits.h: a later try may do).
REFUSED, TRY_AGAIN = 1, 75
# How long a process waits for the others to come (a pod's machines do not start at once).
MEET = 300
# How long it waits for others that are alive: one of them may index a large corpus meanwhile.
PATIENCE = 24 * 3600
# In errors of collectives, barriers and the board. Memory that does not suffice is none of them.
SIGNS_OF_LOSS = ("Gloo", "CoordinationService", "UNAVAILABLE", "DEADLINE_EXCEEDED")
TPU_VENDOR = "0x1ae0"  # Google's number as a maker of PCI devices
BOARD, TALK = "t5x_lite/", "t5x_lite_talk/"
GO_ON = "The same command, in all processes, goes on from the newest checkpoint"
talks = itertools.count()


class ProcessesError(ValueError):
    """The processes cannot meet, or do not agree; the message says why and what to do."""


class Meeting(NamedTuple):
    """Where processes meet, how many, and which one this is; None where JAX finds it out."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


class End(NamedTuple):
    """Why a process ends, and its exit status."""

    status: int
    text: str


def add(parser: argparse.ArgumentParser) -> None:
    """Adds --coordinator, --processes and --process."""
    group = parser.add_argument_group(
        "several processes", "found out on TPU pods, SLURM and Kubernetes; elsewhere all three"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is reached")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0 on")


def meeting(given: argparse.Namespace) -> Meeting | None:
    """What the flags or the environment say; None for a process alone.

    Raises:
      ProcessesError: only some of the flags are there, or they contradict each other.
    """
    told = Meeting(given.coordinator, given.processes, given.process)
    if told == Meeting():
        return told if surroundings(os.environ) else None
    missing = [f"--{name}" for name, value in told._asdict().items() if value is None]
    if missing:
        raise ProcessesError(f"{', '.join(missing)} missing: several processes need all three")
    host, _, port = told.coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ProcessesError(f"--coordinator={told.coordinator} is not HOST:PORT")
    if not 0 <= told.process < told.processes:
        raise ProcessesError(
            f"--process={told.process} is not in 0..{told.processes - 1} (--processes="
            f"{told.processes})"
        )
    return told if told.processes > 1 else None


def surroundings(environment: Mapping[str, str], devices: Path = Path("/sys/bus/pci/devices")):
    """Which of the places that JAX knows this is, "slurm", "kubernetes" or "tpu"; None elsewhere.

    A job of one process is a process alone, and so is one that is told to leave the TPU be.
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
    vendors = devices.glob("*/vendor")
    return "tpu" if any(path.read_text().strip() == TPU_VENDOR for path in vendors) else None


def join(told: Meeting, command: str) -> None:
    """Meets the other processes; call it before jax makes its first array.

    Where they do not come within MEET seconds the process ends with a message (JAX would abort).

    Raises:
      ProcessesError: JAX cannot find out who they are.
    """
    # Warnings of the coordinator about the others are said by `Watch` in one sentence.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    found = "deactivate" if told.coordinator else None
    where = f" at {told.coordinator}" if told.coordinator else ""

    def alone() -> None:
        print(
            f"{command}: the other processes have not come{where} within {MEET} seconds: start all "
            "of them, each with its own --process, where the coordinator's port can be reached",
            file=sys.stderr,
            flush=True,
        )
        os._exit(TRY_AGAIN)

    patience = threading.Timer(MEET, alone)
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(
            *told, cluster_detection_method=found, initialization_timeout=2 * MEET
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise ProcessesError(f"The processes could not meet{where}: {first_line(error)}") from error
    finally:
        patience.cancel()


class Watch(threading.Thread):
    """Tells the others that this process lives, and ends it when one of them failed or is lost.

    All is written on the board of JAX's coordinator: beat/I, a counter; ended/I, why process I
    ends; heard/I, that it knows of an end.
    """

    def __init__(self, command: str, state: Any):
        super().__init__(daemon=True)
        self.command, self.client = command, state.client
        self.process, self.processes = state.process_id, state.num_processes
        self.over = threading.Event()
        self.seen: dict[str, tuple[str, float]] = {}

    def run(self) -> None:
        for beat in itertools.count():
            if self.over.wait(BEAT):
                return
            try:
                self.put(f"beat/{self.process}", str(beat))
                board = self.board()
            except RuntimeError:
                # Nobody to ask: JAX ends a process whose coordinator is lost.
                continue
            if why := self.why(board):
                print(f"{self.command}: {why.text}", file=sys.stderr)
                self.end(why.status)

    def put(self, name: str, value: str) -> None:
        self.client.key_value_set(BOARD + name, value, allow_overwrite=True)

    def board(self) -> dict[str, str]:
        """What is written, by name."""
        found = self.client.key_value_dir_get(BOARD)
        return {name.removeprefix(BOARD): value for name, value in found}

    def why(self, board: dict[str, str]) -> "End | None":
        """Why this process must end, None if it need not."""
        for name, value in sorted(board.items()):
            if name.startswith("ended/"):
                status, _, text = value.partition(" ")
                return End(int(status), f"process {name.removeprefix('ended/')} ended: {text}")
        now = time.monotonic()
        for process in range(self.processes):
            beat = board.get(f"beat/{process}", "")
            before, since = self.seen.setdefault(f"beat/{process}", (beat, now))
            if beat != before:
                self.seen[f"beat/{process}"] = beat, now
            elif now - since > LOST:
                lost = f"process {process} of {self.processes} is lost. {GO_ON}"
                return End(TRY_AGAIN, lost)
        return None

    def fail(self, error: BaseException) -> NoReturn:
        """Tells the others why this process ends, and ends it."""
        self.over.set()
        status = TRY_AGAIN if lost(error) else REFUSED
        with contextlib.suppress(RuntimeError):
            self.put(f"ended/{self.process}", f"{status} {message(error)}")
        self.end(status)

    def end(self, status: int) -> NoReturn:
        """Ends this process at once: JAX's own farewell waits for processes that are gone.

        Process 0 holds the board, so it stays until the others have read it.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        until = time.monotonic() + HEARD
        with contextlib.suppress(RuntimeError):
            self.put(f"heard/{self.process}", "")
            while self.process == 0 and time.monotonic() < until:
                there = self.board()
                if all(f"heard/{each}" in there for each in range(self.processes)):
                    break
                time.sleep(BEAT / 4)
        os._exit(status)

    def part(self) -> None:
        """Returns when every process has come to its good end."""
        self.client.wait_at_barrier(f"{BOARD}done", PATIENCE * 1000)
        self.over.set()
        self.join()


@contextlib.contextmanager
def joined(told: Meeting | None, command: str):
    """One of several processes for a while, from their meeting to their common end.

    What goes wrong in one ends all, each with one message. A process alone is left as it is.
    """
    if told is None:
        yield
        return
    join(told, command)
    watch = Watch(command, compat.distributed_state())
    watch.start()
    try:
        yield
        watch.part()
    except BaseException as error:
        if isinstance(error, (ValueError, OSError)) or lost(error):
            print(f"{command}: {message(error)}", file=sys.stderr)
        else:
            traceback.print_exc()
        watch.fail(error)
    import jax

    jax.distributed.shutdown()


def several() -> bool:
    return compat.distributed_state().client is not None


def stop_after(step: int) -> bool:
    """Whether all processes are to end after this step, because one got SIGTERM; to be asked by
    each after every step."""
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return compat.distributed_state().process_id == 0


def everyone(text: str) -> list[str]:
    """What each process says here; all of them must ask."""
    state = compat.distributed_state()
    if state.client is None:
        return [text]
    talk = f"{TALK}{next(talks)}"
    state.client.key_value_set(f"{talk}/{state.process_id}", text)
    state.client.wait_at_barrier(talk, PATIENCE * 1000)
    said = dict(state.client.key_value_dir_get(f"{talk}/"))
    return [said[f"{talk}/{process}"] for process in range(state.num_processes)]


def from_first(text: str) -> str:
    """What process 0 says here; all of them must ask."""
    return everyone(text)[0]


def wait() -> None:
    """Returns when every process has come here."""
    everyone("")


def agree(what: str, text: str) -> None:
    """Returns where all processes have the same.

    Raises:
      ProcessesError: they differ, with the processes that differ from the first.
    """
    said = everyone(text)
    others = [process for process, each in enumerate(said) if each != said[0]]
    if others:
        named = ", ".join(map(str, others[:8]))
        raise ProcessesError(
            f"{what} of process {named} differ from those of process 0: give every process the "
            "same command, the same files and the same versions"
        )


def lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    return any(sign in str(error) for sign in SIGNS_OF_LOSS)


def message(error: BaseException) -> str:
    """What is told of an error."""
    if not lost(error):
        return str(error) or type(error).__name__
    return f"another process was lost ({first_line(error)}). {GO_ON}"


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
