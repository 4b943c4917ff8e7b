"""What DeepSpeed's linear keeps for the backward pass in stage 3."""

from __future__ import annotations

import weakref

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.nn.functional import linear

import train.engine  # noqa: F401  (which makes it keep less)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_are_torchs_and_a_frozen_weight_keeps_no_input(
    trained: bool, with_bias: bool
) -> None:
    def grads(op: object) -> tuple[list[torch.Tensor | None], bool]:
        torch.manual_seed(0)
        x = torch.randn(3, 5, requires_grad=True)
        weight = torch.randn(4, 5, requires_grad=trained)
        bias = torch.randn(4, requires_grad=trained) if with_bias else None
        inner = x * 2  # what only the graph may keep; the product keeps no copy of its result
        kept = weakref.ref(inner.untyped_storage())
        out = op(inner, weight, bias)  # type: ignore[operator]
        del inner
        alive = kept() is not None
        out.sum().backward()
        return [x.grad, weight.grad, None if bias is None else bias.grad], alive

    ours, kept = grads(zero3_linear_wrap)
    expected, _ = grads(linear)
    assert kept == trained
    for mine, theirs in zip(ours, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs)
