"""A stand-in for the Hugging Face hub on this machine: the few routes that fetching a model asks for."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubState:
    """What the hub has, how it misbehaves, and what it was asked."""

    repositories: dict[str, Path]  # by name
    token: str | None = None  # asked for, if set
    is_gated: bool = False
    broken: set[str] = field(default_factory=set)  # file names that answer 500
    cut_once: set[str] = field(default_factory=set)  # file names whose first download breaks off half-way
    wrong_checksum: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, range

    def downloads(self, name: str) -> list[str | None]:
        """The `Range` of every GET of a file."""
        return [part for method, path, part in self.requests if method == "GET" and path.endswith(f"/{name}")]


def entry(path: Path, root: Path, state: HubState) -> dict[str, object]:
    """A file as the hub's tree lists it; weights are kept in LFS."""
    data = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    listed: dict[str, object] = {"type": "file", "path": str(path.relative_to(root)), "size": len(data), "oid": blob}
    if path.suffix in (".safetensors", ".gguf"):
        listed["lfs"] = {"oid": checksum(path, state), "size": len(data), "pointerSize": 134}
    return listed


def checksum(path: Path, state: HubState) -> str:
    return hashlib.sha256(path.read_bytes() + (b"!" if path.name in state.wrong_checksum else b"")).hexdigest()


class Handler(BaseHTTPRequestHandler):
    state: HubState

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        root = self.state.repositories.get(name)
        if root is None:
            return self._error(404, "RepoNotFound", "Repository not found")
        if self.state.is_gated:
            return self._error(403, "GatedRepo", "Access to this repository is restricted")
        if self.state.token is not None and self.headers.get("Authorization") != f"Bearer {self.state.token}":
            return self._error(401, "RepoNotFound", "Invalid username or password.")
        if parts[0] == "api":
            return self._describe(name, root, parts[4:])
        if parts[3] not in ("main", COMMIT):
            return self._error(404, "RevisionNotFound", "Revision not found")
        return self._send_file(root / "/".join(parts[4:]), with_body)

    def _describe(self, name: str, root: Path, rest: list[str]) -> None:
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return self._error(404, "RevisionNotFound", "Revision not found")
        files = sorted(path for path in root.rglob("*") if path.is_file())
        if rest[:1] == ["tree"]:
            return self._send_json([entry(path, root, self.state) for path in files])
        siblings = [{"rfilename": str(path.relative_to(root))} for path in files]
        return self._send_json({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False})

    def _send_file(self, path: Path, with_body: bool) -> None:
        if not path.is_file():
            return self._error(404, "EntryNotFound", "Entry not found")
        if path.name in self.state.broken:
            return self._error(500, "Internal", "Something broke")
        data = path.read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        listed = entry(path, path.parent, self.state)
        etag = checksum(path, self.state) if "lfs" in listed else str(listed["oid"])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if not with_body:
            return None
        if path.name in self.state.cut_once:
            self.state.cut_once.discard(path.name)
            self.wfile.write(data[start : start + len(data) // 2])
            self.wfile.flush()
            self.connection.close()
            return None
        self.wfile.write(data[start:])
        return None

    def _send_json(self, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _error(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def hub(state: HubState) -> Iterator[str]:
    """Run the stand-in; yields its address."""
    handler = type("BoundHandler", (Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
