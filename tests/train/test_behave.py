"""Stage 1 by the real launcher: targets, their ends, their provenance, and resuming."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from data.shards import Overlay, ShardSet
from tests.launch import launch
from tests.train.conftest import Workspace
from train import config as cfg
from train.feed import open_feed
from train.model.build import load_tokenizer

LIMIT = 6  # behave.max_new_tokens of the tiny config


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def targets(workspace: Workspace) -> Overlay:
    base = ShardSet.open(str(workspace.root / "shards" / "train-*.tar"))
    return Overlay.open(str(workspace.root / "targets" / "targets-*.tar"), base)


def test_every_utterance_has_an_answer(targets: Overlay) -> None:
    records = [targets.record(i)["targets"] for i in range(40)]
    assert all(len(found) == 1 and found[0]["ids"] for found in records)


def test_an_answer_is_finished_unless_the_limit_cut_it(targets: Overlay) -> None:
    for i in range(40):
        (target,) = targets.record(i)["targets"]
        assert target["finished"] == (len(target["ids"]) < LIMIT)
        assert 2 not in target["ids"]


def test_a_cut_answer_teaches_no_end_of_sequence(workspace: Workspace) -> None:
    config = cfg.load(workspace.config("labels"))
    eos = load_tokenizer(config.model).eos_token_id
    feed = open_feed(config)
    cut = 0
    for batches in feed.stream.steps(0):
        for batch in batches:
            rows = batch.label_rows.tolist()
            ends = [int(end) for end in batch.cu_seqlens[1:]] if batch.weight else []
            for end in ends:
                # The last position but one predicts a document's last label.
                last = batch.label_ids[rows.index(end - 2)]
                length = sum(end - LIMIT - 2 < row < end - 1 for row in rows)
                cut += last != eos
                assert length == LIMIT or last == eos
    assert cut


def test_targets_say_where_they_came_from(targets: Overlay, workspace: Workspace) -> None:
    for meta in targets.metas:
        assert meta["teacher"] == str(workspace.root / "llm")
        assert {"prompt", "templates", "max_new_tokens", "temperature", "seed", "hash"} <= set(meta)


def test_a_lost_shard_is_made_again_byte_for_byte(workspace: Workspace, targets: Overlay) -> None:
    folder = workspace.root / "targets"
    before = digests(folder)
    for path in folder.glob("targets-000001.*"):
        path.unlink()
    # On another number of ranks than the first time.
    said = launch("train/behave.py", workspace.root / "targets-run.yaml", ranks=1)
    assert "2 of 3 target shards are there" in said
    assert digests(folder) == before


def test_targets_of_another_making_are_not_mixed_in(workspace: Workspace, targets: Overlay) -> None:
    said = launch(
        "train/behave.py", workspace.root / "targets-run.yaml",
        "--set", "behave.max_new_tokens=5", ranks=1, fails=True,
    )  # fmt: skip
    assert "was made with another max_new_tokens" in said
    assert "Traceback" not in said
