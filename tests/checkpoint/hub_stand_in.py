"""A small stand-in of the hub's HTTP API: repositories, commits and files, in memory."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_writes"
Files = dict[str, bytes]


@dataclass
class Hub:
    """What the stand-in holds, and what it was asked.

    Attributes:
        endpoint: its URL.
        branches: repository → branch → its commits, oldest first.
        asked: method and path of each request.
    """

    endpoint: str = ""
    branches: dict[str, dict[str, list[Files]]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def files(self, name: str, branch: str = "main") -> Files:
        """The files at a branch's newest commit."""
        return self.branches[name][branch][-1]

    def commit(self, name: str, revision: str) -> tuple[str, Files] | None:
        """A commit by branch or id: its id and its files."""
        for branch, commits in self.branches[name].items():
            for files in reversed(commits):
                found = _commit_id(files)
                if revision in (branch, found):
                    return found, files
        return None


def _commit_id(files: Files) -> str:
    digest = hashlib.sha1()
    for name, content in sorted(files.items()):
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Run the stand-in on a free port."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.state.asked.append(f"{self.command} {'/'.join(path)}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if path == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if path[:2] == ["api", "models"]:
            return self._api("/".join(path[2:4]), path[4:], body)
        if path[2:3] != ["resolve"]:
            return self._missing("EntryNotFound")
        return self._file("/".join(path[:2]), path[3], "/".join(path[4:]))

    def _writes(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._json({"error": "Invalid credentials"}, status=401)
        return False

    def _create(self, asked: dict[str, Any]) -> None:
        if not self._writes():
            return
        name = f"{asked['organization']}/{asked['name']}"
        status = 409 if name in self.state.branches else 200
        self.state.branches.setdefault(name, {"main": [{".gitattributes": b"of the hub"}]})
        self._json({"url": f"{self.state.endpoint}/{name}"}, status=status)

    def _api(self, name: str, rest: list[str], body: bytes) -> None:
        if name not in self.state.branches:
            return self._missing("RepoNotFound")
        verb, revision = rest if len(rest) > 1 else ("revision", "main")
        if verb == "branch" and self._writes():
            branches = self.state.branches[name]
            status = 409 if revision in branches else 200
            branches.setdefault(revision, [branches["main"][-1]])
            return self._json({}, status=status)
        found = self.state.commit(name, revision)
        if found is None:
            return self._missing("RevisionNotFound")
        commit, files = found
        if verb == "tree":
            return self._json(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
                    for path, content in files.items()
                ]
            )
        if verb == "preupload":
            return self._json(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for file in json.loads(body)["files"]
                    ]
                }
            )
        if verb == "commit" and self._writes():
            return self._commit(name, revision, [json.loads(line) for line in body.splitlines()])
        return self._json(
            {
                "id": name,
                "sha": commit,
                "private": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [{"rfilename": path} for path in files],
            }
        )

    def _commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.state.files(name, branch))
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        self.state.branches[name][branch].append(files)
        commit = _commit_id(files)
        url = f"{self.state.endpoint}/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url})

    def _file(self, name: str, revision: str, path: str) -> None:
        found = self.state.commit(name, revision)
        if found is None or path not in found[1]:
            return self._missing("EntryNotFound")
        commit, files = found
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(files[path])}"'}
        return self._send(files[path], headers=headers)

    def _missing(self, code: str) -> None:
        self._send(b"{}", status=404, headers={"X-Error-Code": code})

    def _json(self, content: Any, *, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), status=status)

    def _send(
        self, content: bytes, *, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    """Git's id of a blob."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
