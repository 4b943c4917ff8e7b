"""Copies of remote shards on a local disk, within a size limit.

Any number of processes share the folder: one of them fetches a file while the others wait, and a
file appears under its name only when whole. Nobody holds a file open between two reads, so that
what was read longest ago can go when room is needed.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data.archive import ShardError, drafted

Download = Callable[["Draft"], None]
_PIECE = 4 << 20  # room is made at least every so many bytes
_TRIES = 5


@dataclass(frozen=True)
class Cache:
    """A folder of ours, and how many bytes it may hold. Best: the shards of two windows."""

    folder: Path
    limit_bytes: int

    @contextmanager
    def opened(self, name: str, size: int, download: Download) -> Iterator[int]:
        """The file descriptor of `name`, which `download` writes, `size` bytes, if it is not here.

        Raises what `download` raises, `OSError` where the disk refuses, and `ShardError` where
        the limit is below this one file.
        """
        path = self.folder / name
        for _ in range(_TRIES):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self._fetch(path, size, download)
                continue  # and it may have had to go again at once, for somebody else's file
            try:
                os.utime(descriptor)  # the order in which files go
                yield descriptor
            finally:
                os.close(descriptor)
            return
        raise OSError(
            f"{self.folder}: {name} was put out {_TRIES} times before it was read; raise the "
            f"cache's limit of {self.limit_bytes} bytes"
        )

    def _fetch(self, path: Path, size: int, download: Download) -> None:
        if size > self.limit_bytes:
            raise ShardError(
                f"{self.folder}: {path.name} alone, {size} bytes, is larger than the cache's limit "
                f"of {self.limit_bytes}; raise it"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f".{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a killed process lets go of it
            if path.exists():
                return
            with drafted(path) as file:
                download(Draft(self, file, path, size))

    def make_room(self, needed: int, path: Path) -> None:
        """Put out the files read longest ago until `needed` more bytes fit."""
        files: list[tuple[int, int, str]] = []
        unfinished = 0
        for entry in os.scandir(self.folder):
            try:
                stat = entry.stat()
            except FileNotFoundError:
                continue
            if entry.name.endswith(".part"):
                unfinished += 0 if _abandoned(entry.path, path) else stat.st_size
            elif not entry.name.endswith(".lock"):
                files.append((stat.st_mtime_ns, stat.st_size, entry.path))
        total = unfinished + needed + sum(size for _, size, _ in files)
        for _, size, oldest in sorted(files):
            if total <= self.limit_bytes:
                break
            Path(oldest).unlink(missing_ok=True)
            total -= size
        if total > self.limit_bytes:
            raise OSError(
                f"{self.folder}: no room for {path.name} beside what others are fetching; raise "
                f"the cache's limit of {self.limit_bytes} bytes"
            )


class Draft:
    """A file that is being fetched into the cache."""

    def __init__(self, cache: Cache, file: BinaryIO, path: Path, expected: int):
        self._cache, self._path, self._expected = cache, path, expected
        self.file = file
        self.size = self._checked = 0
        cache.make_room(expected, path)

    def write(self, data: bytes) -> None:
        """Append `data`; others are fetching too, so whether there is room is asked again."""
        if self.size + len(data) - self._checked > _PIECE:
            self.file.flush()
            self._cache.make_room(max(0, self._expected - self.size), self._path)
            self._checked = self.size
        self.file.write(data)
        self.size += len(data)


def _abandoned(draft: str, own: Path) -> bool:
    """Whether a killed process left this draft behind; then it is removed."""
    if draft.endswith(f".{own.name}.part"):
        return False
    try:
        with open(draft, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(draft)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True
