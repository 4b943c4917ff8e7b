"""The decoder's layers run again in the backward pass: the forward keeps their inputs alone.

Activation checkpointing (1604.06174) of an LLM that is mostly frozen, in eval mode. transformers'
own (`gradient_checkpointing_enable`) acts on layers in training mode alone, which ours never are.

What it saves: of each layer all but its input, [T, H] in the run's precision, of which a Llama
layer keeps about 16 times as much; one layer at a time is whole again in the backward pass. A
frozen weight needs no gradient, so neither pass keeps the input of its product (torch's linear
does not, and `train.engine` keeps DeepSpeed's from it). What it costs: the layers' forward once
more, 2 operations a weight and position beside the 4 of a frozen LLM and the 6 of a trained one.

Where nothing needs a gradient nothing is run again: not in a pass without gradients (the teacher
of `losses.kl`, validation), and not in the layers in front of the first one that has something to
train or gets an input with a gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


class RecomputedLayer(nn.Module):
    """What is put in front of a layer's own class. Training only: a cache would grow twice."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        once = functools.partial(super().forward, **kwargs)
        given = [*tree_leaves((args, kwargs)), *self.parameters()]
        if not torch.is_grad_enabled() or not any(_needs_gradient(each) for each in given):
            return once(*args)
        if any(hasattr(p, "ds_id") for p in self.parameters()):
            once = functools.partial(_asking_first, once)
        # The forward and not the whole call: DeepSpeed's hooks of the layer stay outside. Random
        # state is kept, for families that draw in eval mode as well.
        return checkpoint(once, *args, use_reentrant=False, preserve_rng_state=True)


def recompute_layers(decoder: PreTrainedModel) -> None:
    """Have every layer of a decoder keep its input alone.

    Raises:
        ValueError: its layers are not found.
    """
    for layer in layers_of(decoder):
        kind = type(layer)
        layer.__class__ = type(f"Recomputed{kind.__name__}", (RecomputedLayer, kind), {})


def layers_of(decoder: PreTrainedModel) -> nn.ModuleList:
    """The list that has as many modules as the decoder's config has layers."""
    count = decoder.config.get_text_config().num_hidden_layers
    for module in decoder.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"model.decoder.checkpointing: {type(decoder).__name__} has no list of {count} layers; "
        "leave it off"
    )


def _needs_gradient(given: Any) -> bool:
    return isinstance(given, Tensor) and given.requires_grad


def _asking_first(once: Callable[..., Any], *args: Any) -> Any:
    """A partitioned layer, run again as the first thing that its backward does.

    Left alone, torch runs it again where a tensor is first missing, inside the backward of the
    layer's last product, and ends in the middle of that product's forward, past DeepSpeed's hooks.
    What is gathered for it would be released with that one module and gathered a third time. So
    it is DeepSpeed's backward of the whole layer that all frozen weights gathered here are held
    for: they are gathered twice a micro-batch, as without recomputation, on every rank in the
    order of the modules.
    """
    out = once(*args)
    if isinstance(out, tuple):
        return (_Asking.apply(out[0]), *out[1:])
    return _Asking.apply(out)


class _Asking(torch.autograd.Function):
    """The identity, whose backward asks for a saved tensor (of no size) before all others do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.new_empty(0))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        _ = ctx.saved_tensors
        return grad
