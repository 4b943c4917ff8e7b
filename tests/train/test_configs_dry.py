"""Every shipped config plans its run without weights and without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.templates import load_templates
from tests import tiny
from train import config as cfg
from train.dryrun import dry_run

ROOT = Path(__file__).parent.parent.parent
FULL = sorted(p.stem for p in (ROOT / "configs").glob("*.yaml"))
MICRO = sorted(p.stem for p in (ROOT / "configs" / "micro").glob("*.yaml"))

# Millions: of the papers, or of the same recipe at our choice of models (said in the file).
ADAPTERS = {
    "bloomzmms": 534,
    "blsp": 47.47,
    "blsp_kd": 82.32,
    "blsp_prepare": 47.47,
    "bloomzmms_ctc": 534,
    "bloomzmms_t": 534,
    "bloomzmms_mi": 534,
    "bloomzmms_tmi": 534,
    "free": 49.56,
    "mtbi": 82.32,
}
# Millions, as the models' cards give them.
ENCODERS = {
    "openai/whisper-small": 88,
    "openai/whisper-large-v2": 637,
    "openai/whisper-large-v3": 637,
    "facebook/mms-1b-all": 965,
}
DECODERS = {
    "meta-llama/Llama-2-7b-hf": 6_738,
    "bigscience/bloomz-7b1": 7_069,
    "Qwen/Qwen2.5-7B-Instruct": 7_616,
}


def planned(config: cfg.Config, folder: Path) -> dict[str, Any]:
    path = folder / "plan.json"
    dry_run(config, path, ranks=8)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_all_recipes_are_there() -> None:
    assert ADAPTERS.keys() <= set(FULL)
    assert ADAPTERS.keys() <= set(MICRO)


@pytest.mark.parametrize("name", FULL)
def test_full_size(name: str, tmp_path: Path) -> None:
    config, *before = reversed(cfg.load_stages(ROOT / "configs" / f"{name}.yaml"))
    assert config.run.name == name.replace("_", "-") + ("-ce" if before else "")
    found = planned(config, tmp_path)
    trained, frozen = found["parameters"]["trained"], found["parameters"]["frozen"]
    encoder, decoder = config.model.encoder.path, config.model.decoder.path
    part = trained if config.model.adapter.train else frozen
    if name in ADAPTERS:
        assert part["adapter"] == pytest.approx(ADAPTERS[name] * 1e6, rel=0.005)
    assert frozen["encoder"] == pytest.approx(ENCODERS[encoder] * 1e6, rel=0.01)
    whole = frozen["decoder"] + trained.get("decoder", 0)
    assert whole == pytest.approx(DECODERS[decoder] * 1e6, rel=0.001)
    if config.behave is not None:
        assert load_templates(ROOT / config.behave.templates, tuple(config.behave.tasks))


@pytest.mark.parametrize("name", MICRO)
def test_micro_is_its_twin(name: str, tmp_path: Path) -> None:
    """The same recipe: what differs is sizes, paths, steps, prompts and rates."""
    micro = cfg.load(
        ROOT / "configs" / "micro" / f"{name}.yaml",
        [
            f"model.encoder.path={tiny.encoder(tmp_path / 'encoder')}",
            f"model.decoder.path={tiny.llm(tmp_path / 'llm')}",
        ],
    )
    planned(micro, tmp_path)
    if name not in FULL:
        return
    full = cfg.load(ROOT / "configs" / f"{name}.yaml")
    assert micro.losses == full.losses
    assert micro.model.adapter.kind == full.model.adapter.kind
    assert micro.model.adapter.train == full.model.adapter.train
    assert micro.model.encoder.layers == full.model.encoder.layers
    assert micro.model.decoder.train == full.model.decoder.train
    assert bool(getattr(micro.model.adapter, "languages", ())) == bool(
        getattr(full.model.adapter, "languages", ())
    )
    assert micro.data.interleave == full.data.interleave
    assert micro.data.augment == full.data.augment
    assert micro.behave is not None
    assert full.behave is not None
    assert list(micro.behave.tasks.values()) == list(full.behave.tasks.values())
    assert micro.behave.filters == full.behave.filters


def test_every_kept_architecture_is_named(root: Path) -> None:
    folder = root / "configs" / "models"
    kept = {str(p.relative_to(folder))[: -len(".json")] for p in folder.rglob("*.json")}
    models = [cfg.load(root / "configs" / f"{name}.yaml").model for name in FULL]
    assert kept == {m.encoder.path for m in models} | {m.decoder.path for m in models}


def test_updates_and_a_trained_llm_are_counted(tmp_path: Path) -> None:
    path = ROOT / "configs" / "blsp.yaml"
    plain = planned(cfg.load(path), tmp_path)["parameters"]
    lora = cfg.load(
        path, ["model.decoder.lora={rank: 8}", "model.encoder.lora={}", "losses.ctc={}"]
    )
    found = planned(lora, tmp_path)["parameters"]
    # Two projections of 4096 x 4096 in each of 32 layers; of 768 x 768 in 12.
    assert found["trained"]["decoder"] == 32 * 2 * 8 * (4096 + 4096)
    assert found["trained"]["encoder"] == 12 * 2 * 8 * (768 + 768)
    assert found["trained"]["ctc"] == 4096
    assert found["frozen"] == plain["frozen"]
    full = planned(cfg.load(path, ["model.decoder.train=full"]), tmp_path)["parameters"]
    assert full["trained"]["decoder"] == plain["frozen"]["decoder"]
    assert full["frozen"]["decoder"] == 0
