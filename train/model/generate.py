"""Batched generation from packed inputs: left-padded here, with transformers' own `generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from train.model.attention import set_packed


@dataclass(frozen=True)
class Answer:
    ids: tuple[int, ...]
    """Generated token ids, without the end-of-sequence token."""
    finished: bool
    """Whether the model ended by itself; False means the token limit cut it."""


@dataclass(frozen=True)
class Sampling:
    """Sampling with random numbers that are each document's own.

    uniforms  float64 [D, max_new_tokens] in [0, 1): number n decides document d's token n
    """

    temperature: float
    uniforms: torch.Tensor


@torch.no_grad()
def generate(
    decoder: PreTrainedModel,
    inputs_TH: torch.Tensor,
    lengths: tuple[int, ...],
    *,
    eos: int,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    num_beams: int = 1,
    synced: bool = False,
) -> list[Answer]:
    """One answer per document of `inputs_TH` [sum(lengths), H]; greedy without `sampling`.

    It ends at `eos`, or at what else the model's own generation settings end at (a chat model's
    end of turn). Nothing else is taken from these: a penalty or a top-k that a checkpoint brings
    along would be part of the targets without anyone having said so.

    Args:
        synced: the decoder is partitioned over the ranks (ZeRO-3): all of them go on until the
            last one has ended. Every rank must then call this equally often.
    """
    set_packed(decoder, None)
    documents = list(inputs_TH.split(lengths))
    embeds = pad_sequence(documents, batch_first=True, padding_side="left")
    at = torch.arange(embeds.shape[1], device=embeds.device)
    sizes = torch.tensor(lengths, device=embeds.device)
    mask = (at[None, :] >= embeds.shape[1] - sizes[:, None]).long()
    ends = _ends(decoder, eos)
    out: torch.Tensor = cast(Any, decoder).generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=ends,
        pad_token_id=eos,
        logits_processor=[OwnNoise(sampling)] if sampling else None,
        synced_gpus=synced,
    )
    answers = []
    for row in out.tolist():
        end = next((n for n, token in enumerate(row) if token in ends), None)
        answers.append(Answer(tuple(row[:end]), end is not None))
    return answers


class OwnNoise(LogitsProcessor):
    """Leaves one token of each row, drawn from its distribution by a number of its own.

    transformers' sampling draws for the whole batch at once, so that what one row gets depends on
    the others. Here the token is the first whose cumulative probability exceeds the row's number,
    in float64, in which the sum of 250,000 probabilities keeps its order in any chunks.
    """

    def __init__(self, sampling: Sampling):
        self._sampling = sampling

    def __call__(self, ids_DN: torch.Tensor, scores_DV: torch.Tensor) -> torch.Tensor:
        # Generation from embeddings begins without ids, so their count is the token's number.
        uniforms_D1 = self._sampling.uniforms[:, ids_DN.shape[1], None].to(scores_DV.device)
        probs_DV = (scores_DV.double() / self._sampling.temperature).softmax(-1)
        sums_DV = probs_DV.cumsum(-1)
        # By the last sum rather than 1, so that rounding never leads past the last token.
        token_D1 = torch.searchsorted(sums_DV, uniforms_D1 * sums_DV[:, -1:], right=True)
        token_D1.clamp_(max=scores_DV.shape[1] - 1)
        return torch.full_like(scores_DV, float("-inf")).scatter_(1, token_D1, 0.0)


def _ends(decoder: PreTrainedModel, eos: int) -> list[int]:
    """`eos` first, then the model's own ends of sequence."""
    settings = decoder.generation_config
    own = settings.eos_token_id if settings is not None else None
    more = own if isinstance(own, list) else [own]
    return list(dict.fromkeys([eos, *(token for token in more if token is not None)]))


def to_text(tokenizer: PreTrainedTokenizerBase, answer: Answer) -> str:
    """The answer as text, without special tokens."""
    return str(tokenizer.decode(list(answer.ids), skip_special_tokens=True)).strip()
