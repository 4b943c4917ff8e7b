"""A rank that hangs takes all others with it, silently: this names it and ends the job.

Every rank writes down where it is, in the store that the process group already has. When one has
not moved for too long, each rank says where all of them are, prints its own stacks and ends, well
before the collectives' own timeout, which would name nobody.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

from train.stopping import RESUMABLE


class Store(Protocol):
    """A key-value store that all ranks reach, such as `torch.distributed`'s."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


class Watchdog:
    """Ends this process when it has been in one place for `limit` seconds."""

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        limit: float,
        end: Callable[[int], object] = os._exit,
    ):
        self._store, self._rank, self._size, self._limit, self._end = store, rank, size, limit, end
        self._host = socket.gethostname()
        self._since = time.monotonic()
        self._where = "starting"
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def at(self, where: str) -> None:
        """This rank is at `where` now, such as "step 12: data"."""
        self._since, self._where = time.monotonic(), where
        place = {"host": self._host, "where": where, "at": time.time()}
        self._store.set(f"watchdog/{self._rank}", json.dumps(place))

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._limit / 10)):
            if time.monotonic() - self._since > self._limit:
                self._report()
                self._end(RESUMABLE)
                return

    def _report(self) -> None:
        lines = [f"watchdog on rank {self._rank}: at {self._where!r} for {self._limit:.0f} s"]
        try:
            lines += [self._place(rank) for rank in range(self._size)]
        except Exception as error:  # torch's own, for a connection that is gone
            why = str(error).partition("\n")[0]
            lines.append(f"  rank 0 has ended already, where all say where they are ({why})")
        print("\n".join(lines), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)

    def _place(self, rank: int) -> str:
        key = f"watchdog/{rank}"
        # Not `get` alone: it would wait for a rank that never said anything.
        if not self._store.check([key]):
            return f"  rank {rank}: has said nothing yet"
        place = json.loads(self._store.get(key))
        ago = time.time() - place["at"]
        return f"  rank {rank} on {place['host']}: {place['where']}, for {ago:.0f} s"
