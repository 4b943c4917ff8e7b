"""A sample's loss and gradient do not depend on how, or with whom, it was packed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.collate import Batch, Clip, Sample, collate, dummy_batch
from data.prompts import Prompt, Text
from data.stream import make_clip
from tests import tiny
from train import config as cfg
from train.model.build import build, length_rule, load_tokenizer
from train.model.encoder import Featurize
from train.model.speech_llm import SpeechLLM

PAIRS = [("wav2vec2", "llama"), ("wav2vec2", "bloom"), ("whisper", "gpt2")]

# Sums of some hundred float32 terms of order one, in two orders.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


class World:
    """A tiny model and clips of ugly lengths with random answers.

    Args:
        sections: of `model`: what is added to its encoder, adapter or decoder.
    """

    def __init__(self, root: Path, encoder: str, llm: str, /, **sections: dict[str, Any]):
        tiny.encoder(root / "encoder", encoder)
        tiny.llm(root / "llm", llm)
        tree = tiny.config(root)
        for name, section in sections.items():
            tree["model"][name] = tree["model"][name] | section
        config = cfg.parse(tree, "tiny")
        self.model = build(config.model, "fp32", seed=3)
        self.rule = length_rule(config.model)
        prompt = Prompt(load_tokenizer(config.model), config.prompt)
        featurize = Featurize(config.model.encoder.path)
        rng = np.random.default_rng(0)
        # One frame's worth of sound, primes, and a long one beside them.
        sizes = [self._shortest(), 1_009, 7_919, 16_001, 25_013, 3_001]
        self.clips = [
            make_clip(rng.normal(size=n).astype(np.float32), self.rule, featurize) for n in sizes
        ]
        self.documents = [
            (*prompt.with_speech("continue this", clip.slots), prompt.answer(answer, i % 2 == 0))
            for i, (clip, answer) in enumerate(
                (clip, rng.integers(9, 24, size=1 + 3 * i).tolist())
                for i, clip in enumerate(self.clips)
            )
        ]
        # One document that does not use its clip at all: text alone.
        self.clips.append(self.clips[1])
        self.documents.append((Text((1, 3, 9, 10)), Text((11, 12, 2), labelled=True)))

    def _shortest(self) -> int:
        return next(n for n in range(1, 10_000) if self.rule.slots(n))

    def pack(self, numbers: list[int], share: bool = True) -> Batch:
        made = [Sample(str(i), self.documents[i], self.clips[i]) for i in numbers]
        return collate(made, share=share)


def gradients(model: SpeechLLM, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(batch)
        loss.backward()
        total += loss.item()
    found = {name: p.grad.clone() for name, p in model.trained().items() if p.grad is not None}
    assert found.keys() == model.trained().keys()
    return total, found


@pytest.fixture(params=PAIRS, ids=["-".join(pair) for pair in PAIRS])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    return World(tmp_path, *request.param)


def test_packed_equals_one_by_one(world: World) -> None:
    numbers = list(range(len(world.documents)))
    one_by_one = gradients(world.model, [world.pack([i]) for i in numbers])
    for order, share in itertools.product((numbers, numbers[::-1]), (True, False)):
        batch = world.pack(order, share)
        assert bool(batch.num_shared) == share
        packed = gradients(world.model, [batch])
        assert packed[0] == pytest.approx(one_by_one[0], rel=2e-6)
        for name, expected in one_by_one[1].items():
            torch.testing.assert_close(packed[1][name], expected, **TOLERANCE)


def test_the_comparison_sees_documents_that_attend_across(world: World) -> None:
    batch = world.pack([2, 3, 4])
    right = gradients(world.model, [batch])[0]
    merged = gradients(world.model, [replace(batch, lengths=(sum(batch.lengths),))])[0]
    assert merged != pytest.approx(right, rel=1e-4)


def test_the_comparison_sees_positions_that_run_on(tmp_path: Path) -> None:
    # Learned absolute positions alone notice: rotary and ALiBi see only distances.
    world = World(tmp_path, "wav2vec2", "gpt2")
    batch = world.pack([2, 3, 4])
    right = gradients(world.model, [batch])[0]
    running = replace(batch, positions=torch.arange(len(batch.positions)))
    assert gradients(world.model, [running])[0] != pytest.approx(right, rel=1e-4)


def test_the_dummy_of_an_empty_bin_has_gradients_of_zero(world: World) -> None:
    silence = np.zeros(8_000, np.float32)
    featurize = Featurize(str(Path(world.model.encoder.model.name_or_path)))
    clip: Clip = make_clip(silence, world.rule, featurize)
    loss, found = gradients(world.model, [dummy_batch(clip)])
    assert loss == 0
    assert all(not grad.any() for grad in found.values())


def test_frozen_parts_are_frozen_and_asleep(world: World) -> None:
    world.model.train()
    names = set(world.model.trained())
    assert all(name.startswith(("adapter.", "embeddings.")) for name in names)
    frozen = [world.model.decoder, world.model.encoder]
    assert not any(module.training for part in frozen for module in part.modules())
    assert not any(p.requires_grad for part in frozen for p in part.parameters())


def test_slots_are_what_the_length_rule_says(world: World) -> None:
    batch = world.pack(list(range(6)))
    rows = world.model.listen(batch.features, batch.samples, batch.frames)
    assert rows.shape[0] == sum(world.rule.slots(n) for n in batch.samples)
    with torch.no_grad():
        frames = world.model.encoder(batch.features, batch.samples)
    assert frames.shape[1] >= max(batch.frames)
