# SPDX-License-Identifier: Apache-2.0
"""A small server on loopback that speaks the Hugging Face hub's protocol, for models and datasets.

    with HubServer() as hub:
        commit = hub.add("owner/name", {"config.json": b"{}"})
        hub.add("owner/rows", {"data.jsonl": b"..."}, kind="dataset")
        subprocess.run(command, env=os.environ | hub.environment(cache))

It has commits, branches and tags, listings, ranges, redirects of large files to a second host (as
the hub's CDN), gated and private repositories, commits with uploads, and faults on request.
"""

import base64
import collections
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hub_repositories import (
    LARGE,
    Content,
    Repository,
    blob_id,
    content_hash,
    content_size,
    describe,
    describe_repository,
    list_tree,
    read_part,
)

BLOCK = 2**16


class Served(NamedTuple):
    """A request (method, path, range, authorized) and its answer (status, size of the body)."""

    method: str
    path: str
    status: int
    size: int
    range: str | None
    authorized: bool


class Answer(NamedTuple):
    """A response: status, headers, and a body, in which a Path stands for a range of the file."""

    status: int
    body: Content = b""
    headers: Mapping[str, str] = {}


class HubServer:
    """The hub; `with` starts and stops it.

    Attributes:
      url: its address.
      cdn: address of the contents of large files.
      token: the one that opens gated and private repositories and may write.
      served: every request so far.
      cut_after: bytes after which a download of a path is cut, once for each number in the list.
      delay: seconds before each block of a download.
      down: every request is answered with status 503.
    """

    token = "hf_loopbackTokenOfTheTests"

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, Content] = {}
        self.served: list[Served] = []
        self.cut_after: dict[str, list[int]] = collections.defaultdict(list)
        self.delay, self.down = 0.0, False

    def __enter__(self) -> "HubServer":
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        vars(self.server)["hub"] = self
        port = self.server.server_address[1]
        self.url, self.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def environment(self, cache: Path, token: str | None = None) -> dict[str, str]:
        """Variables that make a process use this hub and a cache of its own; the proxies of the
        machine are left out."""
        settings = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", "no_proxy": "*"}
        return settings | ({"HF_TOKEN": token} if token else {})

    def use_here(
        self, monkeypatch: pytest.MonkeyPatch, cache: Path, token: str | None = None
    ) -> None:
        """Makes this process use this hub by monkeypatch, with a cache and a token."""
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        for name, value in self.environment(cache, token).items():
            monkeypatch.setenv(name, value)
        from huggingface_hub import constants, file_download

        values = {
            "ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HUGGINGFACE_HUB_CACHE": str(cache / "hub"),
            "HF_TOKEN_PATH": str(cache / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value, raising=False)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)

    def add(
        self,
        name: str,
        files: Mapping[str, Content] | Path,
        kind: str = "model",
        revision: str = "main",
        gated: bool = False,
        private: bool = False,
    ) -> str:
        """Commits files, which replace those of the branch; returns the commit.

        Args:
          name: "owner/name".
          files: contents by path, or a folder.
          kind: "model" or "dataset".
          revision: branch or tag that names the commit.
          gated: files need the token; listings do not.
          private: without the token it does not exist.
        """
        if isinstance(files, Path):
            every = (path for path in sorted(files.rglob("*")) if path.is_file())
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in every}
        repository = self.repositories.setdefault((kind, name), Repository(kind, gated, private))
        repository.gated, repository.private = gated, private
        listing = sorted((path, content_hash(content)) for path, content in files.items())
        number = len(repository.commits)
        commit = hashlib.sha1(json.dumps([name, kind, number, listing]).encode()).hexdigest()
        repository.commits[commit] = dict(files)
        repository.refs[revision] = commit
        repository.refs.setdefault("main", commit)
        return commit

    def files(self, name: str, kind: str = "model", revision: str = "main") -> dict[str, Content]:
        """Files of the repository of a name and kind at a revision, also those that were pushed."""
        repository = self.repositories[kind, name]
        return repository.commits[repository.refs.get(revision, revision)]

    def downloads(self, ending: str = "") -> list[Served]:
        """Requests for contents of files whose path has an ending."""
        return [
            each
            for each in self.served
            if each.method == "GET" and re.search(r"/resolve/|^/cdn/", each.path)
            if each.path.endswith(ending)
        ]

    def bytes_sent(self, ending: str = "") -> int:
        """Bytes of the bodies of `downloads`."""
        return sum(each.size for each in self.downloads(ending))


def refuse(status: int, code: str, message: str) -> Answer:
    """A refusal with a status, in the hub's form: a code and a message in the headers."""
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    return Answer(status, json.dumps({"error": message}).encode(), headers)


def send_json(value: Any) -> Answer:
    return Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers of the hub to one connection; `HubServer.served` is their log."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def hub(self) -> HubServer:
        return vars(self.server)["hub"]

    @property
    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def reply(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.route = urllib.parse.unquote(url.path)
        self.query = dict(urllib.parse.parse_qsl(url.query))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self.read_chunks()
        self.send(Answer(503, b"down") if self.hub.down else self.find_answer())

    do_GET = do_HEAD = do_POST = do_PUT = reply

    def read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def find_answer(self) -> Answer:
        """The answer by the path."""
        if match := re.fullmatch(r"/cdn/(\w+)/.*", self.route):
            return Answer(200, self.hub.objects[match[1]], {"ETag": f'"{match[1]}"'})
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/(.+)", self.route):
            return self.answer_file("dataset" if match[1] else "model", match[2], match[3])
        if self.route == "/api/repos/create":
            return self.create_repository()
        if self.route == "/api/validate-yaml":
            return send_json({"errors": [], "warnings": []})
        if self.route == "/api/whoami-v2":
            if not self.authorized:
                return refuse(401, "", "Invalid credentials in Authorization header")
            return send_json({"name": "tester", "type": "user", "auth": {"accessToken": {}}})
        if self.route.endswith(".git/info/lfs/objects/batch"):
            return self.answer_batch()
        if match := re.fullmatch(r"/upload/(\w+)", self.route):
            self.hub.objects[match[1]] = self.body
            return Answer(200)
        if match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(.+))?", self.route):
            return self.answer_api(match[1], match[2], match[3] or "")
        return refuse(404, "NotFound", "Sorry, we can't find the page you are looking for.")

    def find_repository(self, kind: str, name: str) -> Repository | Answer:
        repository = self.hub.repositories.get((kind, name))
        if repository is None or (repository.private and not self.authorized):
            status = 404 if self.authorized else 401
            return refuse(status, "RepoNotFound", "Repository not found")
        return repository

    def answer_file(self, kind: str, name: str, rest: str) -> Answer:
        """A file of a commit of a name and kind; `rest` is its revision and path."""
        repository = self.find_repository(kind, name)
        if isinstance(repository, Answer):
            return repository
        names = [*repository.refs, *repository.commits]
        revision = next((each for each in names if rest.startswith(each + "/")), None)
        if revision is None:
            return refuse(404, "RevisionNotFound", "Invalid rev id")
        if repository.gated and not self.authorized:
            status = 403 if self.headers.get("Authorization") else 401
            return refuse(status, "GatedRepo", f"Access to model {name} is restricted")
        commit = str(repository.commit_of(revision))
        path = rest[len(revision) + 1 :]
        content = repository.commits[commit].get(path)
        if content is None:
            return refuse(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not path.endswith(LARGE):
            return Answer(200, content, headers | {"ETag": f'"{blob_id(content)}"'})
        digest = content_hash(content)
        self.hub.objects[digest] = content
        headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(content_size(content))}
        headers["Location"] = f"{self.hub.cdn}/cdn/{digest}/{path}"
        return Answer(302, b"", headers)

    def answer_api(self, kind: str, name: str, rest: str) -> Answer:
        """Listings and commits of a name and kind; `rest` is what follows them."""
        repository = self.find_repository(kind, name)
        if isinstance(repository, Answer):
            return repository
        action, _, place = rest.partition("/")
        if action == "branch" and self.authorized:
            repository.refs.setdefault(place, repository.refs["main"])
            return send_json({})
        if action in ("commit", "preupload"):
            if not self.authorized:
                return refuse(401, "", "Invalid username or password.")
            push = {"commit": self.commit, "preupload": self.choose_uploads}[action]
            return push(repository, name, place)
        revisions = sorted([*repository.refs, *repository.commits], key=len, reverse=True)
        revision = next((r for r in revisions if (place + "/").startswith(r + "/")), None)
        if action and revision is None:
            return refuse(404, "RevisionNotFound", f"Invalid rev id: {place}")
        commit = str(repository.commit_of(revision or "main"))
        files = repository.commits[commit]
        if action in ("", "revision"):
            return send_json(describe_repository(repository, name, commit))
        if action == "tree":
            return send_json(list_tree(files, place[len(revision or "") + 1 :], self.query))
        if action == "paths-info":
            fields = urllib.parse.parse_qs(self.body.decode())
            return send_json([each for path in fields["paths"] for each in describe(files, path)])
        return refuse(404, "NotFound", "Not found")

    def create_repository(self) -> Answer:
        if not self.authorized:
            return refuse(401, "", "Invalid username or password.")
        wanted = json.loads(self.body)
        kind, owner = wanted.get("type") or "model", wanted.get("organization") or "tester"
        name = f"{owner}/{wanted['name']}"
        created = send_json({"url": f"{self.hub.url}/{name}", "name": name})
        if (kind, name) in self.hub.repositories:
            return created._replace(status=409)
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.hub.add(name, {".gitattributes": b""}, kind, private=private)
        return created

    def choose_uploads(self, *_: Any) -> Answer:
        paths = [each["path"] for each in json.loads(self.body)["files"]]
        modes = ["lfs" if path.endswith(LARGE) else "regular" for path in paths]
        both = zip(paths, modes, strict=True)
        listed = [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in both]
        return send_json({"files": listed})

    def answer_batch(self) -> Answer:
        objects = [
            each
            | (
                {}
                if each["oid"] in self.hub.objects
                else {"actions": {"upload": {"href": f"{self.hub.url}/upload/{each['oid']}"}}}
            )
            for each in json.loads(self.body)["objects"]
        ]
        return send_json({"transfer": "basic", "objects": objects})

    def commit(self, repository: Repository, name: str, place: str) -> Answer:
        """A commit on top of the branch `place` of a repository by name."""
        files = dict(repository.commits[repository.refs[place]])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.hub.add(
            name, files, repository.kind, place, repository.gated, repository.private
        )
        url = f"{self.hub.url}/{name}/commit/{commit}"
        return send_json({"success": True, "commitOid": commit, "commitUrl": url})

    def send(self, answer: Answer) -> None:
        """Sends an answer, in the range that the request names, cut where a test wants it."""
        size, status, headers = content_size(answer.body), answer.status, dict(answer.headers)
        begin, end = 0, size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted and status == 200:
            begin, end = int(wanted[1]), min(int(wanted[2] or size) + bool(wanted[2]), size)
            if begin >= size:
                status, begin, end = 416, 0, 0
                headers["Content-Range"] = f"bytes */{size}"
            else:
                status, headers["Content-Range"] = 206, f"bytes {begin}-{end - 1}/{size}"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        sent = self.send_body(answer.body, begin, end) if self.command != "HEAD" else 0
        request = self.command, self.route, status, sent
        self.hub.served.append(Served(*request, self.headers.get("Range"), self.authorized))

    def send_body(self, body: Content, begin: int, end: int) -> int:
        """Sends body from begin to end, returns how many bytes; a cut closes the connection."""
        cuts = next((cuts for path, cuts in self.hub.cut_after.items() if path in self.route), [])
        download = "/cdn/" in self.route or ("/resolve/" in self.route and begin < end)
        stop = min(end, begin + cuts.pop(0)) if cuts and download else end
        sent = 0
        while begin + sent < stop:
            time.sleep(self.hub.delay if download else 0)
            part = read_part(body, begin + sent, min(BLOCK, stop - begin - sent))
            try:
                self.wfile.write(part)
            except OSError:  # the reader has gone
                self.close_connection = True
                return sent
            sent += len(part)
        if stop < end:
            self.close_connection = True
        return sent
