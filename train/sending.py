"""A journal's steps on their way to the tracker, in a thread that training never waits for.

The journal is the queue, so nothing grows in memory while the tracker is away. Before it sends
anything, and again after every failure, the thread asks the tracker for the last step that it has,
so that a request whose answer was lost is not repeated.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from data.secrets import redacted
from train.journal import Entry, Journal

_SECONDS = 5.0
"""Between two deliveries."""
_LONGEST_PAUSE = 30.0
"""Between two tries while the tracker is away; they begin at `_SECONDS`."""
_METRICS = 1000
"""In one delivery: as many as MLflow takes."""


class Receiver(Protocol):
    """The tracker; every call may raise anything, and may take its time."""

    def last_step(self) -> int:
        """The last step that it has; -1 for none."""

    def receive(self, entries: Sequence[Entry]) -> None:
        """Take whole steps, all of them or none."""

    def end(self, status: str) -> None: ...


class Sender:
    """Sends `journal` to `receiver` until it is closed."""

    def __init__(self, journal: Journal, receiver: Receiver, say: Callable[[str], object] = print):
        self._journal, self._receiver, self._say = journal, receiver, say
        self._sent: int | None = None  # unknown until the tracker has been asked
        self._start = 0  # where in the journal the first step that was not sent may be
        self._status: str | None = None
        self._closing, self._given_up = threading.Event(), threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)
        self._thread.start()

    def close(self, status: str, seconds: float) -> bool:
        """Send what is left and end the run, within `seconds`; returns whether that was done.

        If not, the thread asks nothing more of the receiver: the journal's next sender owns the
        run from here on, and may be of this process.
        """
        self._status = status
        self._closing.set()
        self._thread.join(seconds)
        self._given_up.set()
        return self._ended

    def _run(self) -> None:
        away, pause = False, _SECONDS
        while not self._given_up.is_set():
            self._closing.wait(pause)
            closing = self._closing.is_set()
            try:
                self._deliver()
                if self._given_up.is_set():
                    return
                if away:
                    self._say("the tracker answers again and has all metrics")
                away, pause = False, _SECONDS
                if closing:
                    self._receiver.end(self._status or "FINISHED")
                    self._ended = True
                    return
            except Exception as error:  # MLflow's many, and those of its libraries
                self._sent, self._start = None, 0
                pause = min(2 * pause, _LONGEST_PAUSE) if away else _SECONDS
                if not away:
                    reason = redacted(" ".join(str(error).split())[:300])
                    self._say(
                        f"the tracker does not answer, training goes on; metrics wait in "
                        f"{self._journal.path} ({type(error).__name__}: {reason})"
                    )
                away = True
                if closing:
                    self._given_up.wait(0.5)

    def _deliver(self) -> None:
        if self._sent is None:
            self._sent = self._receiver.last_step()
        for part in parts(e for e in self._journal.entries(self._start) if e.step > self._sent):
            if self._given_up.is_set():
                return
            self._receiver.receive(part)
            self._sent, self._start = part[-1].step, part[-1].end


def parts(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    """Whole steps, as many at once as one delivery takes."""
    part: list[Entry] = []
    for entry in entries:
        if part and sum(len(e.metrics) for e in part) + len(entry.metrics) > _METRICS:
            yield part
            part = []
        part.append(entry)
    if part:
        yield part
