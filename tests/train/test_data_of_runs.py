"""What real runs train on: their ledgers, remote shards, augmentation. Minutes."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from data.ledger import committed
from tests.data.faulty import serving
from tests.launch import launch, python, start
from tests.train.conftest import Workspace
from train import checkpoint as ckpt

pytestmark = pytest.mark.slow


def kill_after_progress(config: Path, folder: Path, ranks: int, seed: int, *args: str) -> None:
    """SIGKILL a run at a random moment after it has written one more checkpoint."""

    def newest() -> int:
        names = [int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")]
        return max(names, default=0)

    log = folder.with_suffix(".log")
    begun = newest()
    process = start("train/main.py", config, *args, ranks=ranks, log=log)
    deadline = time.monotonic() + 240
    while newest() <= begun:
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0, 0.5))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_ledgers_of_killed_runs_are_the_corpus(workspace: Workspace) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    config = workspace.config("ledger", run__ledger=True, train__checkpoint_every=2)
    folder = workspace.root / "ledger"
    steps = ("--set", "train.steps=400", "--set", "train.schedule=constant")
    for number, ranks in enumerate([1, 2, 4, 2, 1, 4]):
        kill_after_progress(config, folder, ranks, seed + number, *steps)
    reached = ckpt.find(folder).state.step
    assert reached < 400, "killed too late"
    last = ("--set", f"train.steps={reached + 7}", "--set", "train.schedule=constant")
    launch("train/main.py", config, *last, ranks=2)

    written = list(committed(folder / "ledger.jsonl"))
    assert len(written) == reached + 7
    corpus = Counter(
        json.loads(line)["key"] for line in (workspace.root / "corpus/train.jsonl").open()
    )
    skipped = Counter((s["epoch"], s["key"]) for s in ckpt.find(folder).state.skipped)
    epochs = sorted({line["epoch"] for line in written})
    assert epochs == list(range(len(epochs)))
    assert len(epochs) > 2
    for epoch in epochs:
        lines = [line for line in written if line["epoch"] == epoch]
        assert [line["step"] for line in lines] == list(range(len(lines)))
        trained = Counter(key for line in lines for key in line["keys"])
        left = Counter(key for at, key in skipped if at == str(epoch))
        if epoch < epochs[-1]:
            assert trained + left == corpus
        else:
            assert trained <= corpus
    print(f"{len(epochs)} epochs, {len(written)} steps, {sum(corpus.values())} utterances")


def test_remote_shards_and_augmentation_resume_exactly(workspace: Workspace) -> None:
    changes = {
        "data__augment": {"speeds": [0.9, 1.0, 1.1]}, "data__workers": 1,
        "data__tokens_per_bin": 120, "train__schedule": "constant",
    }  # fmt: skip
    here = workspace.config("augmented", **changes)
    launch("train/main.py", here, "--set", "train.steps=6", ranks=2)
    with serving(workspace.root) as server:
        changes |= {
            "data__shards": [f"{server.address}/shards/train-{{000000..000003}}.tar"],
            "data__targets": [f"{server.address}/targets/targets-{{000000..000002}}.tar"],
            "data__cache": str(workspace.root / "cache"),
        }
        remote = workspace.config("remote", **changes)
        launch("train/main.py", remote, "--set", "train.steps=2", ranks=1)
        launch("train/main.py", remote, "--set", "train.steps=6", ranks=2)
        fetched = Counter(server.tars())
    assert max(fetched.values()) == 1, fetched  # the cache: each tar came over the wire once
    for (step, one), (_, other) in zip(
        workspace.curve("augmented"), workspace.curve("remote"), strict=True
    ):
        assert other == pytest.approx(one, rel=1e-4), step
    plain = workspace.config("plain", **{**changes, "data__augment": None})
    said = python("train/main.py", plain, "--dry-run")
    assert "augment: null" in said
