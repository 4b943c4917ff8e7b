"""Language-ID CTC: its labels, its loss against explicit logits, and its settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.collate import Batch, Clip, Sample, collate, dummy_batch
from data.languages import LanguageLabels
from data.prompts import Text
from tests import tiny
from tests.train import mix
from train import config as cfg
from train.ctc import language_ctc
from train.feed import open_feed
from train.loss import counted
from train.model.build import build

LANGUAGES = ["aa", "bb", "cc|dd"]
ADAPTER = {
    "kind": "ebranchformer", "inputs": 12, "width": 16, "heads": 2, "blocks": 3,
    "feed_forward": 24, "cgmlp": 32, "kernel": 7, "languages": LANGUAGES, "language_block": 2,
}  # fmt: skip
LOSSES = {"ce": 0.0, "ctc": {"weight": 0.8}, "language": {"weight": 0.2}}

# Slots, tokens of the transcript, class: with room for each, without, with none to say.
CLIPS = [(5, 2, 0), (7, 4, 2), (4, 4, 1), (6, 0, 1), (1, 1, 1), (5, 2, -1), (9, 3, 0)]
REPEATS = (2, 4, 2, 0, 1, 0, 3)


def told(clips: list[tuple[int, int, int]]) -> Batch:
    text = (Text((1,)), Text((2,), labelled=True))
    samples = [
        Sample(
            str(n), text, Clip(np.zeros(slots, np.float32), slots, slots, slots, "x", label),
            transcript=tuple(range(tokens)),
        )
        for n, (slots, tokens, label) in enumerate(clips)
    ]  # fmt: skip
    return collate(samples)


def test_a_language_is_said_once_a_token_as_often_as_fits() -> None:
    batch = told(CLIPS)
    assert batch.transcripts is not None
    assert batch.transcripts.repeats == REPEATS
    assert batch.transcripts.told.tolist() == [bool(n) for n in REPEATS]
    said = [c[2] + 1 for c, n in zip(CLIPS, REPEATS, strict=True) for _ in range(n)]
    assert batch.transcripts.languages.tolist() == said
    assert counted(batch, "language") == sum(REPEATS)
    silence = Clip(np.zeros(4, np.float32), 4, 4, 4)
    assert counted(dummy_batch(replace(silence, label=1)), "language") == 0
    assert counted(collate([Sample("t", (Text((7,)),))], silence=silence), "language") == 0


def test_it_is_torchs_own_on_explicit_logits() -> None:
    batch = told(CLIPS)
    assert batch.transcripts is not None
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(sum(batch.slots), 4, generator=generator).requires_grad_()
    twin = found.detach().clone().requires_grad_()
    loss = language_ctc(found, batch.slots, batch.transcripts)
    expected = torch.zeros(())
    for logits, (_, _, label), n in zip(twin.split(batch.slots), CLIPS, REPEATS, strict=True):
        if n:
            log_p = logits.log_softmax(-1)[:, None]
            said = torch.full((1, n), label + 1)
            sizes = torch.tensor([len(logits)]), torch.tensor([n])
            expected = expected + F.ctc_loss(log_p, said, *sizes, reduction="sum")
    assert loss.isfinite()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(found.grad, twin.grad)
    silent = [bool(part.any()) for part in found.grad.split(batch.slots)]
    assert silent == [bool(n) for n in REPEATS]


def test_codes_of_one_language_are_one_class() -> None:
    labels = LanguageLabels(["en", "cmn|zh", "rm-vallader"])
    codes = ["en", "en_us", "EN-GB", "cmn_hans_cn", "zh-TW", "rm-vallader", "rm-sursilv", ""]
    assert [labels(code) for code in codes] == [0, 0, 0, 1, 1, 2, -1, -1]
    assert labels.unknown(["xx", "en", "xx", "de"]) == ["de", "xx"]
    with pytest.raises(ValueError, match=r"language 'b' is in 'a\|b' already"):
        LanguageLabels(["a|b", "b"])


class World(mix.Samples):
    """The samples of the losses' tests, in three languages, before a BLOOMZMMS adapter."""

    def __init__(self, root: Path, losses: dict[str, Any]):
        tiny.encoder(root / "encoder")
        tiny.llm(root / "llm")
        tree = tiny.config(root) | {"losses": losses}
        tree["model"]["adapter"] = ADAPTER
        self.config = cfg.parse(tree, "tiny")
        self.model = build(self.config.model, "fp32", seed=3, losses=self.config.losses)
        super().__init__(self.config)
        self.all = [
            replace(s, clip=replace(s.clip, label=n % 3), transcript=s.transcript[: 1 + n])
            for n, s in enumerate(self.all)
            if s.clip
        ]


def test_packed_equals_one_by_one_and_each_parameter_takes_part(tmp_path: Path) -> None:
    world = World(tmp_path, LOSSES | {"ce": 1.0})
    assert list(world.model.losses.weights) == ["ce", "ctc", "language"]
    numbers = [0, 2, 3, 4]  # the second is too short for a slot here
    expected_sums, expected = mix.gradients(world.model, [world.pack([n]) for n in numbers])
    assert (expected_sums > 0).all()
    assert all(gradient.any() for gradient in expected.values())
    for order in (numbers, numbers[::-1]):
        sums, found = mix.gradients(world.model, [world.pack(order)])
        torch.testing.assert_close(sums, expected_sums, rtol=5e-6, atol=0)
        for name, gradient in expected.items():
            atol = 4 * 2e-5 + 1e-5 * gradient.abs().max().item()
            torch.testing.assert_close(found[name], gradient, rtol=5e-5, atol=atol)


def test_what_is_heard_behind_the_head_depends_on_what_it_tells(tmp_path: Path) -> None:
    """Self-conditioning: without the loss, too, as in the stage that follows (ce alone)."""
    world = World(tmp_path, {"ce": 1.0})
    _, found = mix.gradients(world.model, [world.pack([2, 3, 4])])
    assert found["adapter.language.tell.weight"].any()
    assert found["adapter.language.condition.weight"].any()


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    tree = tiny.config(tmp_path)
    with pytest.raises(cfg.ConfigError, match="needs an adapter that tells languages apart"):
        cfg.parse(tree | {"losses": LOSSES}, "tiny")
    with pytest.raises(cfg.ConfigError, match="every loss is off, but for languages"):
        cfg.parse(tree | {"losses": {"ce": 0.0, "language": {}}}, "tiny")


def test_a_language_without_a_class_is_named_at_the_start(tmp_path: Path) -> None:
    tiny.shards(tmp_path, count=4)
    tiny.encoder(tmp_path / "encoder")
    tiny.llm(tmp_path / "llm")
    tree = tiny.config(tmp_path) | {"losses": LOSSES}
    tree["model"]["adapter"] = ADAPTER
    tree["data"]["targets"] = [str(given_targets(tmp_path) / "*.tar")]
    with pytest.raises(cfg.ConfigError, match=r"speech in en, which model\.adapter\.languages"):
        open_feed(cfg.parse(tree, "tiny"))
    tree["model"]["adapter"] = ADAPTER | {"languages": ["xx", "en|de"]}
    stream = open_feed(cfg.parse(tree, "tiny")).stream
    (batch,) = next(iter(stream.steps(0)))[:1]
    assert set(batch.transcripts.languages.tolist()) == {2}


def given_targets(root: Path) -> Path:
    """Transcripts as targets, without a run."""
    from data.shards import ShardSet, write_overlay

    base = ShardSet.open(root / "shards")
    target = {"instruction": "", "template": "t", "ids": [9, 10], "text": "", "finished": True}
    items = ((key, {"targets": [target]}) for key in base.keys.to_pylist())
    write_overlay(root / "targets/targets-000000.tar", items, base=base)
    return root / "targets"
