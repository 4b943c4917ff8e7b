"""Real runs on utterances that are partly read: cut and continued, on other ranks, other data."""

from __future__ import annotations

from typing import Any

import pytest

from data.align import main as align
from tests.launch import launch
from tests.train.conftest import Workspace
from tests.train.test_runs import same_weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def changes(workspace: Workspace) -> dict[str, Any]:
    """Word times of the workspace's shards, and a config that uses them."""
    root = workspace.root
    command = [str(root / "shards"), str(root / "words"), "--model", str(root / "encoder")]
    assert align(command) == 0
    return {
        "data__words": [str(root / "words")],
        "data__interleave": {"span_words": [1, 3], "pure_speech": 0.25},
        "data__augment": {"speeds": [0.9, 1.0, 1.1]},
        "train__schedule": "constant",
    }


def test_cut_and_resumed_is_the_uninterrupted_run(
    workspace: Workspace, changes: dict[str, Any]
) -> None:
    launch("train/main.py", workspace.config("mixed", **changes), ranks=2)
    cut = workspace.config("mixed-cut", **changes)
    launch("train/main.py", cut, "--set", "train.steps=7", ranks=2)
    launch("train/main.py", cut, ranks=2)
    assert workspace.curve("mixed-cut") == workspace.curve("mixed")
    assert same_weights(workspace, "mixed-cut", "mixed")

    heard = {**changes, "data__interleave": None}
    launch("train/main.py", workspace.config("mixed-heard", **heard), ranks=2)
    assert workspace.curve("mixed-heard") != workspace.curve("mixed")

    one = workspace.config("mixed-one", **changes)
    launch("train/main.py", one, ranks=1)
    for (step, alone), (_, shared) in zip(
        workspace.curve("mixed-one"), workspace.curve("mixed"), strict=True
    ):
        assert alone == pytest.approx(shared, rel=1e-4), step


def test_resuming_on_other_settings_is_refused(
    workspace: Workspace, changes: dict[str, Any]
) -> None:
    config = workspace.config("mixed-other", **changes)
    launch("train/main.py", config, "--set", "train.steps=2", ranks=1)
    more = ("--set", "data.interleave.pure_speech=0.5")
    said = launch("train/main.py", config, *more, ranks=1, fails=True)
    assert "trained on another order of data" in said
