"""BLSP's preparation: the whole LLM trained on text alone, by the loop that trains on speech."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import build
from data.archive import ShardError
from data.collate import collate
from tests import tiny
from tests.launch import ROOT, launch
from tests.ranks import Solo
from tests.train.conftest import Workspace
from tests.train.mix import ALL, gradients
from tests.train.mix import World as Mix
from train import behave
from train import config as cfg
from train.blueprint import Blueprint
from train.checkpoint import CheckpointError, State, write
from train.dryrun import groups
from train.engine import World
from train.feed import open_feed
from train.save_llm import save_llm

STEPS = 8
COLOURS = ("red", "green", "old", "new")


@pytest.mark.parametrize("llm", ["llama", "bloom"])
@pytest.mark.parametrize("train", ["none", "full"])
def test_texts_packed_with_speech_equal_one_by_one(tmp_path: Path, llm: str, train: str) -> None:
    losses = {"ce": 1.0, "align": {"weight": 0.2}} if train == "full" else ALL
    world = Mix(tmp_path, losses, llm, train)
    each = [*(world.pack([n]) for n in range(5)), *(world.pack_written([n]) for n in range(3))]
    expected_sums, expected = gradients(world.model, each)
    heard = world.all[1], world.written[2], world.all[3], world.written[0], world.all[0]
    packed = [collate(heard), collate([world.all[4], world.written[1], world.all[2]])]
    sums, found = gradients(world.model, packed)
    torch.testing.assert_close(sums, expected_sums, rtol=5e-6, atol=0)
    for name, gradient in expected.items():
        # As in test_losses.py: rounded at the scale of sums of some hundred terms.
        atol = 4 * 2e-5 + 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=5e-5, atol=atol)


@pytest.mark.parametrize("train", ["none", "full"])
def test_a_bin_of_texts_runs_the_adapter_for_nothing(tmp_path: Path, train: str) -> None:
    losses = {"ce": 1.0, "align": {"weight": 0.2}} if train == "full" else ALL
    world = Mix(tmp_path, losses, train=train)
    seen: list[int] = []
    world.model.adapter.register_forward_hook(lambda *_: seen.append(1))
    batch = world.pack_written([0, 1, 2])
    sums, found = gradients(world.model, [batch])
    assert seen == [1]
    assert sums[0] > 0
    own = {name for name in found if name.startswith(("adapter.", "embeddings.", "ctc."))}
    assert own
    assert not any(found[name].any() for name in own)
    assert (train == "full") == any(found[name].any() for name in found.keys() - own)
    # What a dummy hears is not what its documents say: nothing changes with another silence.
    other = replace(world.silence, features=world.silence.features + 1)
    again = gradients(world.model, [collate(world.written, silence=other, share=True)])
    assert torch.equal(sums, again[0])
    assert all(torch.equal(found[name], again[1][name]) for name in found)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Models and some speech; no run is needed before the preparation's own."""
    root = tmp_path_factory.mktemp("prepare")
    tiny.encoder(root / "encoder")
    tiny.llm(root / "llm")
    tiny.prompts(root / "prompts.yaml")
    tiny.shards(root, count=3)
    return Workspace(root)


def recipe(workspace: Workspace, name: str) -> Path:
    """configs/micro/blsp_prepare.yaml on the tiny LLM, and instruction rows that it can learn."""
    root = workspace.root
    rows = [
        {"instruction": f"repeat this {colour}", "output": f"the {colour} {thing}",
         "language": "en"}
        for colour in COLOURS for thing in ("cat", "dog", "bird")
    ] * 4  # fmt: skip
    (root / "instructions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, shards = str(root / "instructions.jsonl"), str(root / "instructions")
    assert build.main(["instructions", source, shards, "--workers", "1"]) == 0
    tree = yaml.safe_load((ROOT / "configs/micro/blsp_prepare.yaml").read_text())
    folder = root / name
    tree["run"] |= {
        "output": str(folder), "tracking_uri": f"sqlite:///{folder}.db", "experiment": "tiny",
    }  # fmt: skip
    tree["model"]["encoder"]["path"] = str(root / "encoder")
    tree["model"]["decoder"]["path"] = str(root / "llm")
    tree["data"] |= {
        "shards": [f"{shards}/*.tar"], "targets": [f"{folder}-targets/*.tar"],
        "tokens_per_bin": 100, "bins_per_step": 4,
    }  # fmt: skip
    tree["behave"]["output"] = f"{folder}-targets"
    tree["train"] |= {
        "steps": STEPS, "checkpoint_every": STEPS, "lr": 5e-3, "warmup_steps": 0,
        "schedule": "constant",
    }  # fmt: skip
    return tiny.write_config(root / f"{name}.yaml", tree)


@pytest.mark.slow
def test_the_llm_learns_its_instructions_on_two_ranks_and_leaves_as_a_folder(
    workspace: Workspace, tmp_path: Path
) -> None:
    path = recipe(workspace, "prepare")
    config = cfg.load(path)
    behave.run(config, cast(World, Solo()))
    sample = open_feed(config).stream.read(0, 0, 0)
    tokenizer = AutoTokenizer.from_pretrained(workspace.root / "llm")
    text, answer = sample.document[1], sample.document[-1]
    assert tokenizer.decode(text.ids).startswith("repeat this")
    assert tokenizer.decode(answer.ids[:-1]).startswith("the ")
    assert answer.ids[-1] == tokenizer.eos_token_id
    launch("train/main.py", path, ranks=2)
    losses = [loss for _, loss in workspace.curve("prepare")]
    assert len(losses) == STEPS
    assert losses[-1] < 0.7 * losses[0]
    assert {seconds for _, seconds in workspace.curve("prepare", "data/audio_seconds")} == {0}
    trained = workspace.checkpoint("prepare").weights
    assert all(name.startswith("decoder.") for name in trained), "the adapter stays as it is"
    planned = groups(Blueprint.of(config.model, config.losses))["trained"]
    assert planned == {"decoder": sum(w.numel() for w in trained.values())}
    save_llm(workspace.root / "prepare", tmp_path / "llm")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    before = AutoModelForCausalLM.from_pretrained(workspace.root / "llm").state_dict()
    for name, weight in saved.named_parameters():
        assert torch.equal(weight, trained[f"decoder.{name}"].to(weight.dtype)), name
        assert not torch.equal(weight.float(), before[name].float()), name
    again = AutoTokenizer.from_pretrained(tmp_path / "llm")
    assert again("repeat this")["input_ids"] == tokenizer("repeat this")["input_ids"]


def test_what_was_not_trained_is_not_saved(tmp_path: Path) -> None:
    config = cfg.parse(tiny.config(tmp_path), "tiny").resolved()
    write(tmp_path / "step-00000001", State(1, 0, 1, 1, "plan", "run", config, "none"), {}, {})
    with pytest.raises(CheckpointError, match="did not train the LLM whole"):
        save_llm(tmp_path, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_answers_that_rows_do_not_have_are_named(workspace: Workspace, tmp_path: Path) -> None:
    """A template that answers with the row's output, on shards of speech."""
    changes = [
        f"behave.output={tmp_path / 'targets'}", "behave.tasks=[instruct]",
        "behave.templates=configs/prompts/blsp_prepare.yaml",
    ]  # fmt: skip
    config = cfg.load(workspace.config("given"), changes)
    with pytest.raises(ShardError, match="has no `output`, with which template 'alpaca' answers"):
        behave.run(config, cast(World, Solo()))


def test_something_must_be_trained(tmp_path: Path) -> None:
    tree = tiny.config(tmp_path)
    tree["model"]["adapter"]["train"] = False
    with pytest.raises(cfg.ConfigError, match="nothing is trained"):
        cfg.parse(tree, "tiny")
    tree["model"]["decoder"]["lora"] = {}
    assert not cfg.parse(tree, "tiny").model.adapter.train
