"""Which of some given answers the LLM finds most probable after a prompt.

The prompts run once, and their keys and values serve all options. Q questions, P prompt positions
(padded at the start), R options of all questions, L option tokens (padded at the end), V
vocabulary, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from train.model.attention import set_packed

Normalised = Literal["sum", "mean"]


@dataclass(frozen=True)
class OptionScore:
    """Log probability (natural) of an answer's tokens and of its end, and how many these are."""

    log_probability: float
    tokens: int

    def by(self, normalised: Normalised) -> float:
        """The whole answer's log probability (`sum`), or its mean over tokens."""
        return self.log_probability / (self.tokens if normalised == "mean" else 1)


@torch.no_grad()
def score_options(
    decoder: PreTrainedModel,
    inputs_TH: torch.Tensor,
    lengths: Sequence[int],
    options: Sequence[Sequence[Sequence[int]]],
    *,
    eos: int,
) -> list[list[OptionScore]]:
    """Scores of each question's options, as token ids without the end of sequence.

    Args:
        inputs_TH: the prompts one after another, `lengths` positions each.
        options: at least one for each question; all of them run as one batch.
    """
    set_packed(decoder, None)
    device = inputs_TH.device
    prompts = pad_sequence(
        list(inputs_TH.split(list(lengths))), batch_first=True, padding_side="left"
    )
    sizes = torch.tensor(lengths, device=device)
    longest = prompts.shape[1]
    at = torch.arange(longest, device=device) - (longest - sizes)[:, None]
    heard = (at >= 0).long()
    read: Any = decoder(
        inputs_embeds=prompts,
        attention_mask=heard,
        position_ids=at.clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    question = [q for q, found in enumerate(options) for _ in found]
    rows = torch.tensor(question, device=device)
    ids = [torch.tensor(ids, dtype=torch.long) for found in options for ids in found]
    tokens_RL = pad_sequence(ids, batch_first=True, padding_value=eos).to(device)
    counts = torch.tensor([len(i) for i in ids], device=device)
    width = tokens_RL.shape[1]
    first_QV = read.logits[:, -1].float().log_softmax(-1)
    logs_RLV = first_QV[rows][:, None]
    if width:
        cache = read.past_key_values
        cache.batch_select_indices(rows)
        steps = torch.arange(width, device=device)
        out: Any = decoder(
            input_ids=tokens_RL,
            attention_mask=torch.cat([heard[rows], torch.ones_like(tokens_RL)], dim=1),
            position_ids=sizes[rows][:, None] + steps,
            past_key_values=cache,
            use_cache=True,
        )
        logs_RLV = torch.cat([logs_RLV, out.logits.float().log_softmax(-1)], dim=1)
    # An option's tokens are followed by its end; what stands after that is padding.
    ends = torch.full_like(tokens_RL[:, :1], eos)
    said_RL = torch.cat([tokens_RL, ends], dim=1)
    logs_RL = logs_RLV.gather(2, said_RL[..., None])[..., 0]
    counted = torch.arange(width + 1, device=device) <= counts[:, None]
    sums = logs_RL.masked_fill(~counted, 0).sum(1).tolist()
    found: list[list[OptionScore]] = [[] for _ in options]
    for q, total, count in zip(question, sums, counts.tolist(), strict=True):
        found[q].append(OptionScore(total, count + 1))
    return found
