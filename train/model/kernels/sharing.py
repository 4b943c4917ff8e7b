"""Rows that several documents share, before and behind a kernel that wants whole documents."""

from __future__ import annotations

from typing import Any

import torch

from train.model.kernels.packing import Shared


def spread(x: torch.Tensor, shared: Shared) -> torch.Tensor:
    """[1, heads, T, d] -> [1, heads, S, d]: every document with all of its rows."""
    spread_: torch.Tensor = _Spread.apply(x, shared)
    return spread_


def gather(x: torch.Tensor, shared: Shared) -> torch.Tensor:
    """[1, heads, S, d] -> [1, heads, T, d]: every row once."""
    return x.transpose(1, 2).index_select(1, shared.first).transpose(1, 2)


class _Spread(torch.autograd.Function):
    """A selection of rows whose gradients add up in the same order every time: torch's own adds
    them up on a GPU in whatever order they come."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shared: Shared) -> torch.Tensor:
        ctx.shared = shared
        return x.transpose(1, 2).index_select(1, shared.rows).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        first, uses = ctx.shared.first, ctx.shared.uses
        grad_1Shd = grad.transpose(1, 2)
        grad_1Thd = grad_1Shd.index_select(1, first)
        each_UMhd = grad_1Shd[0][uses.clamp(min=0)]
        each_UMhd.masked_fill_((uses < 0)[..., None, None], 0)
        grad_1Thd[0, : len(uses)] = each_UMhd.sum(1)
        return grad_1Thd.transpose(1, 2), None
