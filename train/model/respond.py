"""A trained speech LLM, answering: what evaluation and `listen.py` share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from data.prompts import Prompt
from train import config as cfg
from train.model.build import build, length_rule, load_tokenizer
from train.model.encoder import Featurize
from train.model.generate import generate, to_text


@dataclass(frozen=True)
class Question:
    """An instruction, and its input: text, or a clip's slots (as `Responder.listen` gives)."""

    instruction: str
    input: str | torch.Tensor


class Responder:
    """The model with everything around it: features in, text out.

    Args:
        weights: what a checkpoint holds; None leaves the adapter untrained.
    """

    def __init__(
        self,
        config: cfg.Config,
        weights: dict[str, torch.Tensor] | None,
        device: torch.device | str = "cpu",
    ):
        self.device = torch.device(device)
        self.model = build(
            config.model, config.train.precision, seed=config.run.seed, device=device
        )
        self.model.eval()
        if weights is not None:
            load_trained(self.model, weights)
        self.rule = length_rule(config.model)
        self.tokenizer = load_tokenizer(config.model)
        self.prompt = Prompt(self.tokenizer, config.prompt)
        self._featurize = Featurize(config.model.encoder.path)

    @torch.no_grad()
    def listen(self, waves: list[np.ndarray]) -> list[torch.Tensor]:
        """Slots [R_i, H] of each waveform (float32 mono 16 kHz).

        Raises:
            ValueError: a clip is too short to fill one slot.
        """
        samples = tuple(len(w) for w in waves)
        slots = [int(self.rule.slots(n)) for n in samples]
        for n, count in zip(samples, slots, strict=True):
            if count == 0:
                raise ValueError(f"a clip of {n / 16:.0f} ms is too short for the encoder")
        features = [torch.from_numpy(self._featurize(w)) for w in waves]
        # Padding at the end of the last axis, whether it is samples or mel frames.
        padded = pad_sequence([f.movedim(-1, 0) for f in features], batch_first=True)
        padded = padded.movedim(1, -1).to(self.device)
        frames = tuple(int(self.rule.frames(n)) for n in samples)
        return list(self.model.listen(padded, samples, frames).split(slots))

    @torch.no_grad()
    def answer(
        self, questions: list[Question], *, max_new_tokens: int, num_beams: int = 1
    ) -> list[str]:
        """One answer per question; all of them generated in one batch."""
        if not questions:
            return []
        hidden = self.model.embeddings.table.shape[1]
        speech = [q.input for q in questions if isinstance(q.input, torch.Tensor)]
        empty = self.model.embeddings.table.new_empty(0, hidden)
        source: list[int] = []
        lengths, row = [], 0
        for question in questions:
            prefix, suffix = self.prompt.parts(question.instruction)
            if isinstance(question.input, torch.Tensor):
                count = question.input.shape[0]
                ids = [*prefix, *(-(row + i) - 1 for i in range(count)), *suffix]
                row += count
            else:
                ids = self.prompt.with_text(question.instruction, question.input)
            source += ids
            lengths.append(len(ids))
        rows_RH = torch.cat(speech) if speech else empty
        inputs_TH = self.model.embeddings(rows_RH, torch.tensor(source, device=self.device))
        answers = generate(
            self.model.decoder,
            inputs_TH,
            tuple(lengths),
            eos=int(self.tokenizer.eos_token_id),
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
        )
        return [to_text(self.tokenizer, a) for a in answers]


def load_trained(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copy a checkpoint's weights into `model`'s trained parameters, rounding to their dtype.

    Raises:
        ValueError: the two do not name the same parameters, or their shapes differ.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if params.keys() != weights.keys():
        extra, missing = weights.keys() - params.keys(), params.keys() - weights.keys()
        raise ValueError(
            f"checkpoint and model differ: only in the checkpoint {sorted(extra)}, only in the "
            f"model {sorted(missing)}"
        )
    with torch.no_grad():
        for name, p in params.items():
            if p.shape != weights[name].shape:
                raise ValueError(
                    f"checkpoint and model differ: {name} is {tuple(weights[name].shape)} in the "
                    f"checkpoint, {tuple(p.shape)} in the model; check model.adapter"
                )
            p.copy_(weights[name])
