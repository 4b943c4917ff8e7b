"""Random draws of the model in training that depend on what is trained, not on what went before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def drawn_for(seed: int, *place: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's generators are seeded by the run's `seed` and the batch's place in the data.

    So dropout is the same after a restart, and on any number of ranks.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(hash((seed, *place)) % 2**63)  # a hash of integers is always the same
        yield
