"""From clips to slots: encoder, weighted layers, adapter.

Shapes: C clips, F encoder frames (padded), E channels, R slots, H LLM width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from train.model.encoder import LayerSum, SpeechEncoder, StoredStates
from train.ops import Segments


def hear(
    encoder: SpeechEncoder | StoredStates,
    layer_sum: LayerSum | None,
    adapter: nn.Module,
    dtype: torch.dtype,
    features: torch.Tensor,
    samples: tuple[int, ...],
    frames: tuple[int, ...],
    languages: tuple[str, ...] = (),
    **wanted: Literal[True],
) -> Any:
    """Slots [R, H] of all clips, one after another, before the last LayerNorm.

    Args:
        layer_sum: of the encoder's layers; None hears the last one.
        dtype: of the adapter, which may be float32 over a bf16 encoder.
        features: the encoder's input of each clip, padded at the end (see `SpeechEncoder`).
        samples, frames: each clip's own length in samples and in encoder frames.
        languages: each clip's, for an encoder with per-language adapters.
        wanted: `with_languages`, for an adapter that tells them apart: its logits, too.
    """
    if layer_sum is None:
        frames_CFE = encoder(features, samples, languages)
    else:
        assert isinstance(encoder, SpeechEncoder)  # the configuration stores no layers
        frames_CFE = layer_sum(*encoder.layers(features, samples, languages))
    segments = Segments.padded(frames, frames_CFE.shape[1], frames_CFE.device)
    return adapter(frames_CFE.flatten(0, 1).to(dtype), segments, **wanted)
