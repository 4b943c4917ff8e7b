"""Low-rank updates (2106.09685) of a frozen encoder or decoder, by peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel

from train import config as cfg

# Families that peft has no own choice for. WavLM's attention reads its projections' weights, past
# the modules that peft would put in their place, so its feed-forward layers are updated.
_TARGETS = {
    "wav2vec2": ("q_proj", "v_proj"),
    "hubert": ("q_proj", "v_proj"),
    "wavlm": ("intermediate_dense", "output_dense"),
    "wav2vec2-bert": ("linear_q", "linear_v"),
    "whisper": ("q_proj", "v_proj"),
}


def add_lora(model: PreTrainedModel, settings: cfg.LoRA, where: str) -> None:
    """Put trained updates beside the linear layers of `model`, in its dtype; they begin as zero.

    Without dropout, so that a resumed run is the uninterrupted one. Draws from torch's generator.

    Args:
        where: the settings' place in the configuration, for messages.
    Raises:
        ConfigError: the targets are not known, or not in the model.
    """
    kind: str = model.config.model_type
    known = _TARGETS | TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    targets = settings.targets or _TARGETS.get(kind) or known.get(kind, ())
    linear = {
        name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)
    }
    if missing := sorted(set(targets) - linear):
        raise cfg.ConfigError(
            f"{where}.targets: the {kind!r} model has no linear layer {', '.join(missing)}; it has "
            f"{', '.join(sorted(linear))}"
        )
    if not targets:
        raise cfg.ConfigError(
            f"{where}.targets must be given for a {kind!r} model; it has "
            f"{', '.join(sorted(linear))}"
        )
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules=list(targets)
    )
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.to(model.dtype)


@contextmanager
def without_updates(model: nn.Module) -> Iterator[None]:
    """The pretrained model inside the context: its updates, if it has any, do nothing."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        # Not peft's `enable_adapters`, which also switches their gradients off and on.
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def lora_modules(model: nn.Module) -> nn.ModuleDict:
    """The updates' own modules, without the layers they update: what a hidden model trains."""
    return nn.ModuleDict(
        {
            name.replace(".", "/"): module
            for name, module in model.named_modules()
            if "lora_" in name.rpartition(".")[2] and any(True for _ in module.parameters())
        }
    )
