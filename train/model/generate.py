"""Batched generation from packed inputs: left-padded here, with transformers' own `generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from train.model.attention import set_packed


@dataclass(frozen=True)
class Answer:
    ids: tuple[int, ...]
    """Generated token ids, without the end-of-sequence token."""
    finished: bool
    """Whether the model ended by itself; False means the token limit cut it."""


@torch.no_grad()
def generate(
    decoder: PreTrainedModel,
    inputs_TH: torch.Tensor,
    lengths: tuple[int, ...],
    *,
    eos: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    num_beams: int = 1,
) -> list[Answer]:
    """One answer per document of `inputs_TH` [sum(lengths), H]; greedy at temperature 0."""
    set_packed(decoder, None)
    documents = list(inputs_TH.split(lengths))
    embeds = pad_sequence(documents, batch_first=True, padding_side="left")
    at = torch.arange(embeds.shape[1], device=embeds.device)
    sizes = torch.tensor(lengths, device=embeds.device)
    mask = (at[None, :] >= embeds.shape[1] - sizes[:, None]).long()
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    out: torch.Tensor = cast(Any, decoder).generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        eos_token_id=eos,
        pad_token_id=eos,
        **sampling,
    )
    answers = []
    for row in out.tolist():
        finished = eos in row
        answers.append(Answer(tuple(row[: row.index(eos)] if finished else row), finished))
    return answers


def to_text(tokenizer: PreTrainedTokenizerBase, answer: Answer) -> str:
    """The answer as text, without special tokens."""
    return str(tokenizer.decode(list(answer.ids), skip_special_tokens=True)).strip()
