"""What the user sees while it runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Where nobody watches, tables need not fit a terminal: rich would take 80 columns and cut names.
_WIDTH = None if sys.stdout.isatty() else 120
console = Console(stderr=False, highlight=False, soft_wrap=True, width=_WIDTH)

_LINE_SECONDS = 10.0


class Bar:
    """Progress of one long piece of work: a count, a rate and an ETA, and free text."""

    def __init__(self, title: str, total: int, done: int = 0, enabled: bool = True):
        self.title, self.total, self.done, self.enabled = title, total, done, enabled
        self._start, self._first = time.monotonic(), done
        self._printed = self._start
        self._progress: Progress | None = None
        if enabled and sys.stdout.isatty():
            self._progress = Progress(
                TextColumn(title),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=console,
            )
            self._task = self._progress.add_task(title, total=total, completed=done, text="")
            self._progress.start()

    def advance(self, count: int = 1, text: str = "") -> None:
        self.done += count
        if self._progress is not None:
            self._progress.update(self._task, completed=self.done, text=text)
        elif self.enabled:
            now = time.monotonic()
            if now - self._printed > _LINE_SECONDS or self.done >= self.total:
                self._printed = now
                console.print(f"{self.title} {self.done}/{self.total} {self._eta(now)} {text}")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _eta(self, now: float) -> str:
        rate = (self.done - self._first) / max(1e-9, now - self._start)
        left = (self.total - self.done) / rate if rate else 0.0
        return f"{rate:.1f}/s eta {int(left // 60)}:{int(left % 60):02d}"


@contextmanager
def bar(title: str, total: int, done: int = 0, enabled: bool = True) -> Iterator[Bar]:
    """A `Bar` that is closed whatever happens inside."""
    shown = Bar(title, total, done, enabled)
    try:
        yield shown
    finally:
        shown.close()
