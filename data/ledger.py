"""A ledger of training on the data: what was trained, and therefore where to go on.

A file of JSON lines: first the facts that fix the order, then one line per global step,
`{"epoch", "step", "keys"}`. Keys and position are one line, written by one call and flushed to the
disk, so that they hold together or not at all: a line cut short by a kill is no line.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO


class LedgerError(ValueError):
    """A ledger that cannot be continued; the message names the file."""


class Ledger:
    """A ledger opened for writing; `epoch` and `step` say what comes next."""

    def __init__(self, path: Path, facts: dict[str, Any], epoch: int = 0):
        """Open, or begin, the ledger at `path`.

        Raises `LedgerError` where it was begun with other `facts`, and names them.
        """
        self.epoch, self.step = epoch, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LedgerError(f"{path}: another process is writing it; let it end") from None
        first, last, size = _ends(self._file)
        self._file.truncate(size)  # half a line, from a kill in the middle of writing it
        if first is None:
            self._append(facts)
        elif (begun := _parse(first, path)) != facts:
            other = {k: begun.get(k) for k in facts if begun.get(k) != facts[k]}
            asked = {k: facts[k] for k in other}
            raise LedgerError(
                f"{path}: was begun with {other}, but now it is {asked}; give what it was begun "
                "with, or another file"
            )
        if last is not None:
            line = _parse(last, path)
            self.epoch, self.step = line["epoch"], line["step"] + 1

    def commit(self, keys: Sequence[str]) -> None:
        """Write down that the next step was trained, on `keys`; then the step after it is next."""
        self.extend([{"epoch": self.epoch, "step": self.step, "keys": list(keys)}])

    def extend(self, steps: Sequence[dict[str, Any]]) -> None:
        """Write down many steps, in order and at once, as `commit` does for one."""
        if steps:
            self._append(*steps)
            self.epoch, self.step = steps[-1]["epoch"], steps[-1]["step"] + 1

    def rewind(self, epoch: int, step: int) -> None:
        """Strike out that step and all after it: they are about to be trained again."""
        with open(self._file.name, "rb") as file:
            size = len(file.readline())
            for line in file:
                found = json.loads(line)
                if (found["epoch"], found["step"]) >= (epoch, step):
                    break
                size += len(line)
        self._file.truncate(size)
        self.epoch, self.step = epoch, step

    def close(self) -> None:
        self._file.close()

    def _append(self, *lines: dict[str, Any]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        data = text.encode()
        if self._file.write(data) != len(data):
            raise OSError(f"{self._file.name}: the disk took only part of a line")
        os.fdatasync(self._file.fileno())


def committed(path: Path) -> Iterator[dict[str, Any]]:
    """The steps of a ledger, in order. Raises `LedgerError` where there is none."""
    if not path.is_file():
        raise LedgerError(f"{path}: no such ledger; data.walk --state begins one")
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if number and line.endswith(b"\n"):
                yield _parse(line, path)


def _ends(file: BinaryIO) -> tuple[bytes | None, bytes | None, int]:
    """The first whole line, the last one where there are more, and the bytes of all whole lines.

    Reads the file's two ends only: a long ledger opens as fast as a short one.
    """
    file.seek(0)
    first = file.readline()
    if not first.endswith(b"\n"):
        return None, None, 0
    size, reach, tail = file.seek(0, os.SEEK_END), 1 << 16, b""
    while tail.count(b"\n") < 2 and len(tail) < size - len(first):
        file.seek(max(len(first), size - reach))
        tail, reach = file.read(), reach * 2
    whole = tail[: tail.rfind(b"\n") + 1]
    last = whole.splitlines()[-1] if whole else None
    return first, last, size - len(tail) + len(whole)


def _parse(line: bytes, path: Path) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError as error:
        raise LedgerError(f"{path}: not a ledger: {error}") from None
