"""What is frozen has the same digest before and after training, and a slip is caught."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from tests.launch import launch
from tests.train.conftest import Workspace
from train import config as cfg
from train.frozen import digests, frozen
from train.model.build import build, whole


@pytest.mark.slow
def test_frozen_weights_stay_to_the_last_bit(workspace: Workspace) -> None:
    config = workspace.config("frozen", train__verify_frozen=True)
    launch("train/main.py", config, ranks=2)
    facts = json.loads((workspace.root / "frozen/frozen.json").read_text())
    assert facts["before"] == facts["after"]
    assert facts["changed"] == []
    # Every tensor of both sources is among them, and nothing that is trained.
    sizes = [
        len(load_file(workspace.root / part / "model.safetensors")) for part in ("encoder", "llm")
    ]
    assert facts["tensors"] >= sum(sizes)
    settings = cfg.load(config)
    model = build(settings.model, settings.train.precision, seed=1)
    assert not set(frozen(model, settings.model)) & set(model.trained())


@pytest.mark.slow
def test_a_weight_left_trainable_is_caught(workspace: Workspace) -> None:
    config = workspace.config("unfrozen", train__verify_frozen=True)
    out = launch("tests/train/unfrozen.py", config, ranks=2, fails=True)
    assert "1 of" in out
    assert "decoder.model.norm.weight" in out
    facts = json.loads((workspace.root / "unfrozen/frozen.json").read_text())
    assert facts["changed"] == ["decoder.model.norm.weight"]


def test_every_frozen_tensor_counts(workspace: Workspace) -> None:
    """Any weight or buffer, changed by one number, changes the digest of it alone."""
    settings = cfg.load(workspace.config("frozen-parts"))
    model = build(settings.model, "fp32", seed=1)
    tensors = frozen(model, settings.model)
    before = digests(tensors, whole)
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        flat = tensor.detach().reshape(-1)
        kept = flat[0].clone()
        flat[0] += 1
        after = digests({name: tensor}, whole)
        flat[0] = kept
        assert after[name] != before[name], name
    assert digests(tensors, whole) == before
