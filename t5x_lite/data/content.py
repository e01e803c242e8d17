# SPDX-License-Identifier: Apache-2.0
"""Identity of files by their content: not by name, owner, or any time.

A file of up to SMALL bytes is read whenever its digest is needed. The digest of a larger one is
remembered in the cache folder, under all that the file system records of it: size, times of change
of content and of metadata, and inode. A copy of the same size and time has another inode or another
time of change of metadata, which no program sets, so it is read again; and where only these differ,
the digest is the same.
"""

import functools
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.paths import is_address, parse_path

log = logging.getLogger(__name__)

REMEMBERED = "file_digests.json"
SMALL = 2**20
HEXADECIMAL = re.compile("[0-9a-f]{64}")
# Bytes of a digest.
DIGEST = hashlib.sha256().digest_size
# A file that changed this recently may change again without another time stamp.
SETTLED_NS = 2_000_000_000
# A sample of a file is at most BLOCKS blocks, spread evenly over it, and at least two; of all files
# together, at most SAMPLED blocks beyond these: each may be a request to a store far away.
BLOCK, BLOCKS, SAMPLED = 2**16, 16, 2**12
READERS = 32


def file_stamps(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Size in bytes and time of change in ns of files, by their paths."""
    stats = {str(path): path.stat() for path in paths}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


def file_state(path: str | Path) -> list[int]:
    """Everything that the file system records of a change: equal states are equal content."""
    stat = parse_path(path).stat()
    if is_address(path):
        return [stat.st_size, stat.st_mtime_ns]
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


def whole_digest(path: str) -> str:
    """Digest of all bytes of a file."""
    with parse_path(path).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def sampled_digest(path: str, blocks: int = BLOCKS) -> str:
    """Digest of the size of a file and of blocks of it, all of a file that is not larger."""
    with parse_path(path).open("rb") as content:
        size = content.seek(0, 2)
        digest = hashlib.sha256(str(size).encode())
        for number in range(blocks):
            content.seek(max(0, size - BLOCK) * number // (blocks - 1))
            digest.update(content.read(BLOCK))
    return digest.hexdigest()


def digest_files(
    paths: Iterable[Path], cache_dir: Path | None = None, sampled: bool = False
) -> dict[str, str]:
    """Digests of the content of files, by their paths, in the order of `paths`.

    Args:
      paths: the files.
      cache_dir: folder that remembers digests of large files; None remembers none.
      sampled: true to read a sample of each file instead, for sources too large to read whole.

    Raises:
      OSError: a file cannot be read.
    """
    names = [str(path) for path in paths]
    if sampled:
        blocks = max(2, min(BLOCKS, SAMPLED // max(1, len(names))))
        return read_all(names, functools.partial(sampled_digest, blocks=blocks))
    memory = None if cache_dir is None else cache_dir / REMEMBERED
    known = {} if memory is None else read_remembered(memory)
    states = {name: file_state(name) for name in names}
    remembered = {
        name: known[name][-1]
        for name, state in states.items()
        if state[0] > SMALL and known.get(name, [None])[:-1] == state
    }
    fresh = read_all([name for name in names if name not in remembered], whole_digest)
    settled = time.time_ns() - SETTLED_NS
    worth = {
        name: [*states[name], digest]
        for name, digest in fresh.items()
        if states[name][0] > SMALL
        and max(states[name][1:3]) < settled
        and file_state(name) == states[name]
    }
    if memory is not None and worth:
        remember(memory, worth)
    return {name: remembered.get(name) or fresh[name] for name in names}


def read_all(names: list[str], digest: Callable[[str], str]) -> dict[str, str]:
    """Digests of files, several at a time."""
    with ThreadPoolExecutor(READERS) as readers:
        return dict(zip(names, readers.map(digest, names), strict=True))


def read_remembered(memory: Path) -> dict[str, list]:
    """Remembered states and digests by path; {} if there are none that can be read."""
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {path: each for path, each in known.items() if is_record(each)}


def is_record(value: Any) -> bool:
    """True for a state and a digest, as `digest_files` remembers them."""
    digest = value[-1] if isinstance(value, list) and value else None
    return isinstance(digest, str) and HEXADECIMAL.fullmatch(digest) is not None


def write_checked(path: Path, content: bytes) -> None:
    """Writes a file of a cache, its digest before its content."""
    write_atomically(path, hashlib.sha256(content).digest() + content)


def read_checked(path: Path) -> bytes | None:
    """The content that `write_checked` wrote; None if there is none, or it is damaged.

    A damaged file is reported: what it held is made again.
    """
    try:
        written = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error}): delete it, or bind another Data.cache_dir"
        ) from error
    digest, content = written[:DIGEST], written[DIGEST:]
    if hashlib.sha256(content).digest() == digest:
        return content
    log.warning("%s is damaged: it is written again", path)
    return None


def remember(memory: Path, digests: dict[str, list]) -> None:
    """Adds states and digests; a folder that cannot be written remembers nothing."""
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, json.dumps(read_remembered(memory) | digests) + "\n")
    except OSError:
        pass


def describe_changes(before: dict, now: dict) -> str:
    """Text of the changes of files between two records by path; "" where nothing changed.

    Records of different kinds (those of earlier versions) are not compared.
    """
    both = [path for path in before.keys() & now if type(before[path]) is type(now[path])]
    lines = [f"{path} is gone" for path in before.keys() - now.keys()]
    lines += [f"{path} is new" for path in now.keys() - before.keys()]
    lines += [f"{path} has changed" for path in both if before[path] != now[path]]
    return ", ".join(sorted(lines)[:4])
