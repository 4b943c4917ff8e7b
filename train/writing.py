"""Checkpoints written in a thread: a step waits for the copy to host memory, not for the disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from train import checkpoint as ckpt

Tensors = dict[str, torch.Tensor]


class Writer:
    """Does one piece of writing at a time, in the background."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self.error: ckpt.WriteError | None = None
        """Why one has failed, if one has; nothing is written after that."""

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def begin(self, name: str, work: Callable[[], object]) -> None:
        """Do `work`, once what was begun before has ended.

        Args:
            name: of what is written, for messages.
        """
        self.wait()
        if self.error is None:
            # No daemon: who leaves in good order leaves with all of it written.
            self._thread = threading.Thread(target=self._do, args=(name, work), name="checkpoint")
            self._thread.start()

    def wait(self) -> None:
        """Until what was begun has ended, well or not."""
        if self._thread is not None:
            self._thread.join()

    def _do(self, name: str, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # OSError, and safetensors' own for a full disk
            reason = " ".join(str(error).split())
            self.error = ckpt.WriteError(f"{name} could not be written ({reason})")


class Ranks(Protocol):
    """As much of `train.engine.World` as is needed here."""

    rank: int

    def sum(self, *values: float) -> list[float]: ...


class Checkpoints:
    """A run's checkpoints under `folder`: rank 0 writes, all ranks know what became of it.

    Args:
        keep: how many of the newest stay.
        waiting: called again and again while the disk is waited for.
    """

    def __init__(self, here: Ranks, folder: Path, keep: int, waiting: Callable[[], object]):
        self.here, self.folder, self.keep, self._waiting = here, folder, keep, waiting
        self.writer = Writer()
        self.count = 0
        self.stall = self.stalled = 0.0
        """Seconds that training waited for the newest one, and for all."""

    def save(
        self,
        state: ckpt.State,
        tensors: Callable[[], tuple[Tensors, Tensors]],
        best: list[int],
        before: Callable[[], object],
    ) -> None:
        """Begin to write one; returns once it is in host memory. A collective.

        Args:
            tensors: copies what is trained, and Adam's moments; a collective.
            before: writes what a checkpoint must not be ahead of; on rank 0, in the thread.
        Raises:
            WriteError: the one before could not be written.
        """
        began = time.perf_counter()
        self.written()  # at most one is under way, and in memory
        weights, moments = tensors()
        if self.here.rank == 0:

            def work() -> None:
                before()
                ckpt.save(self.folder, state, weights, moments, self.keep, best)

            name = f"checkpoint {self.folder / ckpt.name_of(state.step)}"
            self.writer.begin(name, work)
        self.count += 1
        self.stall = time.perf_counter() - began
        self.stalled += self.stall

    def written(self) -> None:
        """Wait for the one that is under way. A collective.

        Raises:
            WriteError: it could not be written; on all ranks.
        """
        pause = 0.001
        while True:
            # Asked again and again: a slow disk is no hang, nor may it outlast a collective.
            busy, failed = self.here.sum(self.writer.busy, self.writer.error is not None)
            if failed:
                raise self.writer.error or ckpt.WriteError("rank 0 could not write a checkpoint")
            if not busy:
                return
            self._waiting()
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def describe(self, seconds: float) -> str:
        """What the checkpoints cost a run of so many seconds."""
        each = 1000 * self.stalled / max(1, self.count)
        return (
            f"{self.count} checkpoints: training waited {each:.0f} ms for each, "
            f"{self.stalled / seconds:.2%} of the time"
        )
