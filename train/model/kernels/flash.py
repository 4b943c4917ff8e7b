"""Packed attention by FlashAttention: all documents in one launch, memory linear in T.

Two libraries: flash-attn 2 (which has ALiBi, windows and soft caps), and torch's own
`varlen_attn` (which has windows). On CUDA alone, in half precision.
"""

from __future__ import annotations

import importlib.metadata
from functools import cache
from typing import Any

import torch

from train.model.kernels.packing import Packing, Scores


def flash_attn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, scores: Scores
) -> torch.Tensor:
    """See `kernels.Kernel`."""
    from flash_attn import flash_attn_varlen_func

    starts, longest = packing.cu_seqlens, max(packing.lengths)
    out: torch.Tensor = flash_attn_varlen_func(
        rows(q),
        rows(k),
        rows(v),
        starts,
        starts,
        longest,
        longest,
        softmax_scale=scores.scale,
        causal=scores.causal,
        window_size=_window(scores),
        softcap=scores.softcap or 0.0,
        alibi_slopes=scores.slopes,
        # Its default adds up gradients of q in whatever order the blocks finish.
        deterministic=True,
    )
    return out.transpose(0, 1)[None]


def flash_attn_refuses(q: torch.Tensor, scores: Scores) -> str | None:
    """Why flash-attn cannot do this, or None."""
    return _not_for_flash(q) or _not_installed()


def varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, scores: Scores
) -> torch.Tensor:
    """See `kernels.Kernel`."""
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = packing.cu_seqlens, max(packing.lengths)
    out: Any = varlen_attn(
        rows(q),
        rows(k),
        rows(v),
        starts,
        starts,
        longest,
        longest,
        scale=scores.scale,
        window_size=_window(scores),
    )
    return out.transpose(0, 1)[None]


def varlen_refuses(q: torch.Tensor, scores: Scores) -> str | None:
    """Why torch's varlen attention cannot do this, or None."""
    if scores.slopes is not None:
        return "it has no ALiBi"
    if scores.softcap:
        return "it has no soft cap"
    return _not_for_flash(q)


def rows(t: torch.Tensor) -> torch.Tensor:
    """[1, heads, T, d] -> [T, heads, d], the last dimension contiguous."""
    t = t[0].transpose(0, 1)
    return t if t.stride(-1) == 1 else t.contiguous()


def _window(scores: Scores) -> tuple[int, int]:
    """Positions seen (to the left, to the right) beside a query's own; -1: all."""
    left = -1 if scores.window is None else scores.window - 1
    return (left, 0 if scores.causal else -1)


def _not_for_flash(q: torch.Tensor) -> str | None:
    if q.device.type != "cuda":
        return f"it runs on cuda, not on {q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bf16 and fp16, not {q.dtype}"
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        return f"it takes heads of up to 256 in steps of 8, not {q.shape[-1]}"
    return None


@cache
def _not_installed() -> str | None:
    # By the distribution's name: flash-attn 4 is another, and shares the package's.
    try:
        found = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return "flash-attn is not installed"
    return None if found.startswith("2.") else f"it is flash-attn 2, found {found}"
