"""Packed attention by torch's own scaled dot product: on every device, in every dtype.

The plain twin of the other kernels, and the fast path on a CPU.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from train.model.kernels.packing import Packing, Scores


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, scores: Scores
) -> torch.Tensor:
    """See `kernels.Kernel`. Documents of like length go together, padded at the end."""
    documents = [t[0].transpose(0, 1).split(packing.lengths) for t in (q, k, v)]
    outs: list[torch.Tensor | None] = [None] * len(packing.lengths)
    for group in alike(packing.lengths) if scores.causal else equal(packing.lengths):
        lengths = [packing.lengths[i] for i in group]
        # Padded at the end, if at all: causal attention never looks there, so it needs no mask.
        q_DhLd, k_DhLd, v_DhLd = (
            pad_sequence([part[i] for i in group], batch_first=True).transpose(1, 2)
            for part in documents
        )
        longest = max(lengths)
        windowed = scores.window is not None and scores.window < longest
        # Causality alone is left to the kernel, which then skips what no query sees.
        mask = _bias(longest, scores, q) if scores.slopes is not None or windowed else None
        if scores.softcap:
            mask = _bias(longest, scores, q)
            out_DhLd = _capped(q_DhLd, k_DhLd, v_DhLd, mask, scores.scale, scores.softcap)
        else:
            out_DhLd = scaled_dot_product_attention(
                q_DhLd,
                k_DhLd,
                v_DhLd,
                attn_mask=mask,
                is_causal=scores.causal and mask is None,
                scale=scores.scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        for i, length, out in zip(group, lengths, out_DhLd.transpose(1, 2), strict=True):
            outs[i] = out[:length]
    return torch.cat([out for out in outs if out is not None]).transpose(0, 1)[None]


def alike(lengths: tuple[int, ...]) -> list[list[int]]:
    """Document numbers in groups of like length: one call for many short documents.

    In a group no document is shorter than three quarters of the longest, so padding costs at most
    a third of its positions more.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and 4 * lengths[i] >= 3 * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def equal(lengths: tuple[int, ...]) -> list[list[int]]:
    """Document numbers in groups of the same length."""
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault(length, []).append(i)
    return list(groups.values())


def _bias(length: int, scores: Scores, like: torch.Tensor) -> torch.Tensor:
    """What is added to the scores, [heads or 1, length, length]: ALiBi, causality, the window.

    Built in float32 (in bf16 the distances of far keys collapse) and cast to q's dtype after
    subtracting the query's own position, which softmax does not see but rounding does.
    """
    at = torch.arange(length, device=like.device)
    distance = at[None, :] - at[:, None]
    unseen = distance > 0
    if scores.window is not None:
        unseen |= distance <= -scores.window
    bias = torch.zeros(1, length, length, device=like.device)
    if scores.slopes is not None:
        bias = scores.slopes.float()[:, None, None] * distance
    return bias.masked_fill(unseen, float("-inf")).to(like.dtype)


def _capped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Attention with capped scores, which no fused kernel of torch has."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * (scale / softcap)) + bias
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
