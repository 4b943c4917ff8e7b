"""Losses of the answer, at the label positions alone and in chunks, and of the input.

The logits of all labels at once are the largest tensor of a step by far (1,500 labels of BLOOMZ:
1.5 GB in float32, and as much again for each of softmax and gradient). Here a chunk of rows is
taken through the head, through the loss and back to the hidden states before the next one; what
stays is the gradient of each loss, known as soon as the loss is. So the backward pass needs
neither logits nor, where it is frozen, the head.

Shapes: L labels, H hidden, V vocabulary, n rows of a chunk, K losses, R slots, W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

if TYPE_CHECKING:
    from data.collate import Batch

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
"""Float32 logits of one chunk; two to five times that is alive while it is worked on. A GPU needs
some hundred rows of BLOOMZ's 1 MB to be busy with its head, a CPU does not."""


@dataclass(frozen=True)
class Divergence:
    """KL(text‖speech), BLSP-KD (2405.19041): how far the LLM that hears is from itself reading.

    temperature  divides both sides' logits; the gradient is not rescaled by its square, as in
                 the published code
    top_k        only the teacher's k likeliest tokens, renormalised; the student's distribution
                 stays whole, so that what it spends elsewhere still costs
    """

    temperature: float = 2.0
    top_k: int | None = None


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: weight [V, H], bias [V], then scale and soft cap."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def raw(self, hidden_nH: Tensor) -> Tensor:
        return F.linear(hidden_nH, self.weight, self.bias)

    def shaped(self, raw_nV: Tensor) -> Tensor:
        """Float32 logits, [n, V]; a new tensor unless `raw_nV` is float32 and nothing is done."""
        logits = raw_nV.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def unshape(self, grad_nV: Tensor, logits_nV: Tensor) -> Tensor:
        """Gradient of the logits -> of the raw ones, in place."""
        if self.softcap is not None:
            grad_nV.mul_(1 - (logits_nV / self.softcap).square_())
        return grad_nV if self.scale == 1.0 else grad_nV.mul_(self.scale)


def shape_of(config: PretrainedConfig) -> dict[str, float | None]:
    """`scale` and `softcap` of a decoder's logits, beside its head (Gemma, Cohere, Granite)."""
    config = config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", 0) or 1)
    return {"scale": scale, "softcap": getattr(config, "final_logit_softcapping", None)}


@dataclass(frozen=True)
class Known:
    """Losses with their gradients, both known: `sums` [K], and [K, ...] for each input."""

    sums: Tensor
    grads: tuple[Tensor, ...]

    def attach(self, *inputs: Tensor) -> Tensor:
        """The sums [K] as a function of `inputs`, one for each of `grads`."""
        sums: Tensor = _Attached.apply(self.sums, self.grads, *inputs)
        return sums


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Tensor, grads: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        ctx.grads, ctx.dtypes = grads, [i.dtype for i in inputs]
        return sums.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale_K: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled before rounding to a low precision: the scale may be far from 1.
        found = [
            sum(s * g.float() for s, g in zip(scale_K, grad, strict=True)).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        return None, None, *found


@torch.no_grad()
def chunked(
    hidden_LH: Tensor,
    head: Head,
    label_ids: Tensor,
    *,
    ce: bool = True,
    kl: Divergence | None = None,
    teacher_LH: Tensor | None = None,
    trained: bool = False,
    backward: bool = True,
    chunk_bytes: int | None = None,
) -> Known:
    """Sums over the labels of cross entropy and of KL, those that are asked for, in this order.

    Args:
        hidden_LH: what the head gets at each label's position.
        label_ids: int64 [L].
        teacher_LH: the same of the teacher, for `kl`.
        trained: whether gradients of the head's weight and bias are wanted, too.
        backward: without it, there are sums alone.
    Returns:
        Float32 sums, and the gradients of `hidden_LH`, then of weight and bias if `trained`.
    """
    count, (vocabulary, _) = len(label_ids), head.weight.shape
    kinds = ce + (kl is not None)
    sums = torch.zeros(kinds, dtype=torch.float64, device=hidden_LH.device)
    d_hidden = hidden_LH.new_zeros(kinds, *hidden_LH.shape) if backward else None
    d_head = [
        p.new_zeros(kinds, *p.shape, dtype=torch.float32)
        for p in (head.weight, head.bias)
        if trained and backward and p is not None
    ]
    rows = max(1, (chunk_bytes or CHUNK_BYTES[hidden_LH.device.type]) // (4 * vocabulary))
    even = -(-count // max(1, -(-count // rows)))  # chunks of like size
    for at in range(0, count, max(1, even)):
        part = slice(at, at + even)
        raw_nV = head.raw(hidden_LH[part])
        logits_nV = head.shaped(raw_nV)
        del raw_nV
        for k in range(kinds):
            if ce and k == 0:
                loss, grad_nV = _cross_entropy(logits_nV, label_ids[part], backward)
            else:
                assert kl is not None
                assert teacher_LH is not None
                teacher_nV = head.shaped(head.raw(teacher_LH[part])).div_(kl.temperature)
                # In place where they are not needed again: it is the last loss of the chunk.
                divide = torch.div if head.softcap is not None else Tensor.div_
                student_nV = divide(logits_nV, kl.temperature)
                loss, grad_nV = _divergence(student_nV, teacher_nV, kl.top_k, backward)
                del student_nV, teacher_nV
            sums[k] += loss
            if d_hidden is None:
                continue
            grad_nV = head.unshape(grad_nV, logits_nV).to(head.weight.dtype)
            torch.mm(grad_nV, head.weight, out=d_hidden[k, part])
            if d_head:
                d_head[0][k] += grad_nV.T @ hidden_LH[part]
            if len(d_head) > 1:
                d_head[1][k] += grad_nV.sum(0, dtype=torch.float32)
            del grad_nV
        del logits_nV  # or it would be alive beside the next chunk's
    if kl is not None and d_hidden is not None:
        for grad in (d_hidden, *d_head):
            grad[-1] /= kl.temperature
    return Known(sums.float(), () if d_hidden is None else (d_hidden, *d_head))


def _cross_entropy(logits_nV: Tensor, ids: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """Sum of the rows' cross entropies, and its gradient (their log softmax, if not wanted)."""
    log_p = F.log_softmax(logits_nV, -1)
    loss = -log_p.gather(1, ids[:, None]).sum(dtype=torch.float64)
    if backward:
        log_p.exp_().scatter_add_(1, ids[:, None], log_p.new_full((len(ids), 1), -1.0))
    return loss, log_p


def _divergence(
    student_nV: Tensor, teacher_nV: Tensor, top_k: int | None, backward: bool
) -> tuple[Tensor, Tensor]:
    """Sum of the rows' KL(teacher‖student), and its gradient of the student's logits.

    Both are divided by the temperature already; the teacher's are overwritten.
    """
    log_q = F.log_softmax(student_nV, -1)
    if top_k is None or top_k >= teacher_nV.shape[1]:
        log_p = F.log_softmax(teacher_nV, -1)
        p = torch.exp(log_p, out=teacher_nV)
        loss = torch.linalg.vecdot(p, log_p.sub_(log_q)).sum(dtype=torch.float64)
        if backward:
            log_q.exp_().sub_(p)
        return loss, log_q
    top, ids = teacher_nV.topk(top_k, -1)
    log_p = F.log_softmax(top, -1)
    p = log_p.exp()
    loss = torch.linalg.vecdot(p, log_p - log_q.gather(1, ids)).sum(dtype=torch.float64)
    if backward:
        log_q.exp_().scatter_add_(1, ids, -p)
    return loss, log_q


def liger(hidden_LH: Tensor, head: Head, label_ids: Tensor, *, trained: bool = False) -> Known:
    """The cross entropy of `chunked` by Liger-Kernel (2410.10989), which needs CUDA.

    Its logits and their gradients are rounded to the head's precision, as in transformers.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    with torch.enable_grad():
        leaf = hidden_LH.detach().requires_grad_()
        inputs = [leaf, *(p for p in (head.weight, head.bias) if trained and p is not None)]
        scaled = leaf if head.scale == 1.0 else leaf * head.scale
        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=head.softcap)
        loss = fused(head.weight, scaled, label_ids, head.bias)
        grads = torch.autograd.grad(loss, inputs)
    return Known(loss.detach().float()[None], tuple(grad[None] for grad in grads))


def plain(
    logits_LV: Tensor,
    label_ids: Tensor,
    *,
    ce: bool = True,
    kl: Divergence | None = None,
    teacher_LV: Tensor | None = None,
) -> Tensor:
    """The twin of `chunked` on explicit logits (as `Head.shaped` gives them), by autograd."""
    sums = []
    if ce:
        sums.append(F.cross_entropy(logits_LV.float(), label_ids, reduction="sum"))
    if kl is not None:
        assert teacher_LV is not None
        log_q = F.log_softmax(logits_LV.float() / kl.temperature, -1)
        teacher = teacher_LV.float() / kl.temperature
        if kl.top_k is not None and kl.top_k < teacher.shape[1]:
            kth = teacher.topk(kl.top_k, -1).values[:, -1:]
            teacher = teacher.masked_fill(teacher < kth, float("-inf"))
        sums.append(F.kl_div(log_q, teacher.softmax(-1), reduction="sum"))
    return torch.stack(sums)


def alignment(
    slots_RH: Tensor,
    tokens_EH: Tensor,
    slot_rows: Tensor,
    slot_starts: Tensor,
    token_starts: Tensor,
    distance: str,
) -> Tensor:
    """Sum over words of the distance between what is heard of a word and how it is written.

    Args:
        slots_RH: all slots, as they stand among the text embeddings.
        tokens_EH: embeddings of the words' tokens, word after word.
        slot_rows: int64, rows of the words' slots, word after word.
        slot_starts, token_starts: int64 [W], where each word begins in these two.
        distance: `cosine`: 1 - cosine; `l2`: squared Euclidean.
    """
    heard_WH = F.embedding_bag(slot_rows, slots_RH.float(), slot_starts, mode="mean")
    at = torch.arange(len(tokens_EH), device=tokens_EH.device)
    read_WH = F.embedding_bag(at, tokens_EH.float(), token_starts, mode="mean")
    if distance == "cosine":
        return (1 - F.cosine_similarity(heard_WH, read_WH, dim=-1)).sum()
    return (heard_WH - read_WH).square().sum()


def mixed(sums_K: Tensor, weights: Sequence[float], counts: Sequence[float]) -> Tensor:
    """What a step descends: each loss divided by its own count in the step, times its weight.

    A loss that counts nothing in a step, for all its samples were skipped, is zero there.
    """
    parts = zip(sums_K.unbind(), weights, counts, strict=True)
    return torch.stack([loss * (weight / max(1.0, count)) for loss, weight, count in parts]).sum()


def counted(batch: Batch, loss: str) -> int:
    """What this loss is a mean over, in one batch; nothing in a dummy."""
    return {
        "ce": batch.num_labels,
        "kl": batch.num_labels,
        "ctc": batch.num_transcript_tokens,
        "language": batch.num_language_labels,
        "align": batch.num_words,
    }[loss]
