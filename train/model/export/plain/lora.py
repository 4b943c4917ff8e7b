"""Low-rank updates of linear layers, with peft's names; stands in for `train.model.lora`."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from train.config import LoRA


class LowRank(nn.Module):
    """A linear layer and its update."""

    def __init__(self, base: nn.Linear, rank: int, alpha: int):
        super().__init__()
        self.base_layer, self.scale = base, alpha / rank
        like = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        down = nn.Linear(base.in_features, rank, **like)  # type: ignore[arg-type]
        up = nn.Linear(rank, base.out_features, **like)  # type: ignore[arg-type]
        self.lora_A, self.lora_B = (nn.ModuleDict({"default": part}) for part in (down, up))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update = self.lora_B["default"](self.lora_A["default"](x))
        out: torch.Tensor = self.base_layer(x) + update * self.scale
        return out


def add_lora(model: PreTrainedModel, settings: LoRA, where: str) -> None:
    """Put updates beside the layers that `settings.targets` names; weights are loaded later."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in settings.targets
    }
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LowRank(layer, settings.rank, settings.alpha))
