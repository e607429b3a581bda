"""A real HTTP server on loopback that fails on request. It serves a folder, or forwards to another server.

Whether a request fails depends only on what it asks for and how often that was asked for before. So a test meets the
same faults in every run, however its threads and processes are scheduled.
"""

from __future__ import annotations

import http.client
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

Script = Callable[[str, int], str | None]
"""Maps a path, and the number of earlier requests for the same part of it, to a fault or None."""
FAULTS = ("503", "429", "hang", "short", "cut", "wrong", "drip", "reset")


@dataclass(frozen=True)
class Request:
    """One request and its answer."""

    path: str
    range: str
    fault: str | None


def at_rate(rate: float, *kinds: str, seed: int = 0, at_most: int = 4) -> Script:
    """A script that fails requests with this probability, but at most `at_most` times for each part of a file."""

    def script(path: str, before: int) -> str | None:
        numbers = random.Random(f"{seed} {path} {before}")
        return numbers.choice(kinds) if before < at_most and numbers.random() < rate else None

    return script


def always(fault: str, pattern: str = "") -> Script:
    return lambda path, before: fault if re.search(pattern, path) else None


class FaultyServer:
    """Serves `source`, which is a folder or the URL of another server, until the block ends."""

    def __init__(self, source: Path | str, script: Script | None = None) -> None:
        self.source, self.script = source, script
        self.requests: list[Request] = []
        self.redirects: dict[str, str] = {}
        """Maps a path to the URL that a request for it is redirected to."""
        self.n_answers = 0
        self.done = threading.Event()
        self._asked: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultyServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self._server.shutdown()
        self._server.server_close()

    def choose(self, path: str, range_: str) -> str | None:
        """Count a request. Returns the fault that it gets, or None."""
        with self._lock:
            before = self._asked[path, range_]
            self._asked[path, range_] += 1
        fault = self.script(f"{path} {range_}", before) if self.script else None
        with self._lock:
            self.requests.append(Request(path, range_, fault))
        return fault

    def asked(self, pattern: str) -> list[Request]:
        """The requests so far whose path matches."""
        with self._lock:
            return [request for request in self.requests if re.search(pattern, request.path)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultyServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self._sent_on():
            return
        fault = self.owner.choose(urlsplit(self.path).path, self.headers.get("Range", ""))
        if self.owner.done.is_set():  # the request came over a connection that was kept open
            self._break()
        elif fault == "hang":
            self.owner.done.wait(60)
            self._break()
        elif fault == "reset":
            self._break()
        elif fault is not None and fault.isdecimal():
            extra = {"Retry-After": "1"} if fault == "429" else {}
            self._answer(int(fault), extra, b"<Error><Code>Injected</Code></Error>", None)
        else:
            self._answer(*self._content(b""), fault)

    def do_PUT(self) -> None:
        if self._sent_on():
            return
        self._answer(*self._content(self.rfile.read(int(self.headers.get("Content-Length", 0)))), None)

    do_HEAD = do_POST = do_DELETE = do_PUT

    def _sent_on(self) -> bool:
        target = self.owner.redirects.get(urlsplit(self.path).path)
        if target is not None:
            self._answer(302, {"Location": target}, b"", None)
        return target is not None

    def _content(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if isinstance(self.owner.source, Path):
            return self._from_folder(self.owner.source)
        connection = http.client.HTTPConnection(urlsplit(self.owner.source).netloc, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            skipped = ("transfer-encoding", "connection", "content-length")
            headers = {k: v for k, v in answer.getheaders() if k.lower() not in skipped}
            return answer.status, headers, answer.read()
        finally:
            connection.close()

    def _from_folder(self, folder: Path) -> tuple[int, dict[str, str], bytes]:
        name = re.sub(r"^/download/storage/v1/b/[^/]+/o/", "", urlsplit(self.path).path)  # Google's store
        path = folder / unquote(name).lstrip("/")
        if not path.is_file():
            return 404, {}, b"not here"
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not asked:
            return 200, {}, content
        start, end = int(asked[1]), min(int(asked[2]), len(content) - 1)
        if start > end:
            return 416, {}, b""
        return 206, {"Content-Range": f"bytes {start}-{end}/{len(content)}"}, content[start : end + 1]

    def _answer(self, status: int, headers: dict[str, str], body: bytes, fault: str | None) -> None:
        if fault == "wrong" and body:
            at = len(body) // 3
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        if fault == "short":  # with a Content-Length that matches
            body = body[: len(body) // 2]
        self.owner.n_answers += 1
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "cut":  # with the Content-Length of the whole
            self.wfile.write(body[: len(body) // 2])
            self._break()
        elif fault == "drip":
            step = max(len(body) // 10, 1)
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                time.sleep(0.02)
        elif self.command != "HEAD":
            self.wfile.write(body)

    def _break(self) -> None:
        """Close the connection with a reset."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
