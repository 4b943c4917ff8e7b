"""Dataclasses of tensors, moved as one."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import torch


class Tensors:
    """A dataclass of tensors, of more such, and of plain values."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same with `change` done to all of its tensors."""

        def changed(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return change(value)
            return value.map(change) if isinstance(value, Tensors) else value

        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return type(self)(**{f.name: changed(getattr(self, f.name)) for f in fields})
