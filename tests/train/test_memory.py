"""What `--dry-run` plans against what a run holds: resident on the CPU, allocated on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from benchmarks import memory
from tests import tiny
from tests.launch import python
from train import config as cfg
from train.blueprint import Blueprint
from train.dryrun import counts
from train.model.build import build


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "again"), [(1, False), (3, False), (3, True)])
def test_the_plan_is_within_a_tenth_of_what_is_resident(
    stage: int, again: bool, tmp_path: Path
) -> None:
    planned_beside_measured(stage, again, tmp_path, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("stage", "again"), [(1, False), (2, False), (3, False), (3, True)])
def test_the_plan_is_within_a_tenth_of_what_a_gpu_holds(
    stage: int, again: bool, tmp_path: Path
) -> None:
    planned_beside_measured(stage, again, tmp_path, "cuda")


def planned_beside_measured(stage: int, again: bool, folder: Path, device: str) -> None:
    """Whisper-tiny's encoder and an LLM of 37 M, large beside what else a process takes."""
    config, path = models(folder, stage, again), folder / "memory.json"
    python("-m", "benchmarks.memory", config, "--json", path)
    rows = json.loads(path.read_text())["rows"]
    assert all(row["case"].endswith(device) for row in rows)
    found = {(row["name"], row["metric"]): row["value"] for row in rows}
    for part in ("parameters", "gradients and optimizer", "activations"):
        assert found["planned", part] == pytest.approx(found["measured", part], rel=0.1), rows


def models(folder: Path, stage: int, again: bool = False) -> Path:
    """A config, and the checkpoints that it names; `again`: layers are run again for backward."""
    tiny.tokenizer(folder / "llm")
    shape = {"num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": 16_000}
    llm = AutoConfig.for_model("llama", hidden_size=512, intermediate_size=1408, **shape)
    AutoModelForCausalLM.from_config(llm).save_pretrained(folder / "llm")
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    whisper = WhisperConfig(
        decoder_layers=1, encoder_layers=4, d_model=384, vocab_size=1000, **special
    )
    WhisperForConditionalGeneration(whisper).save_pretrained(folder / "encoder")
    WhisperFeatureExtractor().save_pretrained(folder / "encoder")
    tree = tiny.config(folder, data__tokens_per_bin=1024, data__max_seconds=30.0)
    tree["model"]["encoder"]["own_length"] = True
    tree["model"]["adapter"]["bottleneck"] = 512
    tree["model"]["decoder"]["checkpointing"] = again
    tree["train"]["engine"] = f"configs/ds/zero{stage}.json"
    return tiny.write_config(folder / "run.yaml", tree)


def test_what_is_held_on_a_gpu_is_what_its_allocator_gave_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"now": 100, "peak": 900}

    def work() -> None:
        given["peak"] = given["now"] + 40

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: given["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: given["peak"])
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device: given.update(peak=given["now"])
    )
    device = torch.device("cuda")
    assert memory._held(device) == 100
    assert memory._peak(work, device) == 40


@pytest.mark.parametrize("stage", [1, 3])
def test_a_gpu_holds_the_bucket_whole(stage: int, tmp_path: Path) -> None:
    config = cfg.load(models(tmp_path, stage), [])
    trained = counts(Blueprint.of(config.model, config.losses)).trained * 4
    on_cpu, on_gpu = (memory.planned(config, device) for device in ("cpu", "cuda"))
    more = {part: on_gpu[part] - on_cpu[part] for part in on_gpu}
    kept, passing = (50_000_000 * 4 - trained, 0) if stage == 3 else (0, trained)
    assert more == {"parameters": 0, "gradients and optimizer": kept, "activations": passing}


def test_random_weights_in_place_of_what_the_config_names(tmp_path: Path) -> None:
    tiny.encoder(tmp_path / "encoder", "whisper")
    tiny.llm(tmp_path / "llm")
    path = tiny.write_config(tmp_path / "run.yaml", tiny.config(tmp_path))
    config = cfg.load(path, [])
    made = cfg.load(path, memory.random_weights(config, tmp_path / "random", "cpu"))
    assert made.model.encoder.path != config.model.encoder.path
    assert memory.planned(made, "cpu") == memory.planned(config, "cpu")
    model = build(made.model, made.train.precision, seed=1)
    assert model.decoder.config.hidden_size == 32
