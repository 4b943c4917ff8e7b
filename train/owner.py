"""Who trains a run: one start of it at a time.

A launcher that dies leaves its ranks behind, on hosts that whoever starts the run again cannot
reach. So every start writes itself down in the run's folder. What is left of an earlier one finds
that out after its next step, and ends without writing anything more; the new one waits for it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.convert import write_text

WAIT = 120.0
"""Seconds that an earlier start may take to finish its step."""
_LOOK = 1.0
"""Seconds between two looks at the file, which may lie on another machine."""
_START = 60.0
"""Seconds that the ranks of one start may begin apart, hosts' clocks included."""


class Superseded(Exception):
    """Another start of the same run has taken over."""


class Owner:
    """This start's claim to the run in `folder`, held until the process ends.

    Args:
        say: told whom it waits for.
        wait: seconds to wait at most; file systems without locks never say that one is free.
    """

    def __init__(
        self, folder: Path, say: Callable[[str], object] = print, wait: float = WAIT
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "owner.json"
        before = _written(self._path)
        self.name = f"{socket.gethostname()}, process {os.getpid()}"
        self._token = uuid.uuid4().hex
        try:
            self._write(alone=False)
        except OSError:  # the other ranks wait for no claim then, but for rank 0, and not for long
            self._path.unlink(missing_ok=True)
            raise
        self._looked = time.monotonic()
        self._lock = (folder / "owner.lock").open("a")
        deadline, told = time.monotonic() + wait, False
        while not self._free() and time.monotonic() < deadline:
            if not told:
                say(f"{folder}: waiting for an earlier start of this run to end "
                    f"({before.get('name', 'unknown')})")  # fmt: skip
                told = True
            time.sleep(0.1)
        self._write(alone=True)

    def taken(self) -> str | None:
        """Who has taken over, if a newer start has."""
        if time.monotonic() < self._looked + _LOOK:
            return None
        self._looked = time.monotonic()
        now = _written(self._path)
        return str(now["name"]) if now.get("token", self._token) != self._token else None

    def close(self) -> None:
        """Let another start go on."""
        self._lock.close()

    def _free(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # no locks here
            pass
        return True

    def _write(self, alone: bool) -> None:
        facts = {"token": self._token, "name": self.name, "at": time.time(), "alone": alone}
        write_text(self._path, json.dumps(facts) + "\n")


def wait_for_owner(folder: Path, wait: float = WAIT) -> None:
    """On the other ranks: until rank 0 of the same start owns the run alone.

    They would else meet the earlier start's rank 0, which may hold the same port. A folder that
    they do not share with rank 0 has no claim, and nothing to wait for.
    """
    began, deadline = time.time(), time.monotonic() + wait
    while (found := _written(folder / "owner.json")) and time.monotonic() < deadline:
        if found.get("alone") and found.get("at", 0.0) > began - _START:
            return
        time.sleep(0.1)


def _written(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or the disk is away for a moment
        return {}
    return found if isinstance(found, dict) else {}
