"""Validation while training: when a run ends, what it keeps, and the average of the best."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.launch import launch, python
from tests.train.conftest import Workspace
from train import checkpoint as ckpt
from train import config as cfg
from train.average import average
from train.validation import Validation


def after(losses: list[float], **settings: Any) -> Validation:
    section = cfg.Validation(shards=("s",), targets=("t",), **settings)
    history = [{"step": 10.0 * n, "loss": loss} for n, loss in enumerate(losses, 1)]
    return Validation(cast(Any, SimpleNamespace()), section, {"ce": 1.0}, history)


@pytest.mark.parametrize(
    ("losses", "over"),
    [
        ([], False), ([3.0], False), ([3.0, 4.0], False), ([3.0, 4.0, 5.0], True),
        ([3.0, 4.0, 2.9], False), ([3.0, 2.0, 2.5, 2.1], True), ([3.0, 3.0, 3.0], True),
    ],
)  # fmt: skip
def test_patience(losses: list[float], over: bool) -> None:
    assert after(losses, patience=2).given_up() is over
    assert after(losses).given_up() is False


def test_the_best_stay(tmp_path: Path) -> None:
    state = ckpt.State(0, 0, 0, 0, "plan", "run", {}, "none")
    weights = {"w": torch.ones(2)}
    losses = [5.0, 1.0, 4.0, 3.0, 2.0, 6.0]
    for n in range(1, len(losses) + 1):
        best = after(losses[:n], keep_best=2).best()
        made = ckpt.State(**{**vars(state), "step": 10 * n})
        ckpt.save(tmp_path, made, weights, {}, keep=1, best=best)
    assert sorted(p.name for p in tmp_path.iterdir()) == [ckpt.name_of(s) for s in (20, 50, 60)]


@pytest.mark.slow
def test_a_run_that_no_longer_learns_ends(workspace: Workspace) -> None:
    root = workspace.root
    held = f"{{shards: ['{root}/shards/train-000000.tar'], targets: ['{root}/targets/*.tar'], "
    config = workspace.config("given-up", train__lr=1e-12, train__keep=1)
    settings = ("--set", "validation=" + held + "patience: 2, keep_best: 2}")
    said = launch("train/main.py", config, *settings, "--set", "train.steps=400", ranks=2)
    assert said.count("validation ") == 3
    found = workspace.checkpoint("given-up").state
    assert found.step == 6
    assert [v["step"] for v in found.validated] == [2, 4, 6]
    assert workspace.curve("given-up", "validation/loss") == [
        (step - 1, v["loss"]) for step, v in zip((2, 4, 6), found.validated, strict=True)
    ]
    # The weights have hardly moved: the loss is that of the same clips on one rank.
    alone = workspace.config("alone", train__lr=1e-12, train__checkpoint_every=1)
    launch("train/main.py", alone, *settings, "--set", "train.steps=1", ranks=1)
    (one,) = workspace.checkpoint("alone").state.validated
    assert one["loss"] == pytest.approx(found.validated[0]["loss"], rel=1e-5)
    # It has ended, so there is nothing to resume.
    again = launch("train/main.py", config, *settings, "--set", "train.steps=400", ranks=2)
    assert "validation " not in again

    kept = sorted(path.name for path in (root / "given-up/checkpoints").iterdir())
    said = python("train/average.py", root / "given-up", root / "averaged", "--best", "2")
    steps = [int(text) for text in said.split("steps ")[1].split(",")]
    assert {ckpt.name_of(step) for step in steps} <= set(kept)
    parts = [ckpt.load(root / "given-up/checkpoints" / ckpt.name_of(s)).weights for s in steps]
    for name, mean in ckpt.find(root / "averaged").weights.items():
        torch.testing.assert_close(mean, (parts[0][name] + parts[1][name]) / 2)
    with pytest.raises(ckpt.CheckpointError, match="asked for the best 9"):
        average(root / "given-up", root / "averaged", 9)
