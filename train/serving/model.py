"""A trained model as an exported folder has it, from wherever it lies."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoModel, AutoProcessor

from train import checkpoint as ckpt
from train import config as cfg
from train.model.export import HearkenConfig, HearkenModel, HearkenProcessor
from train.model.export.folder import model_of, processor_of


def is_exported(path: Path) -> bool:
    """Whether `path` is a folder of `train/export.py`, and not an encoder's or an LLM's."""
    described = path / "config.json"
    if not described.exists():
        return False
    return bool(json.loads(described.read_text()).get("model_type") == HearkenConfig.model_type)


def open_model(
    path: Path, device: str, trusted: bool = False
) -> tuple[HearkenModel, HearkenProcessor]:
    """The model of an exported folder, or of a run or checkpoint.

    Args:
        trusted: code that comes with its encoder or LLM may be run.
    Raises:
        CheckpointError, ConfigError: there is none, or it cannot be loaded.
    """
    if is_exported(path):
        described = HearkenConfig.from_pretrained(path)
        cfg.distrust(bool(described.speech.get("trust_remote_code")) and not trusted, str(path))
        model = AutoModel.from_pretrained(path).to(device)
        return model, AutoProcessor.from_pretrained(path)
    found = ckpt.find(path)
    config = cfg.recorded(found.state.config, str(found.path), trusted)
    return model_of(config, found.weights, device), processor_of(config)
