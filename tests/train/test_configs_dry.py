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
# What a micro twin has of its own, in all stages; in all else it is the recipe that it is named
# after. `docs/papers.md` says the same in words.
OWN = {
    # Sizes, for 2 CPU cores, and 3 languages in the place of 139.
    "model.adapter.bottleneck", "model.adapter.hidden", "model.adapter.inputs",
    "model.adapter.width", "model.adapter.heads", "model.adapter.blocks",
    "model.adapter.feed_forward", "model.adapter.cgmlp", "model.adapter.kernel",
    "model.adapter.languages",
    "data.tokens_per_bin", "data.seconds_per_bin", "data.bins_per_step", "data.workers",
    "behave.batch_size", "behave.max_new_tokens", "evaluate.batch_size", "evaluate.max_new_tokens",
    # Paths. T, MI and T+MI have no `train.init`: `make claims` trains them beside recipes that have
    # no first stage.
    "run.name", "run.output", "run.experiment", "model.encoder.path", "model.decoder.path",
    "data.shards", "data.targets", "data.words", "behave.output", "evaluate.shards",
    "evaluate.tasks", "train.init",
    # Steps: hundreds, where the full size has thousands.
    "train.steps", "train.warmup_steps", "train.checkpoint_every",
    # The micro LLM's own prompt and instructions.
    "prompt", "behave.templates", "behave.tasks",
    # What belongs to the size and to so few steps; docs/claims.md is measured with these.
    "train.lr", "train.schedule", "train.weight_decay", "train.clip",
    # Greedy, as all figures of the micro world are: five beams are five times the rows.
    "evaluate.num_beams",
}  # fmt: skip


def twins(name: str) -> list[tuple[cfg.Config, cfg.Config]]:
    """The stages of a recipe, each at full size and in the micro world."""
    paths = (ROOT / "configs" / f"{name}.yaml", ROOT / "configs" / "micro" / f"{name}.yaml")
    return list(zip(*map(cfg.load_stages, paths), strict=True))


def differing(full: cfg.Config, micro: cfg.Config) -> set[str]:
    """Keys that are not the same in both.

    A micro twin may leave `validation` out: its runs end after a given number of steps, so that
    recipes are compared after equally many, and are evaluated as they are then.
    """
    if micro.validation is None:
        full = full.model_copy(update={"validation": None})
    one, other = full.flat(), micro.flat()
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


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
    """The same recipe in every stage: what differs is `OWN`, and that in value alone."""
    places = [
        f"model.encoder.path={tiny.encoder(tmp_path / 'encoder')}",
        f"model.decoder.path={tiny.llm(tmp_path / 'llm')}",
    ]
    planned(cfg.load(ROOT / "configs" / "micro" / f"{name}.yaml", places), tmp_path)
    for full, micro in twins(name):
        drifted = differing(full, micro) - OWN
        assert not drifted
        assert bool(getattr(micro.model.adapter, "languages", ())) == bool(
            getattr(full.model.adapter, "languages", ())
        )
        assert bool(micro.data.words) == bool(full.data.words)
        assert micro.behave is not None
        assert full.behave is not None
        assert list(micro.behave.tasks.values()) == list(full.behave.tasks.values())


def test_nothing_is_allowed_to_differ_that_does_not() -> None:
    assert set().union(*(differing(*pair) for name in MICRO for pair in twins(name))) == OWN


@pytest.mark.parametrize("name", [name for name in FULL if name.startswith("bloomzmms")])
def test_bloomzmms_ends_and_averages_as_the_paper(name: str) -> None:
    """Patience of three epochs and the best three in the second stage; the best in the first."""
    for config in cfg.load_stages(ROOT / "configs" / f"{name}.yaml"):
        held, first = config.validation, config.losses.ctc is not None
        assert held is not None
        assert not set(held.shards) & set(config.data.shards)
        assert not set(held.targets) & set(config.data.targets)
        assert (held.patience, held.keep_best) == ((None, 1) if first else (30, 3))
        # An epoch of the paper's is 54,381 micro-batches, two a step; here it has ten validations,
        # for a crash is not to cost hours.
        assert first or config.train.checkpoint_every == 54_381 // 20


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
