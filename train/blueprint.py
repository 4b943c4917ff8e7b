"""A run's model without its weights, from configs alone: the parts on the `meta` device, or on
another one under fake tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from train import config as cfg
from train.ctc import EmbeddingCTC
from train.model import adapters
from train.model.encoder import LayerSum, SpeechEncoder
from train.model.lora import add_lora

# Architectures of the models that the shipped configs name, so that no hub is asked.
_KEPT = Path(__file__).parent.parent / "configs" / "models"


def architecture(path: str, trust_remote_code: bool) -> PretrainedConfig:
    """A model's config: of the local folder, else as kept with the configs, else of the hub."""
    kept = _KEPT / f"{path}.json"
    source = str(kept) if kept.exists() and not Path(path).exists() else path
    return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)


@dataclass(frozen=True)
class Blueprint:
    """The parts of a run's model, each parameter as trained or frozen as in the run."""

    encoder: SpeechEncoder
    adapter: nn.Module
    decoder: PreTrainedModel
    others: dict[str, nn.Module]
    """What else is trained, by name."""

    @classmethod
    def of(cls, model: cfg.Model, losses: cfg.Losses, device: str = "meta") -> Blueprint:
        trust = model.trust_remote_code
        # Per-language adapters are files of the checkpoint; without them the encoder has one
        # language.
        settings = model.encoder.model_copy(update={"languages": {}})
        listener = architecture(model.encoder.path, trust)
        llm = architecture(model.decoder.path, trust)
        others: dict[str, nn.Module] = {}
        with torch.device(device):
            whole = AutoModel.from_config(listener, trust_remote_code=trust)
            encoder = SpeechEncoder(whole, settings)
            decoder = AutoModelForCausalLM.from_config(llm, trust_remote_code=trust)
            decoder.requires_grad_(model.decoder.train == "full")
            if model.decoder.lora is not None:
                add_lora(decoder, model.decoder.lora, "model.decoder.lora")
            adapter = adapters.make(model.adapter, encoder.width, llm.hidden_size)
            adapter.requires_grad_(model.adapter.train)
            if model.encoder.layers == "weighted" and model.adapter.train:
                others["layer sum"] = LayerSum(encoder.num_layers)
            if losses.ctc is not None:
                others["ctc"] = EmbeddingCTC(llm.hidden_size)
        return cls(encoder, adapter, decoder, others)
