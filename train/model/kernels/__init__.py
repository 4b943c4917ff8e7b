"""The kernels of packed attention, and which of them is used.

`auto` takes the first of flash-attn 2, torch's varlen attention and FlexAttention that can do what
the decoder asks for, and torch's scaled dot product, document by document, where none can.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Literal, get_args

import torch

from train.model.kernels import flash, flex, sdpa
from train.model.kernels.packing import Packing, Scores
from train.model.kernels.sharing import gather, spread

__all__ = ["Kernel", "Name", "Packing", "Scores", "attend"]

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Packing, Scores], torch.Tensor]
"""(q [1, heads, T, d], k and v [1, kv_heads, T, d], packing, scores) -> [1, heads, T, d].

Attention inside each document, causal unless the scores say otherwise; kv_heads divides heads.
"""

Name = Literal["auto", "flash_attn", "varlen", "flex", "sdpa"]

Refusal = Callable[[torch.Tensor, Scores], str | None]

# In the order of preference.
KERNELS: dict[Name, tuple[Kernel, Refusal]] = {
    "flash_attn": (flash.flash_attn, flash.flash_attn_refuses),
    "varlen": (flash.varlen, flash.varlen_refuses),
    "flex": (flex.attend, flex.refuses),
    "sdpa": (sdpa.attend, lambda q, scores: None),
}

log = logging.getLogger(__name__)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing,
    scores: Scores,
    name: Name = "auto",
) -> torch.Tensor:
    """As `Kernel`, by the one that is named or chosen; T rows, where documents share some.

    Raises RuntimeError where the one that is named cannot do it.
    """
    chosen = choose(q, scores) if name == "auto" else name
    kernel, refuses = KERNELS[chosen]
    if name != "auto" and (why := refuses(q, scores)) is not None:
        raise RuntimeError(
            f"model.decoder.attention: {name} was asked for, but {why}; "
            f"set auto, or one of {', '.join(get_args(Name)[1:])} that can"
        )
    if packing.shared is None:
        return kernel(q, k, v, packing, scores)
    q, k, v = (spread(t, packing.shared) for t in (q, k, v))
    return gather(kernel(q, k, v, packing, scores), packing.shared)


def choose(q: torch.Tensor, scores: Scores) -> Name:
    """The first kernel that can do this; said once in the log."""
    if q.device.type == "cpu":
        return "sdpa"  # FlexAttention runs there, but is no faster and has no backward
    chosen: Name = next(name for name, (_, refuses) in KERNELS.items() if not refuses(q, scores))
    _say(chosen, q.device.type)
    return chosen


@cache
def _say(chosen: str, device_type: str) -> None:
    log.info("packed attention on %s: %s", device_type, chosen)
