"""Strided 1-D convolution over ragged rows, with bias and activation; channels last throughout.

Shapes: R input rows, M output rows, C channels in, D channels of the convolution,
        K taps of the kernel, S segments.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from train.ops import library
from train.ops.library import Impl
from train.ops.segments import Segments

Activation = Literal["none", "gelu", "glu"]

ACTIVATIONS = {"none": 0, "gelu": 1, "glu": 2}  # as in csrc/common/activation.h

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def ragged_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    segments: Segments,
    *,
    stride: int,
    padding: int,
    activation: Activation = "none",
    impl: Impl = "auto",
) -> tuple[Tensor, Segments]:
    """Convolves every segment of `x` for itself, zero-padded at the segment's own borders.

    x: [R, C], rows outside every segment are never read and get a zero gradient
    weight: [D, K, C] (nn.Conv1d's weight with its last two dimensions exchanged)
    bias: [D] or None
    All of one dtype: float32, bfloat16, float16 or float64; sums are float32 (float64).

    Returns `y` [M, D], or [M, D / 2] with "glu" (y = a * sigmoid(b), a the first half), and the
    packed segments of its rows: `segments.conv(K, stride, padding)`.

    Raises ValueError for shapes, dtypes and devices that do not fit, RuntimeError when
    `impl="fused"` is asked for and not built.
    """
    if torch.is_autocast_enabled(x.device.type):  # as autocast does for nn.Conv1d
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(x, weight, bias, segments, stride, padding, activation)
    if not library.use_fused("ragged_conv1d", impl, x.device.type):
        return ragged_conv1d_reference(
            x, weight, bias, segments, stride=stride, padding=padding, activation=activation
        )
    out = segments.conv(weight.shape[1], stride, padding)
    # The gradient of x works on groups of `stride` input rows: see csrc/common/ragged.h.
    groups = Segments.packed([-(-n // stride) for n in segments.host_lengths], x.device)
    y, _ = torch.ops.hearken.ragged_conv1d(
        x,
        weight,
        bias,
        segments.starts,
        segments.lengths,
        out.starts,
        groups.starts,
        out.rows,
        groups.rows,
        stride,
        padding,
        ACTIVATIONS[activation],
        _wants_grad(x, weight, bias),
    )
    return y, out


def ragged_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    segments: Segments,
    *,
    stride: int,
    padding: int,
    activation: Activation = "none",
) -> tuple[Tensor, Segments]:
    """The plain twin: gathers every window, [M, K * C], and multiplies once."""
    kernel = weight.shape[1]
    out = segments.conv(kernel, stride, padding)
    segment = torch.arange(len(out), device=x.device).repeat_interleave(
        out.lengths, output_size=out.total
    )
    position = torch.arange(out.total, device=x.device) - out.starts[segment]
    taps = torch.arange(kernel, device=x.device)
    tap = position[:, None] * stride - padding + taps
    inside = (tap >= 0) & (tap < segments.lengths[segment][:, None])
    # Row R is a row of zeros, for the taps that fall beyond a border.
    row = torch.where(inside, segments.starts[segment][:, None] + tap, x.shape[0])
    windows = torch.cat([x, x.new_zeros(1, x.shape[1])])[row].flatten(1)
    y = F.linear(windows, weight.flatten(1), bias)
    if activation == "gelu":
        y = F.gelu(y)
    elif activation == "glu":
        y = F.glu(y)
    return y, out


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    segments: Segments,
    stride: int,
    padding: int,
    activation: str,
) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be [rows, channels], but has shape {list(x.shape)}.")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be of {', '.join(map(str, DTYPES))}, but is {x.dtype}.")
    if weight.dim() != 3 or weight.shape[2] != x.shape[1]:
        raise ValueError(
            f"weight must be [channels out, kernel, {x.shape[1]}] as x has {x.shape[1]} channels, "
            f"but has shape {list(weight.shape)}."
        )
    if weight.shape[1] < 1:
        raise ValueError("weight must have at least one tap, but has none.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], but has shape {list(bias.shape)}.")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} must be of x's {x.dtype}, but is {tensor.dtype}.")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on x's {x.device}, but is on {tensor.device}.")
    if segments.device != x.device:
        raise ValueError(f"segments must be on x's {x.device}, but are on {segments.device}.")
    if segments.rows > x.shape[0]:
        raise ValueError(
            f"segments must fit the {x.shape[0]} rows of x, but reach over {segments.rows}."
        )
    if stride < 1:
        raise ValueError(f"stride must be at least 1, but is {stride}.")
    if padding < 0:
        raise ValueError(f"padding must not be negative, but is {padding}.")
    if activation not in get_args(Activation):
        raise ValueError(
            f"activation must be one of {', '.join(get_args(Activation))}, but is {activation!r}."
        )
    if activation == "glu" and weight.shape[0] % 2:
        raise ValueError(
            f"weight must have an even number of channels out for glu, but has {weight.shape[0]}."
        )


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    out_starts: Tensor,
    group_starts: Tensor,
    out_rows: int,
    groups: int,
    stride: int,
    padding: int,
    activation: int,
    keep_sums: bool,
) -> tuple[Tensor, Tensor]:
    channels = weight.shape[0]
    halved = activation == ACTIVATIONS["glu"]
    return (
        x.new_empty(out_rows, channels // 2 if halved else channels),
        x.new_empty(out_rows if keep_sums and activation else 0, channels),
    )


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    sums: Tensor,
    starts: Tensor,
    lengths: Tensor,
    out_starts: Tensor,
    group_starts: Tensor,
    groups: int,
    stride: int,
    padding: int,
    activation: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(weight.shape[:1] if need_bias else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, starts, lengths, out_starts, group_starts, _, groups, *rest = inputs
    ctx.save_for_backward(x, weight, output[1], starts, lengths, out_starts, group_starts)
    ctx.arguments = (groups, *rest[:3])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    grads = torch.ops.hearken.ragged_conv1d_backward(
        grad, *ctx.saved_tensors, *ctx.arguments, need_x, need_weight, need_bias
    )
    needed = (need_x, need_weight, need_bias)
    return *(g if need else None for g, need in zip(grads, needed, strict=True)), *[None] * 10


if library.missing("cpu") is None:
    torch.library.register_fake("hearken::ragged_conv1d", _fake)
    torch.library.register_fake("hearken::ragged_conv1d_backward", _fake_backward)
    torch.library.register_autograd(
        "hearken::ragged_conv1d", _backward, setup_context=_setup_context
    )
