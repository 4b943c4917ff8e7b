"""Every family of encoder and decoder: twenty steps of ZeRO-3 on two ranks, resumed, heard."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.launch import launch, python
from tests.train.conftest import Workspace

pytestmark = pytest.mark.slow

STEPS, CUT = 20, 10
PAIRS = [
    ("whisper", "qwen3"), ("wav2vec2", "llama"), ("mms", "bloom"), ("hubert", "mistral"),
    ("wavlm", "gemma3_text"), ("wav2vec2-bert", "gemma2"),
]  # fmt: skip


@pytest.fixture(params=PAIRS, ids=["-".join(pair) for pair in PAIRS])
def pair(request: pytest.FixtureRequest, workspace: Workspace, tmp_path: Path) -> Workspace:
    """The workspace's shards and targets, with models of other families."""
    encoder, llm = request.param
    for name in ("shards", "targets", "corpus"):
        (tmp_path / name).symlink_to(workspace.root / name)
    shutil.copy(workspace.root / "prompts.yaml", tmp_path)
    tiny.encoder(tmp_path / "encoder", encoder)
    tiny.llm(tmp_path / "llm", llm)
    return replace(workspace, root=tmp_path)


def test_a_family_trains_resumes_and_answers(pair: Workspace) -> None:
    config = pair.config("run", train__checkpoint_every=CUT)
    launch("train/main.py", config, "--set", f"train.steps={STEPS}", ranks=2)
    whole, losses = pair.checkpoint("run"), pair.curve("run")
    assert whole.state.step == STEPS
    assert sum(loss for _, loss in losses[-3:]) < sum(loss for _, loss in losses[:3])

    # Back to the cut: what came after it is lost, as in a crash.
    shutil.rmtree(pair.root / f"run/checkpoints/step-{STEPS:08}")
    assert pair.checkpoint("run").state.step == CUT
    launch("train/main.py", config, "--set", f"train.steps={STEPS}", ranks=2)
    again = pair.checkpoint("run")
    for kind in ("weights", "moments"):
        assert getattr(whole, kind).keys() == getattr(again, kind).keys()
        for name, value in getattr(whole, kind).items():
            assert torch.equal(value, getattr(again, kind)[name]), name
    assert pair.curve("run") == losses

    said = python(
        "train/listen.py", pair.root / "run", pair.root / "corpus/utt0000.wav",
        "--instruction", "continue this", "--max-new-tokens", "5",
    )  # fmt: skip
    assert set(said.splitlines()[-1].split()) <= {*tiny.WORDS, *tiny.SPECIAL}
