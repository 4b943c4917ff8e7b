"""`--dry-run`: what a run would train and hold, from configs alone, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.table import Table
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from train import config as cfg
from train.engine import policy
from train.model.adapter import ConvAdapter
from train.progress import console

_BYTES = {"bf16": 2, "fp32": 4}


def groups(model: cfg.Model) -> dict[str, dict[str, int]]:
    """Parameter counts: {"trained": {part: count}, "frozen": {part: count}}."""
    trust = model.trust_remote_code
    with torch.device("meta"):
        encoder_config = AutoConfig.from_pretrained(model.encoder.path, trust_remote_code=trust)
        encoder = AutoModel.from_config(encoder_config, trust_remote_code=trust)
        if encoder_config.model_type == "whisper":
            encoder = encoder.get_encoder()
        decoder_config = AutoConfig.from_pretrained(model.decoder.path, trust_remote_code=trust)
        decoder = AutoModelForCausalLM.from_config(decoder_config, trust_remote_code=trust)
        hidden = decoder_config.hidden_size
        adapter = ConvAdapter(
            encoder_config.hidden_size,
            hidden,
            kernel=model.adapter.kernel,
            strides=model.adapter.strides,
            bottleneck=model.adapter.bottleneck,
        )
    return {
        "trained": {"adapter": _count(adapter), "layer norm": 2 * hidden},
        "frozen": {"encoder": _count(encoder), "decoder": _count(decoder)},
    }


def memory(config: cfg.Config, parts: dict[str, dict[str, int]], ranks: int) -> dict[str, int]:
    """Bytes per rank of what a run holds between steps (activations come on top)."""
    size = _BYTES[config.train.precision]
    trained = sum(parts["trained"].values())
    encoder, decoder = parts["frozen"]["encoder"], parts["frozen"]["decoder"]
    llm = AutoConfig.from_pretrained(config.model.decoder.path)
    whole = config.model.decoder.table == "whole"
    table = llm.vocab_size * llm.hidden_size if whole else 0
    return {
        "decoder, partitioned": decoder * size // ranks,
        "encoder": encoder * size // (ranks if config.model.encoder.sharded else 1),
        "text embedding table": table * size,
        "trained weights, partitioned": trained * size // ranks,
        "gradients, float32, partitioned": trained * 4 // ranks,
        "masters and moments, float32, partitioned": trained * 12 // ranks,
    }


def dry_run(config: cfg.Config, json_path: Path | None, ranks: int = 1) -> None:
    """Print resolved config, parameter groups and memory; optionally write them as JSON."""
    policy(config.train)
    parts = groups(config.model)
    plan = memory(config, parts, ranks)
    console.print(yaml.safe_dump(config.resolved(), sort_keys=False))
    table = Table(title="parameters")
    for name, justify in (("group", "left"), ("part", "left"), ("count", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for group, members in parts.items():
        for part, count in members.items():
            table.add_row(group, part, f"{count:,}")
    console.print(table)
    table = Table(title=f"memory between steps, per rank, {ranks} ranks")
    table.add_column("what")
    table.add_column("MB", justify="right")
    for what, size in plan.items():
        table.add_row(what, f"{size / 1e6:,.1f}")
    console.print(table)
    if json_path is not None:
        tree: dict[str, Any] = {"config": config.resolved(), "parameters": parts, "memory": plan}
        json_path.write_text(json.dumps(tree, indent=1) + "\n")


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
