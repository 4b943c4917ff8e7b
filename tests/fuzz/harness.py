"""Inputs from hypothesis, one reader at a time, and what it must not do with them."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from data.bounded import bounded
from tests.fuzz.readers import READERS, Reader

SECONDS, BYTES = 10.0, 2 << 30
"""What reading one input may take of a core and of memory; each is some thousand bytes at most."""
HANGS = 120.0
"""Seconds after which it is taken to hang, on however busy a machine."""
ROUND = 2000
"""Inputs of one run of hypothesis, which remembers all of them, at 10 kB each."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FORBIDDEN = {
    "pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
    "socket.connect", "socket.bind", "os.symlink", "os.link", "ctypes.dlopen", "os.kill",
}  # fmt: skip
_PATHS = {
    "os.rename": (0, 1), "os.remove": (0,), "os.mkdir": (0,), "os.rmdir": (0,), "os.chmod": (0,),
    "os.truncate": (0,), "shutil.rmtree": (0,), "os.utime": (0,),
}  # fmt: skip


class Guard:
    """Sees what the interpreter does, and forbids what no reader has a reason to do."""

    def __init__(self) -> None:
        self._folder: str | None = None
        self.broken: list[str] = []
        sys.addaudithook(self._hook)  # for as long as this process lives

    @contextmanager
    def within(self, folder: Path) -> Iterator[None]:
        self._folder, self.broken = str(folder), []
        try:
            yield
        finally:
            self._folder = None

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self._folder is None:
            return
        if event in _FORBIDDEN:
            self._forbid(f"{event} {args!r:.200}")
        elif event == "open":
            path, _, flags = args
            if flags & _WRITES and not isinstance(path, int):
                self._check(event, path)
        else:
            for at in _PATHS.get(event, ()):
                self._check(event, args[at])

    def _check(self, event: str, path: Any) -> None:
        if isinstance(path, int):
            return
        whole = os.path.realpath(os.fsdecode(path))
        if whole != self._folder and not whole.startswith(f"{self._folder}{os.sep}"):
            self._forbid(f"{event} {whole}")

    def _forbid(self, what: str) -> None:
        self.broken.append(what)  # a reader may swallow what is raised here
        raise PermissionError(what)


_guard: Guard | None = None


def tried(reader: Reader, data: bytes, root: Path) -> str:
    """What became of one input: "taken" or "refused"; raises where it is neither."""
    global _guard
    _guard = _guard or Guard()
    folder = Path(os.path.realpath(root)) / "target"
    folder.mkdir()
    began = time.process_time()
    try:
        with _guard.within(folder), bounded(HANGS, BYTES):
            try:
                reader.read(data, folder)
                became = "taken"
            except reader.refusals as error:
                became = "refused"
                said = str(error)
                assert said, "refused without a word"
                assert len(said) < 100_000, f"refused in {len(said)} characters"
    finally:
        _remove(folder)
    assert not _guard.broken, _guard.broken
    assert time.process_time() - began < SECONDS, "took too long"
    left = list(root.iterdir())
    assert not left, f"left outside of its folder: {left}"
    return became


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
    folder.rmdir()


@st.composite
def bent(draw: st.DrawFn, reader: Reader, seeds: list[bytes]) -> bytes:
    """One of the seeds, with a few changes."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.integers(0, 6))
        if kind == 0:
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == 1:
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == 2:
            data[at:at] = draw(st.binary(max_size=16))
        elif kind == 3:
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        elif kind == 4:
            del data[at:]
        elif kind == 5 and reader.words:
            word = draw(st.sampled_from(reader.words))
            data[at : at + draw(st.sampled_from([0, len(word)]))] = word
        else:
            other = draw(st.sampled_from(seeds))
            data[at:] = other[draw(st.integers(0, len(other))) :]
    return bytes(data)


def fuzz(reader: Reader, inputs: int, number: int) -> Counter[str]:
    """Try the seeds, and as many inputs made of them; returns what became of how many.

    Raises what the reader should not have, with the smallest input that hypothesis finds.
    """
    seeds = reader.seeds()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        root = Path(folder)
        for data in seeds:
            counts[tried(reader, data, root)] += 1

        def attempt(data: bytes) -> None:
            counts[tried(reader, data, root)] += 1

        while (left := inputs - sum(counts.values())) > 0:
            run = given(bent(reader, seeds))(attempt)
            run = settings(
                max_examples=min(left, ROUND), deadline=None, database=None, print_blob=False,
                phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
            )(run)  # fmt: skip
            seed(number)(run)()
            number += 1
    return counts


def report(name: str, inputs: int, number: int) -> None:
    """Fuzz one reader, and say what became of its inputs."""
    began = time.monotonic()
    print(f"{name}: seed {number}", flush=True)
    found = fuzz(READERS[name], inputs, number)
    print(
        f"{name}: {sum(found.values())} inputs in {time.monotonic() - began:.0f} s, "
        + ", ".join(f"{count} {what}" for what, count in found.most_common()),
        flush=True,
    )


def _memory() -> str | None:
    """Where files cost no disk, if there is such a place."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None
