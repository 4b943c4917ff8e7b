"""MMS's per-language adapters (2305.13516), many languages in one batch.

Every layer of an MMS encoder ends in a small residual adapter, and `adapter.LANGUAGE.safetensors`
beside the model holds one language's weights for all layers. Here the weights of all languages of a
corpus are stacked, and each clip of a batch is given its own.

Shapes: A languages, C clips, F frames, E channels, B the adapter's inner width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2AttnAdapterLayer
from transformers.utils import cached_file

from train import config as cfg
from train.model.packed_layers import packed, unpacked


class LanguageAdapters(nn.Module):
    """One layer's adapters of all languages, frozen."""

    def __init__(self, layer: Wav2Vec2AttnAdapterLayer, weights: list[dict[str, torch.Tensor]]):
        super().__init__()
        own = dict(layer.named_parameters())
        for name, parameter in own.items():
            stacked = torch.stack([w[name] for w in weights]).to(parameter)
            bank = nn.Parameter(stacked, requires_grad=False)
            self.register_parameter(name.replace(".", "_"), bank)
        self.eps = layer.norm.eps
        self.clips: torch.Tensor | None = None
        """int64 [C]: the language of each clip of the next batch."""
        self.frames: tuple[int, ...] = ()
        """[C] of the same clips, on the host."""

    def forward(self, x_1NE: torch.Tensor) -> torch.Tensor:
        """What the layer's own adapter would add to clips one after another, by their languages."""
        return packed(self._of_clips(unpacked(x_1NE, self.frames)), self.frames)

    def _of_clips(self, x_CFE: torch.Tensor) -> torch.Tensor:
        clips = self.clips

        def of_clips(name: str) -> torch.Tensor:
            bank: torch.Tensor = getattr(self, name)
            return bank[clips]

        normed = F.layer_norm(x_CFE, x_CFE.shape[-1:], eps=self.eps)
        normed = normed * of_clips("norm_weight")[:, None] + of_clips("norm_bias")[:, None]
        inner_CFB = torch.baddbmm(
            of_clips("linear_1_bias")[:, None], normed, of_clips("linear_1_weight").transpose(1, 2)
        )
        return torch.baddbmm(
            of_clips("linear_2_bias")[:, None],
            F.relu(inner_CFB),
            of_clips("linear_2_weight").transpose(1, 2),
        )


def add_languages(model: nn.Module, path: str, languages: dict[str, str]) -> dict[str, int]:
    """Give a Wav2Vec2 encoder the adapters of `languages` (corpus code → adapter's).

    Returns the place of each corpus code among them.

    Raises:
        ConfigError: the encoder has no such adapters, or a language's are missing or do not fit.
    """
    layers: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Wav2Vec2AttnAdapterLayer)
    }
    if not layers:
        raise cfg.ConfigError(
            f"model.encoder.languages: {path!r} has no per-language adapters (adapter_attn_dim in "
            "its config.json), as the MMS models have; remove the setting"
        )
    names = list(dict.fromkeys(languages.values()))
    found = [_read(path, name, layers) for name in names]
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        assert isinstance(layer, Wav2Vec2AttnAdapterLayer)
        bank = LanguageAdapters(layer, [weights[name] for weights in found])
        setattr(model.get_submodule(parent), last, bank)
    return {code: names.index(name) for code, name in languages.items()}


def choose_languages(
    model: nn.Module,
    known: dict[str, int],
    clips: tuple[str, ...],
    frames: tuple[int, ...],
    device: torch.device,
) -> None:
    """Choose the adapters of the next batch, out of `known` (see `add_languages`).

    Args:
        frames: of each clip.

    Silence, whose language is empty, takes any.

    Raises:
        ValueError: a clip's language has no adapter.
    """
    for language in clips:
        if language and language not in known:
            raise ValueError(
                f"a clip is in {language!r}, but model.encoder.languages names adapters for "
                f"{', '.join(known)} alone; add it"
            )
    chosen = torch.tensor([known.get(c, 0) for c in clips]).to(device, non_blocking=True)
    for module in model.modules():
        if isinstance(module, LanguageAdapters):
            module.clips, module.frames = chosen, frames


def _read(
    path: str, language: str, layers: dict[str, nn.Module]
) -> dict[str, dict[str, torch.Tensor]]:
    """Layer → parameter → value. The file names them as the CTC model does, and has its head."""
    name = f"adapter.{language}.safetensors"
    try:
        tensors = load_file(str(cached_file(path, name)))
    except OSError as e:
        raise cfg.ConfigError(f"model.encoder.languages: no {name} in {path!r}: {e}") from None
    found: dict[str, dict[str, torch.Tensor]] = {}
    for layer, module in layers.items():
        prefix = f"wav2vec2.{layer}."
        found[layer] = {}
        for n, p in module.named_parameters():
            value = tensors.get(prefix + n)
            if value is None or value.shape != p.shape:
                shape = "nothing" if value is None else list(value.shape)
                raise cfg.ConfigError(
                    f"model.encoder.languages: {name} of {path!r}: {prefix}{n} must be "
                    f"{list(p.shape)}, found {shape}"
                )
            found[layer][n] = value
    return found
