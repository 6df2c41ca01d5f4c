"""A registry of images in memory, as much of its protocol as an engine needs to push and pull. It can be busy."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Registry:
    """What lies in it, and the requests for manifests that it turns down before it answers."""

    address: str = ""
    busy: int = 0
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)  # name:tag or name@digest -> type, bytes
    blobs: dict[str, bytes] = field(default_factory=dict)


@contextlib.contextmanager
def running() -> Iterator[Registry]:
    registry = Registry()

    class Handler(_Handler):
        shelf = registry

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    registry.address = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield registry
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shelf: Registry

    def log_message(self, *words):
        pass

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path == "/v2/":
            return self._answer(200)
        name, kind, key = path.removeprefix("/v2/").rsplit("/", 2)
        if kind == "blobs":
            data = self.shelf.blobs.get(key)
            found = None if data is None else ("application/octet-stream", data)
        else:
            if self.shelf.busy:
                self.shelf.busy -= 1
                return self._answer(429, b'{"errors": [{"code": "TOOMANYREQUESTS", "message": "slow down"}]}')
            found = self.shelf.manifests.get(f"{name}{'@' if key.startswith('sha256:') else ':'}{key}")
        if found is None:
            return self._answer(404, b'{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}')
        return self._answer(200, found[1], **{"Content-Type": found[0], "Docker-Content-Digest": _digest(found[1])})

    do_HEAD = do_GET

    def do_POST(self):
        self._body()
        self._answer(202, Location=f"{self.path.partition('?')[0]}{uuid.uuid4().hex}")

    def do_PATCH(self):
        data = self.shelf.blobs[self.path] = self._body()
        self._answer(202, Location=self.path, Range=f"0-{len(data) - 1}")

    def do_PUT(self):
        data = self._body()
        path, _, query = self.path.partition("?")
        if "/manifests/" in path:
            name, _, key = path.removeprefix("/v2/").rpartition("/manifests/")
            for end in (f":{key}", f"@{_digest(data)}"):
                self.shelf.manifests[name + end] = (self.headers["Content-Type"], data)
        else:
            data = self.shelf.blobs.pop(path, b"") + data
            self.shelf.blobs[_digest(data)] = data
            assert _digest(data).removeprefix("sha256:") in query
        self._answer(201, **{"Docker-Content-Digest": _digest(data), "Location": path})

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, code: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Docker-Distribution-Api-Version": "registry/2.0", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
