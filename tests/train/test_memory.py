"""What `--dry-run` plans against the resident memory of a run on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from tests import tiny
from tests.launch import python


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_the_plan_is_within_a_tenth_of_what_is_resident(stage: int, tmp_path: Path) -> None:
    """Whisper-tiny's encoder and an LLM of 37 M, large beside what else a process takes."""
    tiny.tokenizer(tmp_path / "llm")
    shape = {"num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": 16_000}
    llm = AutoConfig.for_model("llama", hidden_size=512, intermediate_size=1408, **shape)
    AutoModelForCausalLM.from_config(llm).save_pretrained(tmp_path / "llm")
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    whisper = WhisperConfig(
        decoder_layers=1, encoder_layers=4, d_model=384, vocab_size=1000, **special
    )
    WhisperForConditionalGeneration(whisper).save_pretrained(tmp_path / "encoder")
    WhisperFeatureExtractor().save_pretrained(tmp_path / "encoder")
    tree = tiny.config(tmp_path, data__tokens_per_bin=1024, data__max_seconds=30.0)
    tree["model"]["encoder"]["own_length"] = True
    tree["model"]["adapter"]["bottleneck"] = 512
    tree["train"]["engine"] = f"configs/ds/zero{stage}.json"
    config, path = tiny.write_config(tmp_path / "run.yaml", tree), tmp_path / "memory.json"
    python("-m", "benchmarks.memory", config, "--json", path)
    rows = json.loads(path.read_text())["rows"]
    found = {(row["name"], row["metric"]): row["value"] for row in rows}
    for part in ("parameters", "gradients and optimizer", "activations"):
        assert found["planned", part] == pytest.approx(found["measured", part], rel=0.1), rows
