"""A loss or gradient that is not finite: no update, the samples named, the step replayed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.launch import launch, python
from tests.train.conftest import Workspace
from train import checkpoint as ckpt
from train import config as cfg
from train.feed import open_feed

STEPS = 6


@dataclass(frozen=True)
class Poisoned:
    """A run whose LLM is NaN at a position that only its longest documents reach."""

    workspace: Workspace
    changes: dict[str, Any]
    steps: dict[int, list[str]]
    """Global step -> keys of the documents that reach it, of the first `STEPS`."""
    keys: dict[int, list[str]]
    """Global step -> keys of all its documents."""

    def config(self, name: str) -> Path:
        path = self.workspace.config(name, **self.changes)
        return tiny.write_config(path, _with_llm(path, self.workspace.root / "gpt2"))


def _with_llm(path: Path, llm: Path) -> dict[str, Any]:
    tree = cfg.load(path).resolved()
    tree["model"]["decoder"]["path"] = str(llm)
    return tree


@pytest.fixture(scope="module")
def poisoned(workspace: Workspace) -> Poisoned:
    llm = tiny.llm(workspace.root / "gpt2", "gpt2")
    changes = {
        "data__tokens_per_bin": 60, "data__bins_per_step": 2, "train__schedule": "constant",
        "train__checkpoint_every": 1,
    }  # fmt: skip
    here = Poisoned(workspace, changes, {}, {})
    feed = open_feed(cfg.load(here.config("poisoned")))
    bins = [b for step in feed.stream.steps(0) for b in step if b.keys]  # no dummies
    longest = sorted(length for b in bins for length in b.lengths)[-2]
    model = AutoModelForCausalLM.from_pretrained(llm)
    with torch.no_grad():
        model.transformer.wpe.weight[longest - 1] = torch.nan
    model.save_pretrained(llm)
    for b in bins:
        if b.step < STEPS:
            bad = [k for k, n in zip(b.keys, b.lengths, strict=True) if n >= longest]
            here.keys.setdefault(b.step, []).extend(b.keys)
            if bad:
                here.steps.setdefault(b.step, []).extend(bad)
    assert 0 < len(here.steps) < STEPS
    assert feed.stream.steps_in_epoch(0) >= STEPS  # all in the first epoch
    return here


@pytest.fixture(scope="module")
def stopped(poisoned: Poisoned) -> str:
    """What a run said that may skip one step less than it meets."""
    allow = f"train.max_nonfinite={len(poisoned.steps) - 1}"
    config = poisoned.config("nonfinite")
    return launch(
        "train/main.py", config, "--set", allow, "--set", f"train.steps={STEPS}", ranks=2,
        fails=True,
    )  # fmt: skip


def test_it_stops_before_the_update_and_names_step_and_samples(
    poisoned: Poisoned, stopped: str
) -> None:
    last = max(poisoned.steps)
    said = [line for line in stopped.splitlines() if f"step {last} is not finite" in line]
    assert len(said) == 1, stopped[-3000:]
    assert said[0].startswith("error: ")
    for key in poisoned.steps[last]:
        assert key in said[0]
    assert "Traceback" not in stopped
    saved = ckpt.load(poisoned.workspace.root / "nonfinite/nonfinite" / ckpt.name_of(last))
    assert saved.state.step == last
    newest = poisoned.workspace.checkpoint("nonfinite")
    assert newest.state.step == last
    for name, weight in newest.weights.items():
        assert weight.isfinite().all(), name
        assert torch.equal(weight, saved.weights[name]), name


def test_a_replay_finds_the_samples(poisoned: Poisoned, stopped: str) -> None:
    last = max(poisoned.steps)
    folder = poisoned.workspace.root / "nonfinite/nonfinite" / ckpt.name_of(last)
    said = python("train/replay.py", folder)
    assert f"not finite alone: {', '.join(sorted(poisoned.steps[last]))}\n" in said
    assert "first in decoder.transformer.wpe" in said


@pytest.mark.slow
def test_what_is_skipped_is_booked_and_resumed_exactly(poisoned: Poisoned) -> None:
    allow = ("--set", f"train.max_nonfinite={len(poisoned.steps)}")
    whole = poisoned.config("nonfinite-whole")
    launch("train/main.py", whole, *allow, "--set", f"train.steps={STEPS}", ranks=2)
    cut = poisoned.config("nonfinite-cut")
    for steps in (min(poisoned.steps) + 1, STEPS):
        launch("train/main.py", cut, *allow, "--set", f"train.steps={steps}", ranks=2)
    one, other = (poisoned.workspace.checkpoint(f"nonfinite-{n}") for n in ("whole", "cut"))
    assert one.state.refused == other.state.refused == sorted(poisoned.steps)
    refused = {int(s["step"]): set() for s in one.state.skipped if "step" in s}
    for skip in one.state.skipped:
        if "step" in skip:
            refused[int(skip["step"])].add(skip["key"])
    assert refused == {step: set(poisoned.keys[step]) for step in poisoned.steps}
    for kind in ("weights", "moments"):
        for name, value in getattr(one, kind).items():
            assert value.isfinite().all(), name
            assert torch.equal(value, getattr(other, kind)[name]), name
    curve = poisoned.workspace.curve("nonfinite-whole")
    assert [step for step, _ in curve] == list(range(STEPS))
    assert repr(curve) == repr(poisoned.workspace.curve("nonfinite-cut"))  # NaN and all


@pytest.mark.slow
def test_no_stage_updates_on_what_is_not_finite(tmp_path: Path) -> None:
    launch("tests/train/refusals_on_ranks.py", tmp_path, ranks=2)
