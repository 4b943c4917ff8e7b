"""Adapters: encoder frames in, LLM slots out.

An adapter is a module `forward(x_NC, segments) -> slots [R, H]`: `segments` finds each clip's
frames in `x_NC`, and all clips' slots come out one after another, as many as `geometry` says. A
clip's slots depend on its own frames alone. The last LayerNorm is not here: `SpeechEmbeddings`
applies it while it places the slots among the text tokens, in one op.

Shapes: N rows of encoder frames, R rows of slots, C encoder channels, H LLM width.
"""

from __future__ import annotations

from torch import nn

from train import config as cfg
from train.model.adapters import conv, ebranchformer, stack_mlp
from train.model.lengths import Conv
from train.ops.library import Impl


def geometry(adapter: cfg.Adapter) -> tuple[Conv, ...]:
    """An adapter's length arithmetic, frames -> slots, from its configuration alone."""
    match adapter:
        case cfg.ConvAdapter():
            return conv.geometry(adapter)
        case cfg.StackMLPAdapter():
            return stack_mlp.geometry(adapter)
        case cfg.EBranchformerAdapter():
            return ebranchformer.GEOMETRY


def make(adapter: cfg.Adapter, channels: int, hidden: int, impl: Impl = "auto") -> nn.Module:
    """A new adapter from `channels` [C] to the LLM's width `hidden` [H]."""
    match adapter:
        case cfg.ConvAdapter():
            return conv.ConvAdapter(adapter, channels, hidden, impl)
        case cfg.StackMLPAdapter():
            return stack_mlp.StackMLP(adapter, channels, hidden)
        case cfg.EBranchformerAdapter():
            return ebranchformer.EBranchformer(adapter, channels, hidden)
