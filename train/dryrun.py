"""`--dry-run`: what a run would train and hold, from configs alone, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.table import Table
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig

from train import config as cfg
from train.ctc import EmbeddingCTC
from train.engine import policy
from train.model import adapters
from train.model.encoder import LayerSum, SpeechEncoder
from train.model.lora import add_lora
from train.progress import console

_BYTES = {"bf16": 2, "fp32": 4}

# Architectures of the models that the shipped configs name, so that no hub is asked.
_KEPT = Path(__file__).parent.parent / "configs" / "models"


def architecture(path: str, trust_remote_code: bool) -> PretrainedConfig:
    """A model's config: of the local folder, else as kept with the configs, else of the hub."""
    kept = _KEPT / f"{path}.json"
    source = str(kept) if kept.exists() and not Path(path).exists() else path
    return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)


def groups(config: cfg.Config) -> dict[str, dict[str, int]]:
    """Parameter counts: {"trained": {part: count}, "frozen": {part: count}}."""
    model = config.model
    trust = model.trust_remote_code
    # Per-language adapters are files of the checkpoint; without them the encoder has one language.
    settings = model.encoder.model_copy(update={"languages": {}})
    listener = architecture(model.encoder.path, trust)
    llm = architecture(model.decoder.path, trust)
    with torch.device("meta"):
        whole = AutoModel.from_config(listener, trust_remote_code=trust)
        encoder = SpeechEncoder(whole, settings)
        decoder = AutoModelForCausalLM.from_config(llm, trust_remote_code=trust)
        decoder.requires_grad_(model.decoder.train == "full")
        if model.decoder.lora is not None:
            add_lora(decoder, model.decoder.lora, "model.decoder.lora")
        parts: dict[str, torch.nn.Module] = {
            "adapter": adapters.make(model.adapter, encoder.width, llm.hidden_size),
            "encoder": encoder,
            "decoder": decoder,
        }
        if model.encoder.layers == "weighted":
            parts["layer sum"] = LayerSum(encoder.num_layers)
        if config.losses.ctc is not None:
            parts["ctc"] = EmbeddingCTC(llm.hidden_size)
    trained = {name: _count(part, trained=True) for name, part in parts.items()}
    trained["layer norm"] = 2 * llm.hidden_size
    frozen = {name: _count(part, trained=False) for name, part in parts.items()}
    return {
        "trained": {name: count for name, count in trained.items() if count},
        "frozen": {name: frozen[name] for name in ("encoder", "decoder")},
    }


def memory(config: cfg.Config, parts: dict[str, dict[str, int]], ranks: int) -> dict[str, int]:
    """Bytes per rank of what a run holds between steps (activations come on top)."""
    size = _BYTES[config.train.precision]
    trained = sum(parts["trained"].values())
    encoder, decoder = parts["frozen"]["encoder"], parts["frozen"]["decoder"]
    settings = config.model.decoder
    llm = architecture(settings.path, config.model.trust_remote_code)
    whole = settings.table == "whole" and settings.train == "none"
    table = llm.vocab_size * llm.hidden_size if whole else 0
    return {
        "decoder, frozen, partitioned": decoder * size // ranks,
        "encoder": encoder * size // (ranks if config.model.encoder.sharded else 1),
        "text embedding table": table * size,
        "trained weights, partitioned": trained * size // ranks,
        "gradients, float32, partitioned": trained * 4 // ranks,
        "masters and moments, float32, partitioned": trained * 12 // ranks,
    }


def dry_run(config: cfg.Config, json_path: Path | None, ranks: int = 1) -> None:
    """Print resolved config, parameter groups and memory; optionally write them as JSON."""
    policy(config.train)
    parts = groups(config)
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


def _count(module: torch.nn.Module, trained: bool) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad == trained)
