"""The decoder's output head, which also computes the losses of an answer, in chunks.

Whoever partitions parameters gathers them around a module's call. So the losses live inside the
head's own call: its weight is gathered once in the forward, on every rank, in the order in which
the modules run, whether a bin has labels or not. A frozen head is not gathered again: its
gradients are known when the forward ends, and are attached outside of the call. A trained one is,
since a parameter must be whole when its gradient arrives.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from train.loss import Divergence, Head, Known, chunked, liger, plain, shape_of

Kernel = Literal["auto", "chunked", "liger", "plain"]
log = logging.getLogger(__name__)


class LossHead(nn.Linear):
    """A linear head with a second way to be called; as a module it is what it was."""

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        label_ids: Tensor | None = None,
        teacher_LH: Tensor | None = None,
        *,
        ce: bool = True,
        kl: Divergence | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
        kernel: Kernel = "chunked",
    ) -> Tensor | tuple[Tensor, ...]:
        """Logits; or, given labels, sums [K] and gradients [K, L, H] (see `train.loss.chunked`),
        or, where the head is trained, the sums alone as a function of `hidden`."""
        if label_ids is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        backward = torch.is_grad_enabled()
        trained = backward and self.weight.requires_grad
        whole = Head(self.weight, self.bias, scale, softcap)
        # Liger cannot do without a label.
        if kernel == "liger" and backward and len(label_ids):
            known = liger(hidden, whole, label_ids, trained=trained)
        else:
            known = chunked(
                hidden,
                whole,
                label_ids,
                ce=ce,
                kl=kl,
                teacher_LH=teacher_LH,
                trained=trained,
                backward=backward,
            )
        if not trained:
            return known.sums, *known.grads
        inputs = (hidden, self.weight) if self.bias is None else (hidden, self.weight, self.bias)
        return (known.attach(*inputs),)


def prepare_head(decoder: PreTrainedModel) -> None:
    """Give the decoder's head its second way to be called, where it is a plain linear layer."""
    head = decoder.get_output_embeddings()
    if type(head) is nn.Linear:
        head.__class__ = LossHead


def answer_losses(
    decoder: PreTrainedModel,
    hidden_LH: Tensor,
    label_ids: Tensor,
    teacher_LH: Tensor | None,
    *,
    ce: bool,
    kl: Divergence | None,
    kernel: Kernel,
) -> Tensor:
    """Sums [K] over the labels of cross entropy and of KL, those that are asked for.

    Args:
        hidden_LH: the decoder's last hidden states at the positions that predict the labels.
        teacher_LH: the teacher's, for `kl`.
    Raises:
        ValueError, RuntimeError: see `choose`.
    """
    head, shape = decoder.get_output_embeddings(), shape_of(decoder.config)
    chosen = choose(kernel, head, hidden_LH.device.type, kl is not None)
    if chosen == "plain":
        form = Head(hidden_LH[:0], None, **shape)  # type: ignore[arg-type]
        logits_LV = form.shaped(head(hidden_LH))
        teacher_LV = None
        if teacher_LH is not None:
            with torch.no_grad():
                teacher_LV = form.shaped(head(teacher_LH))
        return plain(logits_LV, label_ids, ce=ce, kl=kl, teacher_LV=teacher_LV)
    made = head(hidden_LH, label_ids, teacher_LH, ce=ce, kl=kl, kernel=chosen, **shape)
    if len(made) == 1:
        sums: Tensor = made[0]
        return sums
    return Known(made[0], made[1:]).attach(hidden_LH)


def choose(kernel: Kernel, head: nn.Module, device: str, kl: bool) -> Kernel:
    """What computes the answer's losses; `auto` says once in the log what it chose.

    Raises:
        ValueError: what was asked for cannot do this loss or this head.
        RuntimeError: Liger-Kernel was asked for, and is not here.
    """
    ours = isinstance(head, LossHead)
    if kernel == "auto":
        kernel = "chunked" if ours else "plain"
        _say(kernel, type(head).__name__)
    if kernel != "plain" and not ours:
        raise ValueError(
            f"losses.kernel: {kernel} needs a plain linear head, found {type(head).__name__}; "
            "choose plain"
        )
    if kernel == "liger":
        if kl:
            raise ValueError("losses.kernel: liger does the cross entropy alone; choose chunked")
        if device != "cuda" or importlib.util.find_spec("liger_kernel") is None:
            raise RuntimeError(
                "losses.kernel: liger was asked for, but it needs CUDA and "
                "`pip install liger-kernel`; choose chunked"
            )
    return kernel


@functools.cache
def _say(kernel: str, head: str) -> None:
    log.info("losses at a %s: %s", head, kernel)
