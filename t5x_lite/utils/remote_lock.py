# SPDX-License-Identifier: Apache-2.0
"""Lock of a folder in a bucket, held by one process at a time.

A store has no locks that end with their process, but it creates an object for one of several
writers only. So the holder owns the object of the highest number, FOLDER/.lock/00000003, which it
writes anew every RENEW_SECONDS. Who comes next waits until that object is released, or has not
changed for LEASE_SECONDS, then creates the next number. Clocks of machines are not compared.
"""

import json
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from t5x_lite.utils.remote_paths import RemotePath

LOCK = ".lock"
RENEW_SECONDS, LEASE_SECONDS, POLL_SECONDS = 10.0, 60.0, 0.5


class LockedError(ValueError):
    """Another process holds the lock, or has taken it over; its name is the message."""


def process_identity() -> dict[str, Any]:
    """Facts that tell a process on this machine from all others: after a reboot, or in another
    container, its number may be that of another process."""
    return {
        "host": os.uname().nodename,
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "namespace": os.readlink("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "started": process_start(os.getpid()),
    }


def process_start(pid: int) -> str | None:
    """Time at which a process started, in ticks since the machine did; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def has_ended(identity: dict[str, Any]) -> bool:
    """True for a process of this machine that is there no more; false where it cannot be known."""
    here = process_identity()
    same = all(identity.get(name) == here[name] for name in ("host", "boot", "namespace"))
    return same and process_start(identity["pid"]) != identity["started"]


class RemoteLock:
    """The lock of one folder, acquired by `acquire`; a thread renews it while it is held."""

    def __init__(self, folder: RemotePath):
        self.folder = folder / LOCK
        self.content: dict[str, Any] = {
            "owner": f"process {os.getpid()} on {os.uname().nodename}",
            "process": process_identity(),
            "id": uuid.uuid4().hex,
            "renewals": 0,
            "released": False,
        }
        self.path: RemotePath | None = None
        self.successor: str | None = None
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.renew, daemon=True, name="lock of MODEL_DIR")

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
          LockedError: another process holds it.
        """
        newest = newest_object(self.folder)
        if newest is not None:
            wait_for_end(newest)
        number = 1 if newest is None else int(newest.name) + 1
        path = self.folder / f"{number:08d}"
        try:
            path.create(self.encode())
        except FileExistsError:
            raise LockedError(read_content(path).get("owner", "unknown")) from None
        # A process that slept for long may have created a number that was in use and removed.
        if (now := newest_object(self.folder)) not in (None, path):
            path.unlink(missing_ok=True)
            raise LockedError(read_content(now).get("owner", "unknown"))
        self.path = path
        for old in list_objects(self.folder)[:-1]:
            old.unlink(missing_ok=True)
        self.thread.start()

    def close(self) -> None:
        """Releases the lock."""
        self.ended.set()
        self.thread.join()
        if self.successor is None:
            self.write(released=True)

    def encode(self) -> bytes:
        return json.dumps(self.content).encode()

    def write(self, **fields: Any) -> None:
        """Writes the object anew, with changed fields; without an answer of the store, it stays as
        it is, and runs out."""
        self.content |= fields
        try:
            if self.path is not None:
                self.path.write_bytes(self.encode())
        except OSError:
            return

    def renew(self) -> None:
        """Work of the thread."""
        while not self.ended.wait(RENEW_SECONDS):
            self.write(renewals=self.content["renewals"] + 1)
            try:
                newest = newest_object(self.folder)
                if newest not in (None, self.path):
                    self.successor = read_content(newest).get("owner", "unknown")
                    return
            except OSError:
                continue

    def check(self) -> None:
        """Raises LockedError if another process has taken the lock over, as it may where this one
        or the store did not answer for LEASE_SECONDS."""
        if self.successor is not None:
            raise LockedError(self.successor)


def list_objects(folder: RemotePath) -> list[RemotePath]:
    """The numbered objects of a lock, ascending."""
    try:
        return sorted(path for path in folder.iterdir() if path.name.isdecimal())
    except FileNotFoundError:
        return []


def newest_object(folder: RemotePath) -> RemotePath | None:
    """The object of the highest number; None if nobody has held the lock."""
    return next(reversed(list_objects(folder)), None)


def read_content(path: RemotePath | None) -> dict[str, Any]:
    """The content of an object of a lock; {} if it is gone or broken."""
    try:
        content = json.loads(path.read_bytes()) if path is not None else {}
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def wait_for_end(path: RemotePath) -> None:
    """Returns once the holder of an object has released it or has ended.

    Raises:
      LockedError: it renews its lock.
    """
    before = read_content(path)
    until = time.monotonic() + LEASE_SECONDS
    while time.monotonic() < until:
        if not before or before["released"] or has_ended(before["process"]):
            return
        time.sleep(POLL_SECONDS)
        now = read_content(path)
        if now != before and now.get("id") == before["id"] and not now["released"]:
            raise LockedError(now["owner"])
        before = now


def read_owner(folder: RemotePath) -> str:
    """Text that names the process holding the lock, the same at every renewal; "" for none."""
    content = read_content(newest_object(folder / LOCK))
    return f"{content.get('owner', '')} {content.get('id', '')}".strip()
