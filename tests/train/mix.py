"""A tiny model, and samples that every loss has something to say about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.collate import Batch, Sample, Word, collate
from data.prompts import Prompt, Text
from data.stream import make_clip
from tests import tiny
from train import config as cfg
from train.model.build import build, length_rule, load_tokenizer
from train.model.encoder import Featurize
from train.model.speech_llm import SpeechLLM

ALL = {
    "ce": 1.0, "kl": {"weight": 0.5, "temperature": 2.0}, "ctc": {"weight": 0.3},
    "align": {"weight": 0.2},
}  # fmt: skip


class Samples:
    """What is collated, by number; `nothing_to_say` has no label, no transcript and no word, and
    the `written` have no clip."""

    def __init__(self, config: cfg.Config):
        rule = length_rule(config.model)
        prompt = Prompt(load_tokenizer(config.model), config.prompt)
        featurize = Featurize(config.model.encoder.path)
        rng = np.random.default_rng(0)
        self.all: list[Sample] = []
        for n, size in enumerate([7_919, 1_009, 25_013, 16_001, 12_345]):
            clip = make_clip(rng.normal(size=size).astype(np.float32), rule, featurize)
            spoken = tuple(rng.integers(9, 24, size=1 + 2 * n).tolist())
            said = prompt.answer(rng.integers(9, 24, size=2 + 3 * n).tolist(), n % 2 == 0)
            half = max(1, clip.slots // 2)
            words = (Word(0, half, spoken[:1]), Word(half, clip.slots - half, spoken[1:]))
            self.all.append(
                Sample(
                    str(n),
                    (*prompt.with_speech("continue this", clip.slots), said),
                    clip,
                    (*prompt.with_parts("continue this", (Text(spoken),)), said),
                    spoken,
                    words,
                )
            )
        self.silence = make_clip(np.zeros(8_000, np.float32), rule, featurize)
        silent = prompt.with_speech("continue this", self.silence.slots)
        self.nothing_to_say = Sample("silent", silent, self.silence, (Text((1, 9)),))
        self.written: list[Sample] = []
        for n in range(3):
            asked = Text(tuple(rng.integers(9, 24, size=1 + 4 * n).tolist()))
            said = prompt.answer(rng.integers(9, 24, size=2 + n).tolist(), True)
            document = (*prompt.with_parts("continue this", (asked,)), said)
            self.written.append(Sample(f"written {n}", document, read=document))

    def pack(self, numbers: list[int]) -> Batch:
        return collate([self.all[n] for n in numbers], share=True)

    def pack_written(self, numbers: list[int]) -> Batch:
        return collate([self.written[n] for n in numbers], silence=self.silence, share=True)


def config(
    root: Path, losses: dict[str, Any], train: str = "none", lora: bool = False
) -> cfg.Config:
    """Of models that `World` has made under `root`; without clipping, which would hide a scale."""
    tree = tiny.config(root, train__clip=1e9) | {"losses": losses}
    tree["data"]["words"] = ["words-*.tar"] * ("align" in losses)  # `Samples` has them at hand
    tree["model"]["decoder"] |= {"train": train, "lora": {} if lora else None}
    return cfg.parse(tree, "tiny")


class World(Samples):
    """The samples, and a model that is not partitioned."""

    def __init__(
        self,
        root: Path,
        losses: dict[str, Any],
        llm: str = "llama",
        train: str = "none",
        lora: bool = False,
    ):
        tiny.encoder(root / "encoder")
        tiny.llm(root / "llm", llm)
        self.config = config(root, losses, train, lora)
        self.model = build(self.config.model, "fp32", seed=3, losses=self.config.losses)
        super().__init__(self.config)


def gradients(
    model: SpeechLLM, batches: list[Batch]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sums of each loss over the batches, and the gradient of their plain sum."""
    model.zero_grad()
    total = torch.zeros(len(model.losses.weights))
    for batch in batches:
        sums = model(batch)
        sums.sum().backward()
        total += sums.detach()
    assert all(p.grad is not None for p in model.trained().values())
    return total, {n: p.grad.clone() for n, p in model.trained().items() if p.grad is not None}
