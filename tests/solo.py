"""One rank without a process group: `train.engine.World` where there is nobody to talk to."""

from __future__ import annotations

from typing import Any

import torch


class Solo:
    rank, size, local_rank = 0, 1, 0
    device = torch.device("cpu")

    def sum(self, *values: float) -> list[float]:
        return list(values)

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        pass
