"""Packed attention by FlexAttention: any score on CUDA, blocks that no query sees left out."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from train.model.kernels.packing import Packing, Scores


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, scores: Scores
) -> torch.Tensor:
    """See `kernels.Kernel`. On a CPU it has no backward."""
    slopes, softcap = scores.slopes, scores.softcap

    def score(value: torch.Tensor, _: Any, h: Any, at: Any, key: Any) -> torch.Tensor:
        if softcap:
            value = softcap * torch.tanh(value / softcap)
        return value if slopes is None else value + slopes[h] * (key - at)

    function: Any = _compiled() if q.device.type == "cuda" else flex_attention
    out: torch.Tensor = function(
        q,
        k,
        v,
        score_mod=None if slopes is None and not softcap else score,
        block_mask=_mask(packing.lengths, scores.window, scores.causal, q.device),
        scale=scores.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out


def refuses(q: torch.Tensor, scores: Scores) -> str | None:
    """Why FlexAttention cannot do this, or None."""
    if q.device.type != "cuda" and q.requires_grad:
        return f"it has no backward on {q.device.type}"
    if q.device.type == "cuda" and q.shape[-1] < 16:
        return f"it takes heads of 16 or more, not {q.shape[-1]}"
    return None


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


# The layers of one batch ask for the same one, or for two where windows alternate.
@lru_cache(maxsize=4)
def _mask(
    lengths: tuple[int, ...], window: int | None, causal: bool, device: torch.device
) -> BlockMask:
    numbers = torch.arange(len(lengths), device=device)
    document = numbers.repeat_interleave(torch.tensor(lengths, device=device))

    def seen(_: Any, __: Any, at: Any, key: Any) -> torch.Tensor:
        inside = document[at] == document[key]
        if causal:
            inside = inside & (key <= at)
        return inside if window is None else inside & (at - key < window)

    total = sum(lengths)
    return create_block_mask(seen, None, None, total, total, device=str(device))
