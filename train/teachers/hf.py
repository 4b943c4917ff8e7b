"""The teacher that generates here: the frozen LLM, whole on every rank or partitioned over all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from train.model.generate import Answer, Sampling, generate
from train.teachers.journal import Answered
from train.teachers.part import Question


class Generator:
    """Answers batch by batch.

    Args:
        synced: the decoder is partitioned, so every rank generates as often as all others.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        temperature: float,
        device: torch.device,
        synced: bool = False,
    ):
        self._decoder, self._device, self._synced = decoder, device, synced
        self._eos = int(tokenizer.eos_token_id)
        self._limit, self._temperature = max_new_tokens, temperature

    def answers(
        self, batches: Sequence[Sequence[Question]], rounds: int
    ) -> Iterator[list[Answered]]:
        """The answers to one batch after another; `rounds` is the most that any rank has."""
        for batch in batches:
            yield list(zip(batch, self._generate(batch), strict=True))
        if self._synced:
            idle = Question("", 0, (self._eos,), "", "")
            for _ in range(rounds - len(batches)):
                self._generate([idle])

    @torch.no_grad()
    def _generate(self, batch: Sequence[Question]) -> list[Answer]:
        ids = torch.tensor([i for question in batch for i in question.ids], device=self._device)
        sampling = None
        if self._temperature:
            numbers = [torch.from_numpy(question.uniforms(self._limit)) for question in batch]
            sampling = Sampling(self._temperature, torch.stack(numbers))
        return generate(
            self._decoder,
            self._decoder.get_input_embeddings()(ids),
            tuple(len(question.ids) for question in batch),
            eos=self._eos,
            max_new_tokens=self._limit,
            sampling=sampling,
            synced=self._synced,
        )
