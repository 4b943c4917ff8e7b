"""The loop itself, on one rank without a model: what it tells the watchdog, and when it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.distributed import HashStore

from data.collate import Skip
from tests import tiny
from tests.launch import launch
from tests.ranks import Solo
from tests.train.conftest import Workspace
from train import checkpoint as ckpt
from train import config as cfg
from train import loop, nonfinite
from train.feed import Feed
from train.loop import Counts, Trainer, check_plan
from train.validation import Validation
from train.watchdog import Watchdog

LIMIT = 2.0
"""Seconds in one place that are a hang here."""


class Watched(Solo):
    """A rank whose watchdog only notes that it would end it, and where it was told to be."""

    def __init__(self) -> None:
        self.ended: list[int] = []
        self.places: list[str] = []
        self.drawn = True
        """Whether all ranks have come to where they begin together."""

    def barrier(self) -> None:
        self.drawn = True

    @contextmanager
    def watched(self, limit: float) -> Iterator[Watchdog]:
        assert self.drawn, "watched while rank 0 may still be drawing"
        watchdog = Watchdog(HashStore(), 0, 1, limit, self.ended.append)
        tell = watchdog.at

        def at(where: str) -> None:
            self.places.append(where)
            tell(where)

        watchdog.at = at  # type: ignore[method-assign]
        yield watchdog
        watchdog.close()


def feed(steps: int, seconds: float = 0.0, left_out: tuple[str, ...] = ()) -> Any:
    """Epochs of so many steps without a batch, each of which takes so long to come."""

    def slowly(*_: Any) -> Iterator[list[Any]]:
        for _ in range(steps):
            time.sleep(seconds)
            yield []

    return SimpleNamespace(
        stream=SimpleNamespace(steps_in_epoch=lambda epoch: steps, shards=left_out),
        steps=slowly, digest="plan",
        left_out=lambda epoch: [Skip(str(n), reason) for n, reason in enumerate(left_out)],
    )  # fmt: skip


class Untrained:
    """An engine without a model."""

    def weights(self) -> dict[str, torch.Tensor]:
        return {"w": torch.ones(3)}

    def moments(self) -> dict[str, torch.Tensor]:
        return {}


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> list[nonfinite.Fault]:
    """Steps cost nothing; the next ones are at fault."""
    next_ones: list[nonfinite.Fault] = []

    def step(*_: Any) -> tuple[Counts, float]:
        fault = next_ones.pop() if next_ones else None
        return Counts(1.0, {"ce": 1.0}, 1.0, 1.0, 1.0, 1, fault=fault), 1.0

    monkeypatch.setattr(loop, "train_step", step)
    meter = SimpleNamespace(count=lambda batches: None, figures=lambda seconds: {})
    monkeypatch.setattr(loop, "Meter", lambda config, here: meter)
    monkeypatch.setattr(loop, "revision", lambda: "none")  # git may take a second
    return next_ones


def trainer(root: Path, data: Any, here: Watched, held_out: Any = None, **changes: Any) -> Trainer:
    settings = {"train__steps": 2, "train__hang_seconds": LIMIT} | changes
    config = cfg.parse(tiny.config(root, **settings), "tiny")
    validation = None
    if held_out is not None:
        section = cfg.Validation(shards=("s",), targets=("t",))
        validation = Validation(held_out, section, {"ce": 1.0})
    return Trainer(
        config, cast(Any, here), cast(Any, Untrained()), data, None, None, "run", validation
    )


def test_a_validation_longer_than_a_hang_is_none(tmp_path: Path, faults: list[Any]) -> None:
    here = Watched()
    trainer(tmp_path, feed(2), here, feed(8, seconds=0.45)).run()
    assert here.ended == []
    assert "step 7 of the validation after step 2" in here.places
    assert "the checkpoint after step 2" in here.places
    # And one whose data does not come is still one.
    trainer(tmp_path / "b", feed(2), here, feed(1, seconds=2 * LIMIT)).run()
    assert len(here.ended) == 1


def test_ranks_are_watched_once_all_of_them_are_there(tmp_path: Path, faults: list[Any]) -> None:
    here = Watched()
    here.drawn = False
    trainer(tmp_path, feed(2), here).run()


def test_a_step_to_replay_is_no_hang_however_slow_the_disk(
    tmp_path: Path, faults: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = nonfinite.save

    def slowly(*args: Any) -> Path:
        time.sleep(2 * LIMIT)
        return save(*args)

    monkeypatch.setattr(nonfinite, "save", slowly)
    faults.append(nonfinite.Fault(()))
    here = Watched()
    trainer(tmp_path, feed(2), here, train__max_nonfinite=1).run()
    assert here.ended == []
    assert ckpt.load(tmp_path / "run/nonfinite/step-00000000").state.step == 0
    assert (tmp_path / "run/nonfinite/step-00000000/batch.json").exists()


def test_a_plan_without_steps_is_refused(tmp_path: Path, faults: list[Any]) -> None:
    reasons = [f"tokens {n} over the budget of 64 per bin" for n in (70, 81, 99)]
    reasons += ["stage 1 left nothing to train: empty or filtered"]
    none = feed(0, left_out=tuple(reasons))
    with pytest.raises(cfg.ConfigError) as refused:
        trainer(tmp_path, none, Watched()).run()
    said = str(refused.value)
    assert "\n" not in said
    assert "4 of 4 samples are left out (3 as 'tokens 70 over the budget of 64 per bin'; 1 as " \
        "'stage 1 left nothing" in said  # fmt: skip
    assert "raise data.tokens_per_bin" in said
    with pytest.raises(cfg.ConfigError, match=r"see that validation.shards and validation.targets"):
        check_plan(cast(Feed, none), 0, "validation")


def test_a_budget_that_no_sample_fits_ends_the_run_in_a_line(workspace: Workspace) -> None:
    config = workspace.config("nothing-fits", data__tokens_per_bin=4)
    said = launch("train/main.py", config, ranks=1, fails=True, timeout=120)
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "error: data: there is nothing to do in epoch 0: 40 of 40 samples are left out" in line
    assert "over the budget of 4 per bin" in line
    assert "Traceback" not in said
