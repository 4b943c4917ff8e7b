"""Asked to stop, by a scheduler's SIGTERM or by Ctrl-C: at the next step, resumably."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

RESUMABLE = 75
"""Exit status: stopped early, and the same command goes on from there."""


class Stopped(Exception):
    """The run ended early on request, with a checkpoint of its last step."""


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.by: str | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.by = signal.Signals(number).name
        if number == signal.SIGINT:  # pressed again, it is not waited for; SIGTERM comes twice,
            signal.signal(number, signal.default_int_handler)  # from scheduler and launcher


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT instead of dying of them."""
    request = StopRequest()
    before = {n: signal.signal(n, request) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
