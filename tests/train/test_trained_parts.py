"""What can be trained beside the adapter: layer weights, low-rank updates, the whole LLM."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.collate import dummy_batch
from data.stream import make_clip
from tests import tiny
from tests.launch import launch
from tests.train.conftest import Workspace
from tests.train.test_packing import TOLERANCE, World, gradients
from tests.train.test_runs import same_weights
from train import config as cfg
from train.model.build import build, length_rule
from train.model.encoder import Featurize

LORA = {"lora": {"rank": 2}}

EBRANCHFORMER = {
    "kind": "ebranchformer", "inputs": 8, "width": 16, "heads": 2, "blocks": 2,
    "feed_forward": 24, "cgmlp": 32, "kernel": 7,
}  # fmt: skip


def awake(world: World) -> None:
    """Updates begin as zero, which would hide a gradient that is missing."""
    torch.manual_seed(7)
    for name, p in world.model.trained().items():
        if "lora_B" in name:
            p.data = 0.3 * torch.randn_like(p)


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2", "hubert", "wavlm", "wav2vec2-bert"])
def test_encoder_updates_are_trained_packed_as_alone(tmp_path: Path, kind: str) -> None:
    world = World(tmp_path, kind, "llama", encoder=LORA)
    updates = {n for n in world.model.trained() if "lora_" in n}
    assert updates
    assert all(n.startswith("encoder_updates.") for n in updates)
    assert not any(
        p.requires_grad for n, p in world.model.encoder.named_parameters() if "lora_" not in n
    )
    awake(world)
    numbers = list(range(len(world.documents)))
    loss, packed = gradients(world.model, [world.pack(numbers)])
    alone_loss, alone = gradients(world.model, [world.pack([i]) for i in numbers])
    assert loss == pytest.approx(alone_loss, rel=2e-6)
    for name, expected in alone.items():
        # Through the encoder's layers too, whose attention runs padded here and not there.
        torch.testing.assert_close(packed[name], expected, rtol=1e-4, atol=1e-4)
    for name in updates:
        assert packed[name].abs().max() > 0, name


@pytest.mark.parametrize("llm", ["llama", "bloom", "gpt2"])
def test_llm_updates_are_trained_and_begin_as_nothing(tmp_path: Path, llm: str) -> None:
    targets = {"lora": {"rank": 2, "targets": ["q_proj", "v_proj"]}} if llm == "llama" else LORA
    if llm == "gpt2":
        # Its projections are no nn.Linear: said, not passed over.
        with pytest.raises(cfg.ConfigError, match=r"model\.decoder\.lora\.targets"):
            World(tmp_path, "wav2vec2", llm, decoder=targets)
        return
    world = World(tmp_path, "wav2vec2", llm, decoder=targets)
    plain = World(tmp_path, "wav2vec2", llm)
    batch = world.pack([1, 2, 3])
    assert gradients(world.model, [batch])[0] == gradients(plain.model, [batch])[0]
    awake(world)
    found = gradients(world.model, [batch])[1]
    updates = {n for n in found if "lora_" in n}
    assert updates
    assert found.keys() - updates == set(plain.model.trained())
    assert all(found[name].abs().max() > 0 for name in updates)
    world.model.train()
    assert not any(m.training for m in world.model.decoder.modules())


@pytest.mark.parametrize("llm", ["llama", "bloom"])
def test_the_whole_llm_has_the_gradients_of_its_own_table(tmp_path: Path, llm: str) -> None:
    world = World(tmp_path, "wav2vec2", llm, decoder={"train": "full"})
    plain = World(tmp_path, "wav2vec2", llm)
    batch = world.pack([1, 2, 3, 6])
    loss, found = gradients(world.model, [batch])
    expected_loss, expected = gradients(plain.model, [batch])
    assert loss == expected_loss
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, **TOLERANCE)
    assert {f"decoder.{n}" for n, _ in plain.model.decoder.named_parameters()} < found.keys()
    # Text rows reach the embeddings: that of a word which is read and nowhere a label.
    embed = world.model.decoder.get_input_embeddings().weight
    assert embed.grad is not None
    assert embed.grad[3].abs().max() > 0
    # By differences: a step against the gradient lowers the loss by its squared norm.
    size = sum(float(g.square().sum()) for g in found.values())
    with torch.no_grad():
        for name, p in world.model.trained().items():
            p -= 1e-6 * found[name]
    fallen = loss - gradients(world.model, [batch])[0]
    assert fallen == pytest.approx(1e-6 * size, rel=0.05)


def test_a_dummy_has_gradients_of_zero_for_all_of_it(tmp_path: Path) -> None:
    world = World(
        tmp_path, "wav2vec2", "llama", encoder=LORA | {"layers": "weighted"}, decoder=LORA
    )
    featurize = Featurize(str(tmp_path / "encoder"))
    clip = make_clip(np.zeros(8_000, np.float32), world.rule, featurize)
    loss, found = gradients(world.model, [dummy_batch(clip)])
    assert loss == 0
    assert "layer_sum.weight" in found
    assert all(not grad.any() for grad in found.values())


def test_dropout_depends_on_the_place_in_the_data_alone(tmp_path: Path) -> None:
    tiny.encoder(tmp_path / "encoder")
    tiny.llm(tmp_path / "llm")
    tree = tiny.config(tmp_path)
    tree["model"]["adapter"] = EBRANCHFORMER | {"dropout": 0.2, "layerdrop": 0.2}
    settings = cfg.parse(tree, "tiny").model
    model = build(settings, "fp32", seed=3).train()
    wave = np.random.default_rng(0).normal(size=16_000).astype(np.float32)
    clip = make_clip(wave, length_rule(settings), Featurize(settings.encoder.path))
    first, second = (dummy_batch(clip, epoch=0, step=4, bin=number) for number in (1, 2))
    first.weight = second.weight = 1.0
    torch.manual_seed(1)
    before = [float(model(b).sum()) for b in (first, second, first)]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert float(model(first).sum()) == before[0] == before[2]
    assert before[1] != before[0]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture(scope="module")
def everything(workspace: Workspace) -> dict[str, Any]:
    """A `model` section with all that can be trained beside an adapter that draws."""
    folder = workspace.root / "mms"
    tiny.language_adapters(tiny.encoder(folder, "mms"), ["eng", "deu"])
    return {
        "encoder": {
            "path": str(folder), "languages": {"de": "deu", "en": "eng"}, "layers": "weighted",
            **LORA,
        },
        "adapter": EBRANCHFORMER | {"dropout": 0.1, "layerdrop": 0.1},
        "decoder": {"path": str(workspace.root / "llm"), **LORA},
    }  # fmt: skip


def resumed_is_uninterrupted(workspace: Workspace, name: str, model: dict[str, Any]) -> None:
    """Four steps on two ranks; then again from the checkpoint of the second."""
    tree = {f"model__{part}": section for part, section in model.items()}
    launch("train/main.py", workspace.config(name, **tree), "--set", "train.steps=4", ranks=2)
    again = workspace.config(f"{name}-resumed", **tree)
    newest = workspace.root / name / "checkpoints" / "step-00000002"
    shutil.copytree(newest, workspace.root / f"{name}-resumed" / "checkpoints" / newest.name)
    said = launch("train/main.py", again, "--set", "train.steps=4", ranks=2)
    assert "step-00000002" in said
    assert same_weights(workspace, name, f"{name}-resumed")


def goes_on_alone(workspace: Workspace, name: str, model: dict[str, Any]) -> None:
    """The same on one rank from there: as on two, but for the order of sums."""
    tree = {f"model__{part}": section for part, section in model.items()}
    alone = workspace.config(f"{name}-alone", **tree)
    newest = workspace.root / name / "checkpoints" / "step-00000002"
    shutil.copytree(newest, workspace.root / f"{name}-alone" / "checkpoints" / newest.name)
    launch("train/main.py", alone, "--set", "train.steps=4", ranks=1)
    for (step, found), (_, expected) in zip(
        workspace.curve(f"{name}-alone"), workspace.curve(name)[2:], strict=True
    ):
        assert found == pytest.approx(expected, rel=2e-6 if step == 2 else 2e-4)


@pytest.mark.slow
def test_all_parts_train_and_resume_exactly_under_zero3(
    workspace: Workspace, everything: dict[str, Any]
) -> None:
    resumed_is_uninterrupted(workspace, "parts", everything)
    goes_on_alone(workspace, "parts", everything)
    trained = workspace.checkpoint("parts").weights
    for part in ("encoder_updates.", "layer_sum.", "adapter.blocks.", "decoder.", "embeddings."):
        assert any(name.startswith(part) for name in trained), part
    moved = [n for n, w in trained.items() if "lora_B" in n and w.abs().max() > 0]
    assert {n.split(".")[0] for n in moved} == {"encoder_updates", "decoder"}


@pytest.mark.slow
@pytest.mark.parametrize("llm", ["llama", "bloom"])
def test_the_whole_llm_trains_and_resumes_exactly_under_zero3(
    workspace: Workspace, llm: str
) -> None:
    folder = tiny.llm(workspace.root / f"full-{llm}", llm)
    model = {"decoder": {"path": str(folder), "train": "full"}}
    resumed_is_uninterrupted(workspace, f"whole-{llm}", model)
    goes_on_alone(workspace, f"whole-{llm}", model)
    trained = workspace.checkpoint(f"whole-{llm}").weights
    assert sum("decoder." in name for name in trained) > 10
