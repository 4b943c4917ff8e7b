"""No compiled ops: their plain twins alone; stands in for `train.ops.library`."""

from __future__ import annotations

from typing import Literal

Impl = Literal["auto", "fused", "reference"]


def missing(device_type: str) -> str | None:
    """Why there are no compiled ops."""
    return "an exported folder has none"


def use_fused(op: str, impl: Impl, device_type: str) -> bool:
    """Never: the twins compute the same."""
    return False
