"""What `benchmarks.step` trains: sizes of models, mixes of lengths, and the utterances of one step.

Weights and sounds are random: what a step costs depends on shapes alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig

from train import config as cfg
from train.blueprint import architecture
from train.model import adapters, attention
from train.model.build import whole
from train.model.encoder import SpeechEncoder, front_end_of
from train.model.lengths import LengthRule
from train.model.speech_llm import SpeechEmbeddings, SpeechLLM

RATE = 16_000
WINDOW_SECONDS = 30.0
_HOP = 160  # samples of a log-mel frame


@dataclass(frozen=True)
class Size:
    """Architectures of encoder and LLM, and what belongs to them."""

    encoder: Callable[[], PretrainedConfig]
    decoder: Callable[[], PretrainedConfig]
    bottleneck: int = 512

    def adapter(self) -> cfg.ConvAdapter:
        return cfg.ConvAdapter(bottleneck=self.bottleneck)


def _whisper(width: int, layers: int, heads: int, mel: int = 80) -> PretrainedConfig:
    return AutoConfig.for_model(
        "whisper", d_model=width, encoder_layers=layers, encoder_attention_heads=heads,
        encoder_ffn_dim=4 * width, decoder_layers=1, decoder_attention_heads=heads,
        decoder_ffn_dim=4 * width, num_mel_bins=mel,
    )  # fmt: skip


def _llama(width: int, layers: int, inner: int, words: int, kv: int = 0) -> PretrainedConfig:
    heads = width // (128 if width >= 4096 else 64)
    return AutoConfig.for_model(
        "llama", hidden_size=width, num_hidden_layers=layers, intermediate_size=inner,
        num_attention_heads=heads, num_key_value_heads=kv or heads, vocab_size=words,
        tie_word_embeddings=False,
    )  # fmt: skip


SIZES = {
    # Of the kind of the micro world's models.
    "micro": Size(lambda: _whisper(192, 4, 4), lambda: _llama(256, 4, 704, 2_048), bottleneck=128),
    # Whisper-tiny's encoder, and 52 M with Llama-2's words.
    "small": Size(lambda: _whisper(384, 4, 6), lambda: _llama(512, 6, 1408, 32_000)),
    "mms-1b-bloomz-7b1": Size(
        lambda: architecture("facebook/mms-1b-all", False),
        lambda: architecture("bigscience/bloomz-7b1", False),
    ),
    "whisper-large-llama-8b": Size(
        lambda: architecture("openai/whisper-large-v3", False),
        lambda: _llama(4096, 32, 14_336, 128_256, kv=8),
    ),
}


def _librispeech(draw: random.Random) -> float:
    kind = draw.random()
    if kind < 0.02:
        return draw.uniform(18, 35)
    return draw.gauss(14.5, 1.5) if kind < 0.56 else draw.triangular(1.5, 24, 3)


def _blsp(draw: random.Random) -> float:
    return draw.lognormvariate(1.5, 0.5)


MIXES = {"librispeech": _librispeech, "blsp": _blsp}
"""Seconds of an utterance. LibriSpeech's: 1-35 s, 12 s on average, most near 14 s, of which those
above Whisper's window of 30 s are drawn again; BLSP's own: 5 s on average, most under 10."""


@dataclass(frozen=True)
class Utterance:
    """features [mel, frames] or [samples] of the whole window, silent behind `samples`."""

    features: np.ndarray
    samples: int
    before: tuple[int, ...]
    behind: tuple[int, ...]
    answer: tuple[int, ...]

    def heard(self) -> np.ndarray:
        """The features without the silence: a whole number of encoder frames."""
        if self.features.ndim == 1:
            return self.features[: self.samples]
        return self.features[:, : 2 * -(-self.samples // (2 * _HOP))]


def seconds_of(mix: str, draw: random.Random) -> Iterator[float]:
    """Lengths of utterances without end, none longer than Whisper's window."""
    while True:
        seconds = MIXES[mix](draw)
        if 1.0 <= seconds <= WINDOW_SECONDS:
            yield seconds


def utterances(mix: str, count: int, encoder: PretrainedConfig, words: int) -> list[Utterance]:
    """One step's utterances: prompt and answer as long as BLSP's (its one instruction of 24 tokens,
    the 10 that end a prompt, and fewer than 40 words in at most 64 tokens)."""
    draw, random_ = random.Random(0), np.random.default_rng(0)
    before, behind = (tuple(draw.randrange(words) for _ in range(n)) for n in (24, 10))
    made = []
    for seconds in islice(seconds_of(mix, random.Random(1)), count):
        samples, window = round(seconds * RATE), round(WINDOW_SECONDS * RATE)
        if encoder.model_type == "whisper":
            features = np.zeros((encoder.num_mel_bins, window // _HOP), np.float32)
            heard = 2 * -(-samples // (2 * _HOP))
        else:
            features, heard = np.zeros(window, np.float32), samples
        features[..., :heard] = random_.standard_normal((*features.shape[:-1], heard), np.float32)
        answer = tuple(draw.randrange(words) for _ in range(draw.randint(24, 64)))
        made.append(Utterance(features, samples, before, behind, answer))
    return made


def make_model(size: Size, own_length: bool, dtype: torch.dtype, device: str) -> SpeechLLM:
    """The model that stage 2 trains, with random weights: the same ones every time.

    Args:
        own_length: of a Whisper encoder; others hear every clip at its own length anyway.
    """
    listener, llm = size.encoder(), size.decoder()
    own_length = own_length and listener.model_type == "whisper"
    settings = cfg.Encoder(path="random", own_length=own_length)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            encoder = SpeechEncoder(AutoModel.from_config(listener), settings)
            decoder = AutoModelForCausalLM.from_config(llm)
            adapter = adapters.make(size.adapter(), encoder.width, llm.hidden_size)
            attention.prepare(decoder)
            decoder.requires_grad_(False)
            model = SpeechLLM(encoder, adapter, decoder, SpeechEmbeddings(decoder, whole))
            # Some are not made where the context says, and the encoder is not in the model's tree.
            encoder.to(device, dtype)
            return model.to(device, dtype)
    finally:
        torch.set_default_dtype(default)


def length_rule(size: Size) -> LengthRule:
    return LengthRule(front_end_of(size.encoder(), "random"), adapters.geometry(size.adapter()))
