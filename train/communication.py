"""What share of a step goes to collectives: every so often one step is looked at closely."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

Interval = tuple[int, int]


class Communication:
    """Profiles every `every`-th step of this rank; 0 never does.

    On a GPU the share is the time in which collectives ran and nothing else did, since what runs
    beside the work costs nothing; on a CPU the time in which any ran.
    """

    def __init__(self, every: int, device: torch.device):
        self._every, self._gpu = every, device.type == "cuda"
        self._share: float | None = None

    @contextmanager
    def measured(self, step: int) -> Iterator[None]:
        """Around the work of a step, waiting for its data left out."""
        if not self._every or (step + 1) % self._every:
            self._share = None
            yield
            return
        activity = ProfilerActivity.CUDA if self._gpu else ProfilerActivity.CPU
        began = time.perf_counter_ns()
        with profile(activities=[activity]) as running:
            yield
            if self._gpu:
                torch.cuda.synchronize()
            whole = time.perf_counter_ns() - began
        # Raw: torch's own list of events takes seconds to build.
        events = running.profiler.kineto_results.events()
        self._share = alone(
            ((e.name(), e.start_ns(), e.start_ns() + e.duration_ns()) for e in events), self._gpu
        ) / max(1, whole)

    def figures(self) -> dict[str, float]:
        """The metric of the step that was `measured` last, if it was looked at."""
        return {} if self._share is None else {"perf/communication_share": self._share}


def alone(events: Iterable[tuple[str, int, int]], gpu: bool) -> int:
    """Time in which collectives ran, on a GPU without any other kernel, by (name, from, to)."""
    collectives: list[Interval] = []
    others: list[Interval] = []
    for name, begin, end in events:
        if name.lower().startswith(("nccl", "gloo:")):
            collectives.append((begin, end))
        elif gpu:
            others.append((begin, end))
    both = _union([*collectives, *others])
    return both - _union(others)


def _union(intervals: list[Interval]) -> int:
    """The length of what they cover together."""
    total = 0
    reached = -(2**63)
    for begin, end in sorted(intervals):
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return total
