"""`train.engine.World` without processes: one rank alone, or several as threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import torch

from train.model.build import load_decoder


class Solo:
    """Nobody to talk to."""

    rank, size, local_rank = 0, 1, 0
    device = torch.device("cpu")

    def sum(self, *values: float) -> list[float]:
        return [sum(each) for each in zip(*self.gather(values), strict=True)]

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        self.gather(None)


class Threaded(Solo):
    """One of `size` ranks that meet at `meeting` and leave there what they send."""

    def __init__(self, rank: int, meeting: threading.Barrier, table: list[Any]):
        self.rank, self.size = rank, meeting.parties
        self._meeting, self._table = meeting, table

    def gather(self, value: Any) -> list[Any]:
        self._table[self.rank] = value
        self._meeting.wait(60)
        found = list(self._table)
        self._meeting.wait(60)  # nobody writes before all have read
        return found


def on_threads(size: int, work: Callable[[Any], None]) -> None:
    """Run `work(world)` as `size` ranks; raises what one of them raised."""
    meeting, table = threading.Barrier(size), [None] * size
    loading = threading.Lock()

    def load_alone(*args: Any) -> Any:
        # While it loads a model, transformers swaps functions of its own for all threads; two at
        # once leave them swapped (no weights are tied any more, in the whole process).
        with loading:
            return load_decoder(*args)

    with (
        mock.patch("train.behave.load_decoder", load_alone),
        ThreadPoolExecutor(size) as pool,
    ):
        done = [pool.submit(work, Threaded(rank, meeting, table)) for rank in range(size)]
        for each in done:
            each.result()
