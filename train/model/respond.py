"""A trained speech LLM, answering: what evaluation and `listen.py` share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from data.prompts import Prompt
from train import config as cfg
from train.model.attention import set_packed
from train.model.build import build, length_rule, load_tokenizer, whole
from train.model.encoder import Featurize
from train.model.generate import generate, to_text
from train.model.kernels import Packing
from train.model.options import OptionScore, score_options
from train.model.speech_llm import Gathered


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
            # What only a loss has trained (the blank of embedding-CTC) answers nothing.
            said = {name: w for name, w in weights.items() if not name.startswith("ctc.")}
            load_trained(self.model, said)
        self.rule = length_rule(config.model)
        self.tokenizer = load_tokenizer(config.model)
        self.prompt = Prompt(self.tokenizer, config.prompt)
        self._featurize = Featurize.of(config.model.encoder)

    @torch.no_grad()
    def listen(
        self, waves: list[np.ndarray], languages: tuple[str, ...] = ()
    ) -> list[torch.Tensor]:
        """Slots [R_i, H] of each waveform (float32 mono 16 kHz).

        Args:
            languages: each clip's, for an encoder with per-language adapters.
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
        return list(self.model.listen(padded, samples, frames, languages).split(slots))

    @torch.no_grad()
    def answer(
        self, questions: list[Question], *, max_new_tokens: int, num_beams: int = 1
    ) -> list[str]:
        """One answer per question; all of them generated in one batch."""
        if not questions:
            return []
        inputs_TH, lengths = self._inputs(questions)
        answers = generate(
            self.model.decoder,
            inputs_TH,
            lengths,
            eos=int(self.tokenizer.eos_token_id),
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
        )
        return [to_text(self.tokenizer, a) for a in answers]

    @torch.no_grad()
    def score(
        self, questions: list[Question], options: list[tuple[str, ...]]
    ) -> list[list[OptionScore]]:
        """The scores of each question's options, which are tokenised as they are written.

        All of them run in one batch, of as many rows as there are options.
        """
        if not questions:
            return []
        ids = [[self.prompt.encode(option) for option in given] for given in options]
        eos = int(self.tokenizer.eos_token_id)
        return score_options(self.model.decoder, *self._inputs(questions), ids, eos=eos)

    @torch.no_grad()
    def states(self, questions: list[Question]) -> torch.Tensor:
        """[questions, H] float32, on the CPU: the LLM's last hidden state where it is to answer."""
        inputs_TH, lengths = self._inputs(questions)
        positions = torch.cat([torch.arange(n) for n in lengths]).to(self.device)
        extras = set_packed(self.model.decoder, Packing.of(lengths, self.device))
        hidden_TH = self.model.decoder.get_decoder()(
            inputs_embeds=inputs_TH[None], position_ids=positions[None], use_cache=False, **extras
        ).last_hidden_state[0]
        return hidden_TH[torch.tensor(lengths).cumsum(0) - 1].float().cpu()

    def _inputs(self, questions: list[Question]) -> tuple[torch.Tensor, tuple[int, ...]]:
        """LLM inputs [T, H] of all prompts, one after another, and the length of each."""
        table = self.model.embeddings.table
        speech = [q.input for q in questions if isinstance(q.input, torch.Tensor)]
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
        rows_RH = torch.cat(speech) if speech else table.new_empty(0, table.shape[1])
        inputs_TH = self.model.embeddings(rows_RH, torch.tensor(source, device=self.device))
        return inputs_TH, tuple(lengths)


def load_trained(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], writable: Gathered = whole
) -> None:
    """Copy a checkpoint's weights into `model`'s trained parameters, rounding to their dtype.

    Args:
        writable: makes partitioned parameters whole, one by one, and keeps what is written.
    Raises:
        ConfigError: the two do not name the same parameters, or their shapes differ.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # The blank of a CTC loss is nothing to a model that was built without that loss.
    weights = {n: w for n, w in weights.items() if n in params or not n.startswith("ctc.")}
    if params.keys() != weights.keys():
        extra, missing = weights.keys() - params.keys(), params.keys() - weights.keys()
        raise cfg.ConfigError(
            f"checkpoint and model differ: only in the checkpoint {sorted(extra)}, only in the "
            f"model {sorted(missing)}"
        )
    for name, p in params.items():
        with torch.no_grad(), writable([p]):
            if p.shape != weights[name].shape:
                raise cfg.ConfigError(
                    f"checkpoint and model differ: {name} is {tuple(weights[name].shape)} in the "
                    f"checkpoint, {tuple(p.shape)} in the model; check the `model` section"
                )
            p.copy_(weights[name])
