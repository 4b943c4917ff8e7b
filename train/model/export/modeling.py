"""The exported speech LLM, as transformers loads it.

The same modules as in training (`SpeechEncoder`, the adapter, `pack_embeddings`), around an LLM in
its ordinary, padded form. In an exported folder this file stands beside the ones that it imports.

Shapes: B conversations, T positions (padded at the start), C clips of all conversations in their
order, R slots of all clips in their order, H LLM width, V vocabulary.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from train import config as cfg
from train.config import Model as Settings
from train.model import adapters
from train.model.encoder import LayerSum, SpeechEncoder, front_end_of
from train.model.export.configuration import HearkenConfig
from train.model.export.sources import check
from train.model.generate import _ends
from train.model.hearing import hear
from train.model.lengths import LengthRule
from train.model.lora import add_lora
from train.ops import pack_embeddings

# What transformers' Auto classes hand on that is not for the LLM's own loading.
_NOT_FOR_THE_LLM = ("_from_auto", "adapter_kwargs", "trust_remote_code", "subfolder", "state_dict")
_FROM_A_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


class SlotNorm(nn.Module):
    """Weights of the LayerNorm that slots pass on their way to the LLM."""

    def __init__(self, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.bias = nn.Parameter(torch.zeros(hidden))


class HearkenModel(PreTrainedModel, GenerationMixin):
    """An encoder, an adapter and an LLM; frozen, in eval mode.

    Args:
        encoder, decoder: pretrained, in one dtype and on one device.
        encoder_path: where the encoder was loaded from; its adapters of languages are beside it.
    """

    config_class = HearkenConfig
    base_model_prefix = ""
    main_input_name = "input_ids"

    def __init__(
        self,
        config: HearkenConfig,
        encoder: PreTrainedModel,
        decoder: PreTrainedModel,
        encoder_path: str,
    ):
        super().__init__(config)
        settings = Settings.model_validate(_at(config.speech, encoder_path))
        front_end = front_end_of(encoder.config, encoder_path)
        self.rule = LengthRule(front_end, adapters.geometry(settings.adapter))
        if settings.decoder.lora is not None:
            add_lora(decoder, settings.decoder.lora, "model.decoder.lora")
        self.encoder = SpeechEncoder(encoder, settings.encoder)
        weighted = settings.encoder.layers == "weighted"
        self.layer_sum = LayerSum(self.encoder.num_layers) if weighted else None
        hidden = decoder.config.hidden_size
        self.adapter = adapters.make(settings.adapter, self.encoder.width, hidden, settings.ops)
        self.embeddings = SlotNorm(hidden)
        for part in (self.layer_sum, self.adapter, self.embeddings):
            if part is not None:
                part.to(decoder.device, decoder.dtype)
        self.decoder = decoder
        self.generation_config = decoder.generation_config = _decoding(decoder, config)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        config: HearkenConfig | None = None,
        encoder: str | None = None,
        decoder: str | None = None,
        dtype: torch.dtype | str | None = None,
        **others: Any,
    ) -> HearkenModel:
        """Load an exported folder, or a name on the hub.

        Args:
            encoder, decoder: where those lie that an adapter belongs to, if not where they did
                when it was trained; their hashes are checked.
            dtype: of all parts; None for that of the export.
            others: `device_map`, `quantization_config`, `attn_implementation`, ...: for the LLM.
        Raises:
            ConfigError: the encoder or the LLM is missing, or another one.
        """
        hub = {name: others.pop(name) for name in _FROM_A_HUB if name in others}
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = Path(snapshot_download(str(pretrained_model_name_or_path), **hub))
        config = config or HearkenConfig.from_pretrained(folder)
        paths = {}
        for part, given in (("encoder", encoder), ("decoder", decoder)):
            if config.merged:
                paths[part] = given or str(folder / part)
                continue
            paths[part] = given or config.sources[part]["path"]
            check(part, paths[part], config.sources[part]["files"])
        kept = {name: value for name, value in others.items() if name not in _NOT_FOR_THE_LLM}
        if dtype is None or dtype == "auto":
            dtype = config.dtype or torch.float32
        weights = load_file(folder / "model.safetensors")
        return cls.of(config, paths["encoder"], paths["decoder"], weights, dtype, **kept)

    @classmethod
    def of(
        cls,
        config: HearkenConfig,
        encoder: str,
        decoder: str,
        weights: dict[str, torch.Tensor],
        dtype: torch.dtype | str,
        **others: Any,
    ) -> HearkenModel:
        """From the folders of encoder and LLM, and what was trained upon them."""
        trust = bool(config.speech.get("trust_remote_code"))
        loaded = AutoModelForCausalLM.from_pretrained(
            decoder, dtype=dtype, trust_remote_code=trust, **others
        )
        heard = load_encoder(encoder, dtype, trust)
        nn.Module.to(heard, loaded.device)
        model = cls(config, heard, loaded, encoder)
        model.put(weights)
        return model

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Not from here: a folder is more than this model's weights."""
        raise RuntimeError(
            "a folder is written by train/export.py alone; copy the one that this was loaded from"
        )

    def own(self) -> dict[str, nn.Parameter]:
        """Name → what was trained: all but the pretrained encoder and LLM."""
        return {name: p for name, p in self.named_parameters() if is_own(name)}

    @torch.no_grad()
    def put(self, weights: dict[str, torch.Tensor]) -> None:
        """Copy trained weights in, rounding to the model's dtype.

        Raises:
            ConfigError: they are not those of this model.
        """
        own = self.own()
        differ = {n for n in own.keys() | weights.keys() if _shape(own, n) != _shape(weights, n)}
        if differ:
            name = min(differ)
            raise cfg.ConfigError(
                f"weights and config.json differ in {len(differ)} tensors: {name} is "
                f"{_shape(weights, name)} in the weights, {_shape(own, name)} by the config"
            )
        for name, parameter in own.items():
            parameter.copy_(weights[name])

    def embed(
        self,
        input_ids: torch.Tensor,
        speech_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        samples: torch.Tensor | None = None,
        languages: tuple[str, ...] = (),
    ) -> torch.Tensor:
        """The LLM's inputs [B, T, H].

        Args:
            input_ids: int64 [B, T]; any token where a slot stands.
            speech_mask: bool [B, T], true where a slot stands; in their order these get the slots.
            input_features: the encoder's input [C, ...], padded at the end; float32.
            samples: int64 [C]: each clip's own length, at 16 kHz.
            languages: [C], for an encoder with per-language adapters.
        Raises:
            ValueError: the clips make more or fewer slots than there are places.
        """
        rows_NH = self.decoder.get_input_embeddings()(input_ids.flatten())
        source = torch.arange(len(rows_NH), device=rows_NH.device)
        speech_RH = rows_NH.new_empty(0, rows_NH.shape[1])
        if input_features is not None:
            assert samples is not None
            assert speech_mask is not None
            lengths = tuple(int(n) for n in samples)
            frames = tuple(int(self.rule.frames(n)) for n in lengths)
            dtype = self.embeddings.weight.dtype
            speech_RH = hear(
                self.encoder, self.layer_sum, self.adapter, dtype,
                input_features, lengths, frames, tuple(languages),
            )  # fmt: skip
            here = speech_mask.flatten()
            if int(here.sum()) != len(speech_RH):
                raise ValueError(
                    f"the clips make {len(speech_RH)} slots, but speech_mask has "
                    f"{int(here.sum())} places; give what the processor returned"
                )
            source = torch.where(here, -here.cumsum(0), source)
        norm, eps, impl = self.embeddings, self.config.norm_eps, self.config.speech["ops"]
        packed = pack_embeddings(rows_NH, speech_RH, source, norm.weight, norm.bias, eps, impl=impl)
        return packed.view(*input_ids.shape, -1)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        speech_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        samples: torch.Tensor | None = None,
        languages: tuple[str, ...] = (),
        **others: Any,
    ) -> Any:
        """What the LLM returns: `logits` [B, T, V] and, given `labels` [B, T], `loss`.

        Args:
            attention_mask: [B, T]; the others as in `embed`.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.decoder(
            inputs_embeds=self.embed(input_ids, speech_mask, input_features, samples, languages),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            **others,
        )

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        speech_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        samples: torch.Tensor | None = None,
        languages: tuple[str, ...] = (),
        **others: Any,
    ) -> Any:
        """New tokens alone, [B, up to max_new_tokens]; greedy, unless asked otherwise.

        Args:
            others: of transformers' `generate`: `max_new_tokens`, `num_beams`, `streamer`, ...
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs = self.embed(input_ids, speech_mask, input_features, samples, languages)
        return cast(Any, self.decoder).generate(inputs_embeds=inputs, attention_mask=mask, **others)


def load_encoder(path: str, dtype: torch.dtype | str, trust: bool = False) -> PreTrainedModel:
    """A pretrained encoder, or the encoder's half of a Whisper that an export wrote."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    kind = WhisperEncoder if config.architectures == ["WhisperEncoder"] else AutoModel
    loaded: PreTrainedModel = kind.from_pretrained(path, dtype=dtype, trust_remote_code=trust)
    return loaded


def is_own(name: str) -> bool:
    """Whether a parameter belongs to what was trained, rather than to encoder or LLM."""
    return not name.startswith(("encoder.", "decoder.")) or "lora_" in name


def _at(speech: dict[str, Any], encoder_path: str) -> dict[str, Any]:
    """The settings with the encoder's folder where it really is."""
    moved = deepcopy(speech)
    moved["encoder"]["path"] = encoder_path
    return moved


def _decoding(decoder: PreTrainedModel, config: HearkenConfig) -> GenerationConfig:
    """As in training and evaluation: greedy, and nothing of the LLM's own settings but its ends."""
    assert config.end_token_id is not None
    return GenerationConfig(
        max_new_tokens=64,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=_ends(decoder, config.end_token_id),
        pad_token_id=config.end_token_id,
    )


def _shape(tensors: Any, name: str) -> list[int] | None:
    return list(tensors[name].shape) if name in tensors else None
