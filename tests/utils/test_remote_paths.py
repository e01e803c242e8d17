# SPDX-License-Identifier: Apache-2.0
"""Laws of addresses in stores: they do what paths of a disk do, as long as a store can."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from t5x_lite.utils import remote_lock
from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.paths import parse_path
from t5x_lite.utils.remote_lock import LockedError, RemoteLock
from t5x_lite.utils.remote_paths import RemotePath
from t5x_lite.utils.remote_streams import upload_stream


@pytest.mark.parametrize("kind", ["address", "disk"])
def test_an_address_does_what_a_path_of_a_disk_does(store, tmp_path, kind):
    root = parse_path(store.address("paths") if kind == "address" else str(tmp_path / "paths"))
    folder = root / "a [1]" / "b"
    assert not root.exists() and not folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("x.txt", "äx\ny\n"), ("y.json", "{}")):
        write_atomically(folder / name, text)
        (folder / name).write_text(text, encoding="utf-8")
    assert folder.is_dir() and root.exists() and not folder.is_file()
    assert (folder / "x.txt").is_file() and not (folder / "z").exists()
    assert (folder / "x.txt").stat().st_size == len("äx\ny\n".encode())
    assert sorted(path.name for path in folder.iterdir()) == ["x.txt", "y.json"]
    assert [path.name for path in (root / "a [1]").glob("*/*.txt")] == ["x.txt"]
    assert (folder / "x.txt").read_text(encoding="utf-8") == "äx\ny\n"
    with (folder / "x.txt").open(encoding="utf-8") as lines:
        assert list(lines) == ["äx\n", "y\n"]
    with (folder / "x.txt").open("rb") as content:
        assert content.seek(2) == 2 and content.read(3) == b"x\ny" and content.peek(1)
    with (folder / "x.txt").open("a", encoding="utf-8") as lines:
        lines.write("z\n")
    with (folder / "new").open("wb") as content:
        content.write(b"123")
    assert (folder / "x.txt").read_bytes() == "äx\ny\nz\n".encode()
    assert (folder / "new").read_bytes() == b"123"
    (folder / "new").unlink()
    moved = folder.rename(root / "c")
    assert sorted(path.name for path in moved.iterdir()) == ["x.txt", "y.json"]
    assert not folder.exists() or not list(folder.iterdir())
    with pytest.raises(FileNotFoundError):
        (root / "nothing").read_bytes()
    with pytest.raises(FileNotFoundError):
        list((root / "nothing").iterdir())


def test_a_tree_is_removed_by_two_at_once(store, monkeypatch):
    tree, other = (RemotePath(store.address("doomed")) for _ in range(2))
    for number in range(3):
        (tree / f"{number}").write_text("text")
    listed = tree.list_files()
    (tree / "1").unlink()
    answers = [listed]
    monkeypatch.setattr(
        type(tree),
        "list_files",
        lambda self: answers.pop() if answers else dict.fromkeys(self.list_statuses(), 0),
    )
    tree.remove_tree()
    assert not tree.exists()
    other.remove_tree()


def test_names_of_an_address_are_those_of_a_path():
    path = RemotePath("s3://bucket/runs/a.b")
    assert str(path) == os.fspath(path) == "s3://bucket/runs/a.b" == f"{path}"
    assert path.name == "a.b" and path.suffix == ".b" and path.stem == "a"
    assert path.parent / "c" == RemotePath("s3://bucket/runs/c") == path.with_name("c")
    assert str(path.relative_to("s3:/bucket")) == "runs/a.b"
    assert parse_path("S3://bucket/runs/") == path.parent


def test_an_object_is_created_by_one_of_many(store):
    path, winners = parse_path(store.address("created/by/one")), []

    def create(number: int) -> None:
        try:
            path.create(str(number).encode())
            winners.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(each).encode() for each in winners] == [path.read_bytes()]


def test_a_growing_file_is_uploaded_now_and_then_and_as_a_whole(store):
    path = parse_path(store.address("grown/lines.txt"))
    with path.open("a", buffering=1, encoding="utf-8") as lines:
        for number in range(100):
            lines.write(f"{number}\n")
        uploads = [each for each in store.requests if each[0] in ("PUT", "POST")]
        upload_stream(lines)
        assert path.read_text().splitlines() == [str(number) for number in range(100)]
    sent = [each for each in store.requests if each[0] in ("PUT", "POST")]
    assert len(sent) - len(uploads) <= 1
    with path.open("a") as lines:
        lines.write("more\n")
    assert path.read_text().splitlines()[-2:] == ["99", "more"]


def test_a_range_is_read_without_the_rest(store):
    path = parse_path(store.address("ranges/large"))
    path.write_bytes(bytes(range(256)) * 2**16)
    before = store.body_bytes
    assert path.read_range(2**20 + 1, 2**20 + 4) == bytes([1, 2, 3])
    with path.open("rb") as content:
        content.seek(-2, os.SEEK_END)
        assert content.read() == bytes([254, 255])
    assert store.body_bytes - before < 2**16


def test_a_lock_has_one_holder_and_is_free_after_it(store, monkeypatch):
    monkeypatch.setattr(remote_lock, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(remote_lock, "POLL_SECONDS", 0.1)
    folder = parse_path(store.address("locked"))
    for _ in range(3):
        owner, second = RemoteLock(folder), RemoteLock(folder)
        owner.acquire()
        with pytest.raises(LockedError, match=f"process {os.getpid()} on "):
            second.acquire()
        owner.check()
        owner.close()
    assert len(store.names("locked/.lock")) == 1


def test_the_lock_of_a_killed_process_is_taken_at_once(store):
    folder = store.address("killed")
    code = (
        "import os, signal, sys\n"
        "from t5x_lite.utils.paths import parse_path\n"
        "from t5x_lite.utils.remote_lock import RemoteLock\n"
        "RemoteLock(parse_path(sys.argv[1])).acquire()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, folder], timeout=60)
    assert store.names("killed/.lock") == ["00000001"]
    lock = RemoteLock(parse_path(folder))
    lock.acquire()
    assert store.names("killed/.lock") == ["00000002"]
    lock.close()


def test_a_lock_that_is_not_renewed_is_taken_and_its_holder_notices(store, monkeypatch):
    monkeypatch.setattr(remote_lock, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(remote_lock, "RENEW_SECONDS", 0.3)
    monkeypatch.setattr(remote_lock, "POLL_SECONDS", 0.1)
    folder = parse_path(store.address("asleep"))
    sleeper, other = RemoteLock(folder), RemoteLock(folder)
    sleeper.acquire()
    sleeper.check()
    # Its machine does not answer: nothing is written, and no process is seen.
    monkeypatch.setattr(sleeper, "write", lambda **fields: None)
    other.acquire()
    sleeper.thread.join(timeout=300)
    with pytest.raises(LockedError):
        sleeper.check()
    other.check()
    sleeper.close()
    other.close()
    assert json.loads((folder / ".lock" / "00000002").read_bytes())["released"]


@pytest.mark.parametrize("failure", ["503", "reset"])
def test_a_request_that_fails_is_tried_again(store, failure):
    path, left = parse_path(store.address(f"retried/{failure}")), [2]

    def fails(method: str, address: str) -> str:
        if "retried" not in address or not left[0]:
            return ""
        left[0] -= 1
        return failure

    path.write_bytes(b"once")
    with store.failing(fails):
        assert path.read_bytes() == b"once"
    assert left == [0]


def test_a_store_that_does_not_answer_is_an_error_of_the_system(store):
    path = parse_path(store.address("dead/x"))
    with store.failing(lambda method, address: "403"):
        with pytest.raises(OSError) as raised:
            path.write_bytes(b"x")
    assert "Traceback" not in str(raised.value)


def test_a_local_path_loads_no_library_of_a_store():
    code = (
        "import sys\n"
        "from t5x_lite.utils import paths\n"
        "import t5x_lite.training.loop, t5x_lite.checkpoints.opening\n"
        "paths.parse_path('runs/x'); paths.path_argument('y')\n"
        "print([m for m in ('s3fs', 'gcsfs', 'boto3', 'botocore', 'aiobotocore', 'google.cloud')"
        " if m in sys.modules])\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.stdout.strip() == "[]", output.stderr


def test_a_disk_is_downloaded_to_and_uploaded_from(store, tmp_path):
    for name in ("a", "b/c", "last"):
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_text(name)
    path: RemotePath = parse_path(store.address("copied"))
    path.upload(tmp_path / "from", last=["a"])
    times = {each.name: each.stat().st_mtime for each in path.list_files()}
    assert store.names("copied") == ["a", "b/c", "last"] and times["a"] == max(times.values())
    path.download(tmp_path / "to")
    assert (tmp_path / "to" / "b" / "c").read_text() == "b/c"
    (path / "b/c").download(tmp_path / "file")
    assert [each.name for each in Path(tmp_path / "file").iterdir()] == ["c"]
