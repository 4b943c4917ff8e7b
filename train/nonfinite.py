"""Steps whose loss or gradient is not finite: who had it, in one line, and saved for replay.

OUTPUT/nonfinite/step-00000012/     a checkpoint of the weights that the step began with
    batch.json                      its bins: rank, keys, losses, largest gradient
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from train import checkpoint as ckpt

if TYPE_CHECKING:
    from data.collate import Batch

_NAMED = 20


class NonFinite(ArithmeticError):
    """A step's loss or gradient is not finite; no update was made."""


class Ranks(Protocol):
    """As much of `train.engine.World` as is needed here."""

    rank: int

    def gather(self, value: list[Bin]) -> list[list[Bin]]: ...


@dataclass(frozen=True)
class Bin:
    """One micro-batch, as one rank saw it alone."""

    rank: int
    bin: int
    keys: tuple[str, ...]
    losses: dict[str, float]
    """Sums over what each counts."""
    gradient: float
    """The largest absolute one of all that is trained."""

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (*self.losses.values(), self.gradient)))

    def __str__(self) -> str:
        bad = [f"{n} loss {v}" for n, v in self.losses.items() if not math.isfinite(v)]
        what = ", ".join(bad) or f"largest gradient {self.gradient}"
        more = len(self.keys) - _NAMED
        keys = ", ".join(self.keys[:_NAMED]) + (f" and {more} more" if more > 0 else "")
        return f"bin {self.bin} on rank {self.rank} ({what}): {keys}"


@dataclass(frozen=True)
class Fault:
    """All bins of a step that made no update."""

    bins: tuple[Bin, ...]

    @property
    def keys(self) -> list[str]:
        return [key for each in self.bins for key in each.keys]

    def __str__(self) -> str:
        bad = "; ".join(str(each) for each in self.bins if not each.finite)
        return bad or "each bin alone is finite, their sum is not"


def gather(
    here: Ranks,
    batches: Sequence[Batch],
    losses: Sequence[Mapping[str, float]],
    largest: Sequence[torch.Tensor],
) -> Fault:
    """This step's bins on all ranks. A collective.

    Args:
        losses: of each of this rank's batches; so is `largest`, as `Engine.backward` returns it.
    """
    mine = [
        Bin(here.rank, batch.bin, batch.keys, dict(sums), float(gradient))
        for batch, sums, gradient in zip(batches, losses, largest, strict=True)
    ]
    return Fault(tuple(each for rank in here.gather(mine) for each in rank))


def save(folder: Path, state: ckpt.State, weights: dict[str, torch.Tensor], fault: Fault) -> Path:
    """Write down a step that made no update, for `train/replay.py`; `state` is the one before."""
    path = folder / ckpt.name_of(state.step)
    ckpt.write(path, state, weights, {})
    rows = [asdict(each) for each in fault.bins]
    (path / "batch.json").write_text(json.dumps(rows, indent=1) + "\n")
    return path
