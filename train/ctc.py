"""CTC over the LLM's whole vocabulary, whose output matrix is the frozen embedding table.

BLOOMZMMS (2404.10922), first stage: no decoder runs. A slot's logits are its products with every
token's embedding, and with a blank vector. CTC itself needs the probabilities of an utterance's
own tokens alone, so the rows are normalised in chunks, and the recursion runs over a compact
alphabet: blank, the transcript's distinct tokens, and all the rest as one symbol.

Shapes: R slots, H hidden, V vocabulary, C clips, S slots of the longest clip, A distinct tokens of
the richest transcript, U tokens of all transcripts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.loss import CHUNK_BYTES, Known

if TYPE_CHECKING:
    from data.collate import Transcripts


class EmbeddingCTC(nn.Module):
    """The blank, which is trained, and the loss.

    Args:
        scale: multiplies all logits; embeddings of a small norm make flat distributions.
        impl: `chunked`, or `plain` for the twin with explicit logits.
    """

    def __init__(self, hidden: int, scale: float = 1.0, impl: str = "chunked"):
        super().__init__()
        self.scale, self.impl = scale, impl
        self.blank = nn.Parameter(torch.zeros(hidden))

    def forward(
        self, slots_RH: Tensor, table: Tensor, slots: tuple[int, ...], transcripts: Transcripts
    ) -> Tensor:
        """Sum of the utterances' CTC losses, float32.

        Args:
            slots_RH: all clips' slots one after another, as they stand among text embeddings.
            table: [V, H] text embeddings.
            slots: [C] each clip's own, on the host.
        """
        if self.impl == "plain":
            return plain_ctc(slots_RH, table, self.blank, slots, transcripts, self.scale)
        known = chunked_ctc(slots_RH, table, self.blank, slots, transcripts, self.scale)
        return known.attach(slots_RH, self.blank)[0]


@torch.no_grad()
def chunked_ctc(
    slots_RH: Tensor,
    table: Tensor,
    blank_H: Tensor,
    slots: tuple[int, ...],
    transcripts: Transcripts,
    scale: float = 1.0,
    chunk_bytes: int | None = None,
) -> Known:
    """The loss with its gradients of `slots_RH` and `blank_H`; no [R, V] tensor is alive."""
    count, width = len(slots_RH), transcripts.ids.shape[1]
    clip_R = transcripts.clip_of_slot
    chunk_bytes = chunk_bytes or CHUNK_BYTES[table.device.type]
    rows = max(1, chunk_bytes // (4 * len(table)))
    blank_logit_R = scale * (slots_RH.float() @ blank_H.float())
    # Log probabilities of blank, own tokens, rest.
    log_p = torch.empty(count, width + 2, device=slots_RH.device)
    grad_RH = torch.empty(slots_RH.shape, dtype=torch.float32, device=slots_RH.device)
    for at in range(0, count, rows):
        part = slice(at, at + rows)
        logits_nV = (slots_RH[part] @ table.T).float()
        if scale != 1.0:
            logits_nV.mul_(scale)
        total_n = torch.logaddexp(logits_nV.logsumexp(-1), blank_logit_R[part])
        log_p[part, 0] = blank_logit_R[part] - total_n
        own = logits_nV.gather(1, transcripts.ids[clip_R[part]])
        log_p[part, 1:-1] = own - total_n[:, None]
        p_nV = logits_nV.sub_(total_n[:, None]).exp_()
        grad_RH[part] = p_nV.to(table.dtype) @ table
        del logits_nV, p_nV  # or they would be alive beside the next chunk's
    # Not minus infinity, whose difference to itself in the gradient of CTC is no number.
    log_p[:, 1:-1].masked_fill_(transcripts.unused[clip_R], -1e4)
    rest = 1 - log_p[:, :-1].exp().sum(-1)
    log_p[:, -1] = rest.clamp_min(1e-12).log()

    loss, occupancy = _recursion(log_p, slots, transcripts)
    # d loss / d logits = probabilities - occupancy: of the tokens, and of the blank.
    trained_R = transcripts.trained[clip_R]
    blank_R = (log_p[:, 0].exp() - occupancy[:, 0]) * trained_R
    own_ids = transcripts.ids[clip_R]
    rows = max(1, chunk_bytes // (4 * width * table.shape[1]))
    for at in range(0, count, rows):
        part = slice(at, at + rows)
        own_nAH = table[own_ids[part]].float()
        grad_RH[part] -= torch.einsum("na,nah->nh", occupancy[part, 1:-1], own_nAH)
    grad_RH *= trained_R[:, None]
    grad_RH += blank_R[:, None] * blank_H.float()
    grad_H = blank_R @ slots_RH.float()
    return Known(loss[None], (scale * grad_RH[None], scale * grad_H[None]))


def _recursion(
    log_p: Tensor, slots: tuple[int, ...], transcripts: Transcripts
) -> tuple[Tensor, Tensor]:
    """CTC's loss, and how long each symbol is expected to last in each slot, [R, A + 2]."""
    with torch.enable_grad():
        # The gradient that torch's CTC gives is right behind a softmax, and only there.
        leaf = log_p.detach().requires_grad_()
        normal = leaf.log_softmax(-1)
        loss = _by_torch(
            normal, slots, transcripts.targets, transcripts.lengths, transcripts.trained
        )
        (grad,) = torch.autograd.grad(loss, leaf)
    occupancy = normal.detach().exp() - grad
    return loss.detach(), occupancy * transcripts.trained[transcripts.clip_of_slot][:, None]


def _by_torch(
    log_p_RA: Tensor,
    slots: tuple[int, ...],
    targets: Tensor,
    lengths: tuple[int, ...],
    trained: Tensor,
) -> Tensor:
    """Sum of F.ctc_loss over the clips that are `trained`, bool [C]; symbol 0 is blank."""
    losses_C = F.ctc_loss(
        nn.utils.rnn.pad_sequence(list(log_p_RA.split(slots))),
        targets,
        torch.tensor(slots),
        torch.tensor(lengths),
        reduction="none",
    )
    return losses_C.masked_fill(~trained, 0.0).sum()


def language_ctc(logits_RK: Tensor, slots: tuple[int, ...], transcripts: Transcripts) -> Tensor:
    """Sum of the clips' CTC losses of their languages, float32.

    Args:
        logits_RK: of the blank and of each language, for all clips' slots one after another.
        slots: [C] each clip's own, on the host.
    """
    log_p = logits_RK.float().log_softmax(-1)
    return _by_torch(log_p, slots, transcripts.languages, transcripts.repeats, transcripts.told)


def plain_ctc(
    slots_RH: Tensor,
    table: Tensor,
    blank_H: Tensor,
    slots: tuple[int, ...],
    transcripts: Transcripts,
    scale: float = 1.0,
) -> Tensor:
    """The twin: F.ctc_loss on explicit logits of blank and vocabulary, by autograd."""
    output = torch.cat([blank_H[None].to(table.dtype), table])
    exact = torch.promote_types(table.dtype, torch.float32)
    log_p = (scale * (slots_RH @ output.T).to(exact)).log_softmax(-1)
    # Symbols of the compact alphabet are tokens again, one behind the blank.
    lengths = torch.tensor(transcripts.lengths)
    clip_U = torch.arange(len(slots)).repeat_interleave(lengths).to(table.device)
    tokens = transcripts.ids[clip_U, transcripts.targets - 1] + 1
    losses_C = F.ctc_loss(
        nn.utils.rnn.pad_sequence(list(log_p.split(slots))),
        tokens,
        torch.tensor(slots),
        lengths,
        reduction="none",
    )
    return losses_C.masked_fill(~transcripts.trained, 0.0).sum()
