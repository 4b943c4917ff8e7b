"""A web server on the loopback that serves a folder, and fails on demand."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FaultyServer(ThreadingHTTPServer):
    """Faults are taken from the front of `faults`, one per request for a tar.

    An int is an HTTP status; "stall" sends half of the body and then nothing; "cut" half, and
    closes; "drip" a byte at a time; "garbage" as many other bytes; "flat" ignores the range;
    "short" sends less of it than asked for.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path, host: str = "127.0.0.1", port: int = 0):
        super().__init__((host, port), _Handler)
        self.folder = folder
        self.faults: list[int | str] = []
        self.requests: list[tuple[str, str]] = []
        self.closing = threading.Event()

    def wait(self) -> None:
        """Called before every answer."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def tars(self) -> list[str]:
        """Paths of the tars asked for so far."""
        return [path for path, _ in self.requests if path.endswith(".tar")]


@contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    with FaultyServer(folder) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.closing.set()
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        asked = self.headers.get("Range", "")
        self.server.requests.append((path, asked))
        self.server.wait()
        fault = self.server.faults.pop(0) if path.endswith(".tar") and self.server.faults else ""
        file = self.server.folder / path.lstrip("/")
        if isinstance(fault, int) or not file.is_file():
            self._head(fault if isinstance(fault, int) else 404, 0)
            return
        data = file.read_bytes()
        status, told = 200, ""
        if asked and fault != "flat":
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            if first >= len(data):
                self._head(416, 0, f"bytes */{len(data)}")
                return
            last = min(last, len(data) - 1)
            last -= fault == "short"
            status, told = 206, f"bytes {first}-{last}/{len(data)}"
            data = data[first : last + 1]
        self._head(status, len(data), told)
        self._send(b"\xff" * len(data) if fault == "garbage" else data, fault)

    def _head(self, status: int, length: int, content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()

    def _send(self, data: bytes, fault: int | str) -> None:
        try:
            if fault == "drip":
                for byte in data:
                    if self.server.closing.is_set():
                        break
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(0.01)
            elif fault in ("stall", "cut"):
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                if fault == "stall":
                    self.server.closing.wait(60)
                self.close_connection = True
            else:
                self.wfile.write(data)
        except ConnectionError:
            self.close_connection = True
