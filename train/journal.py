"""Metrics by step in a file beside the checkpoints: the tracker may be away, this is not.

One JSON line a step, `{"step", "at", "metrics"}`, appended by rank 0 and synced before a checkpoint
is committed. Steps only rise. What a kill left of a line is cut off when the file is opened again.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_TAIL = 1 << 20  # bytes; no line is nearly as long


@dataclass(frozen=True)
class Entry:
    """One step's metrics, and when they were logged, in ms; `end` is where its line ends."""

    step: int
    at: int
    metrics: dict[str, float]
    end: int


class Journal:
    """The file at `path`, opened to be continued."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(0, size - _TAIL))
        tail = self._file.read()
        whole = tail.rpartition(b"\n")[0]
        self._file.truncate(size - len(tail) + (len(whole) + 1 if whole else 0))
        self.last = _entry(whole.rpartition(b"\n")[2], 0).step if whole else -1
        """The last step that it has; -1 where it is empty."""
        self._unwritten = b""
        self._lock = threading.Lock()

    def append(self, step: int, metrics: dict[str, float]) -> None:
        """Write down one step, later than all that are there.

        What a full disk does not take is kept, and `sync` fails, before the next checkpoint.
        """
        row = {"step": step, "at": int(time.time() * 1000), "metrics": metrics}
        with self._lock:
            self._unwritten += (json.dumps(row) + "\n").encode()
            with suppress(OSError):
                self._write()
        self.last = step

    def sync(self) -> None:
        """Have all of it on the disk; raises `OSError` where that cannot be."""
        with self._lock:
            self._write()
        os.fdatasync(self._file.fileno())

    def _write(self) -> None:
        while self._unwritten:
            taken = self._file.write(self._unwritten)
            self._unwritten = self._unwritten[taken:]

    def entries(self, start: int = 0) -> Iterator[Entry]:
        """What is written from byte `start` on; safe while another thread appends."""
        with self.path.open("rb") as file:
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                start += len(line)
                yield _entry(line, start)

    def close(self) -> None:
        self._file.close()


def _entry(line: bytes, end: int) -> Entry:
    row = json.loads(line)
    return Entry(row["step"], row["at"], row["metrics"], end)
