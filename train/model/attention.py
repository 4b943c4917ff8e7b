"""Decoder attention over a packed batch: every document attends to itself alone.

A packed batch is one row of T positions that hold D documents one after another. Two modes,
switched by `set_packed`: in training the decoder runs packed, through one of `model.kernels`; to
generate it runs on a padded batch with a cache, as transformers does it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.models.bloom.modeling_bloom import BloomAttention, _get_alibi_slopes

from train.model.kernels import Name, Packing, Scores, attend

NAME = "hearken_packed"


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
    causal: bool = True,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    if packing is None:
        raise ValueError(f"{type(module).__name__} did not hand the packing to its attention")
    asked = {name: value for name, value in others.items() if value is not None}
    if unknown := [name for name in _UNKNOWN if asked.get(name, False) is not False]:
        raise ValueError(
            f"{type(module).__name__} asks its attention for {', '.join(unknown)}, which packed "
            "attention does not have; this decoder is not supported yet"
        )
    scores = Scores(scaling or query.shape[-1] ** -0.5, None, sliding_window, softcap, causal)
    kernel: Name = getattr(module.config, "_hearken_kernel", "auto")
    out = attend(query, key, value, packing, scores, kernel)
    return out.transpose(1, 2).contiguous(), None


# What some families hand to their attention to change its result.
_UNKNOWN = ("s_aux", "position_bias", "output_attentions")

AttentionInterface.register(NAME, _packed_attention)


class PackedBloomAttention(BloomAttention):
    """BLOOM's attention with a packed mode, which transformers lacks (ALiBi, no packing)."""

    packing: Packing | None = None
    kernel: Name = "auto"

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
        scores = Scores(self.inv_norm_factor, _get_alibi_slopes(self.num_heads, q.device).float())
        out = attend(q, k, v, self.packing, scores, self.kernel)
        out = out.transpose(1, 2).reshape(hidden_states.shape)
        return residual + self.dense(out), None


def prepare(decoder: PreTrainedModel, kernel: Name = "auto") -> None:
    """Give a freshly loaded decoder its packed mode. Frozen BLOOM has no dropout to lose."""
    decoder.config._hearken_kernel = kernel
    for module in decoder.modules():
        if type(module) is BloomAttention:
            module.__class__ = PackedBloomAttention
            module.__dict__["kernel"] = kernel


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
