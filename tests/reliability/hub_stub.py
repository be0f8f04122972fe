"""A hub on the loopback that serves one model folder, and lets one be pushed to, badly where it is asked to."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

COMMIT = "0" * 39 + "1"


class Hub(ThreadingHTTPServer):
    """`fault` is one of "", 503, hang (no answer) or cut (half of a large file); it lasts for `times` requests of each path.

    A repository can be created here, and everything that is sent to it is refused; "gone" is 503 after `times` requests of a path.
    """

    daemon_threads = True

    def __init__(self, model: Path, fault: str, times: int) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.model, self.fault, self.times, self.asked = model, fault, times, Counter[str]()
        self.tokens: set[str | None] = set()

    @property
    def address(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class Request(BaseHTTPRequestHandler):
    """The few requests that the hub's client makes for a download."""

    server: Hub

    def do_HEAD(self) -> None:
        """Headers alone."""
        self.do_GET()

    def do_POST(self) -> None:
        """A repository is created; nothing can be put into it."""
        self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.server.asked[self.path] += 1
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            self.give(200, json.dumps({"url": f"{self.server.address}/someone/mine"}).encode())
        elif self.path == "/api/validate-yaml":
            self.give(200, b"{}")
        else:
            self.give(403, b"no room")

    def do_GET(self) -> None:
        """A list of the model's files, or one of them."""
        path = unquote(self.path.partition("?")[0])
        hub = self.server
        hub.asked[path] += 1
        is_bad = (hub.asked[path] <= hub.times) is (hub.fault != "gone")
        if is_bad and hub.fault in ("503", "gone"):
            return self.give(503, b"busy")
        if is_bad and hub.fault == "hang":
            time.sleep(60)
            return None
        if path.startswith("/api/models/"):
            files = {p.relative_to(hub.model).as_posix(): p for p in sorted(hub.model.rglob("*")) if p.is_file()}
            if "/tree/" in path:
                tree = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": COMMIT} for n, p in files.items()]
                return self.give(200, json.dumps(tree).encode())
            facts = {
                "id": "someone/model",
                "sha": COMMIT,
                "siblings": [{"rfilename": name} for name in files],
                "tags": [],
                "private": False,
            }
            return self.give(200, json.dumps(facts).encode())
        file = hub.model / path.partition("/resolve/")[2].partition("/")[2]
        if not file.is_file():
            return self.give(404, b"", {"X-Error-Code": "EntryNotFound"})
        body = file.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").partition("=")[2].partition("-")[0])
        cut = len(body) // 2 if is_bad and hub.fault == "cut" and self.command == "GET" and len(body) > 10_000 else None
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.give(206 if start else 200, body[start:], headers, cut)

    def give(self, code: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        """An answer; `cut` breaks it off after so many bytes."""
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""


@contextmanager
def serving(model: Path, fault: str = "", times: int = 0) -> Iterator[Hub]:
    """A running hub."""
    hub = Hub(model, fault, times)
    Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
