"""How several pieces of work stand that run side by side: bars on a terminal, else plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

Report = Callable[[int, int, str], None]  # done, in all, how it stands

_SECONDS_BETWEEN_LINES = 10.0


@dataclass
class _Work:
    started: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)
    bar: TaskID | None = None


class Board:
    """`with Board() as board: board.show("corpus", 10, 100, "utterances")`."""

    def __init__(self) -> None:
        self._works: dict[str, _Work] = {}
        self._progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=Console(file=sys.stdout),
            disable=not sys.stdout.isatty(),
        )

    def __enter__(self) -> Board:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, name: str, done: int, total: int, text: str = "") -> None:
        work = self._works.setdefault(name, _Work())
        now = time.monotonic()
        speed = done / max(now - work.started, 1e-3)
        rate = f"{speed:.1f}/s"
        if not self._progress.disable:
            if work.bar is None:
                work.bar = self._progress.add_task(name, total=total, rate=rate, text=text)
            self._progress.update(work.bar, completed=done, rate=rate, text=text)
        elif done >= total or now - work.told >= _SECONDS_BETWEEN_LINES:
            work.told = now
            left = (total - done) / max(speed, 1e-3)
            print(f"{name:<18} {done}/{total} {rate} eta {left:.0f} s  {text}", flush=True)
