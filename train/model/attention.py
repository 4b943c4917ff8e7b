"""Decoder attention over a packed batch: every document attends to itself alone.

A packed batch is one row of T positions that hold D documents one after another. Two modes,
switched by `set_packed`: in training the decoder runs packed through `per_document`; to generate
it runs on a padded batch with a cache, as transformers does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.models.bloom.modeling_bloom import BloomAttention, _get_alibi_slopes

NAME = "hearken_packed"


@dataclass(frozen=True)
class Packing:
    """Lengths of the packed documents, on the host: their sum is T."""

    lengths: tuple[int, ...]


def per_document(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing,
    *,
    scale: float | None = None,
    slopes: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention inside each document.

    Args:
        q: [1, heads, T, d]; k, v: [1, kv_heads, T, d], kv_heads dividing heads.
        slopes: [heads] ALiBi slopes, or None. The bias is built in float32 (in bf16 the
            distances of far keys collapse) and cast to q's dtype after subtracting the query's
            own position, which softmax does not see but rounding does.
        window: positions that a query sees, its own among them; None for all before it.
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2).
    Returns:
        [1, heads, T, d]
    """
    documents = [t[0].transpose(0, 1).split(packing.lengths) for t in (q, k, v)]
    outs: list[torch.Tensor | None] = [None] * len(packing.lengths)
    for group in alike(packing.lengths):
        lengths = [packing.lengths[i] for i in group]
        # Padded at the end: causal attention never looks there, so it needs no mask.
        q_DhLd, k_DhLd, v_DhLd = (
            pad_sequence([part[i] for i in group], batch_first=True).transpose(1, 2)
            for part in documents
        )
        longest = max(lengths)
        windowed = window is not None and window < longest
        # Causality alone is left to the kernel, which then skips what no query sees.
        mask = _bias(longest, slopes, window, q) if slopes is not None or windowed else None
        if softcap:
            mask = _bias(longest, slopes, window, q)
            out_DhLd = _capped(q_DhLd, k_DhLd, v_DhLd, mask, scale or q.shape[-1] ** -0.5, softcap)
        else:
            out_DhLd = scaled_dot_product_attention(
                q_DhLd,
                k_DhLd,
                v_DhLd,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
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


def _bias(
    length: int, slopes: torch.Tensor | None, window: int | None, like: torch.Tensor
) -> torch.Tensor:
    """What is added to the scores, [heads or 1, length, length]: ALiBi, causality, the window."""
    at = torch.arange(length, device=like.device)
    distance = at[None, :] - at[:, None]
    unseen = distance > 0
    if window is not None:
        unseen |= distance <= -window
    bias = torch.zeros(1, length, length, device=like.device)
    if slopes is not None:
        bias = slopes.float()[:, None, None] * distance
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


def _packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    if packing is None:
        raise ValueError(f"{type(module).__name__} did not hand the packing to its attention")
    if unknown := [name for name in _UNKNOWN if others.get(name) is not None]:
        raise ValueError(
            f"{type(module).__name__} asks its attention for {', '.join(unknown)}, which packed "
            "attention does not have; this decoder is not supported yet"
        )
    out = per_document(
        query, key, value, packing, scale=scaling, window=sliding_window, softcap=softcap
    )
    return out.transpose(1, 2).contiguous(), None


# What some families hand to their attention to change its result.
_UNKNOWN = ("s_aux", "position_bias", "output_attentions")

AttentionInterface.register(NAME, _packed_attention)


class PackedBloomAttention(BloomAttention):
    """BLOOM's attention with a packed mode, which transformers lacks (ALiBi, no packing)."""

    packing: Packing | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        alibi: torch.Tensor,
        attention_mask: torch.Tensor,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.packing is None:
            return super().forward(
                hidden_states, residual, alibi, attention_mask, layer_past, use_cache
            )
        q, k, v = self._reshape(self.query_key_value(hidden_states))
        slopes = _get_alibi_slopes(self.num_heads, q.device)
        out = per_document(q, k, v, self.packing, scale=self.inv_norm_factor, slopes=slopes)
        out = out.transpose(1, 2).reshape(hidden_states.shape)
        return residual + self.dense(out), None


def prepare(decoder: PreTrainedModel) -> None:
    """Give a freshly loaded decoder its packed mode. Frozen BLOOM has no dropout to lose."""
    for module in decoder.modules():
        if type(module) is BloomAttention:
            module.__class__ = PackedBloomAttention


def set_packed(decoder: PreTrainedModel, packing: Packing | None) -> dict[str, Any]:
    """Switch `decoder` to the packed mode (or back, with None); returns its forward's extras.

    The switch stays until the next call, so that a recomputation in the backward pass
    (gradient checkpointing) sees what the forward saw.
    """
    config = decoder.config
    dense = getattr(config, "_hearken_dense", None)
    if dense is None:
        dense = config._hearken_dense = config._attn_implementation
    if decoder.config.model_type == "bloom":
        for module in decoder.modules():
            if isinstance(module, PackedBloomAttention):
                module.packing = packing
        # A name without a mask function keeps transformers from building a T x T mask.
        config._attn_implementation = dense if packing is None else NAME
        return {}
    config._attn_implementation = dense if packing is None else NAME
    return {} if packing is None else {"packing": packing}
