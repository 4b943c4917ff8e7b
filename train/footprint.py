"""Memory that a micro-batch takes beside the model's states, found without weights.

The model that stage 2 trains runs forward and backward on fake tensors, which have shapes and no
storage; every storage that an operation makes is counted while it is alive. So whatever a family,
a loss or gradient checkpointing keeps for the backward pass is in the figure.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.collate import Batch, Clip, Sample, Word, collate
from data.prompts import Speech, Text
from train import config as cfg
from train.blueprint import Blueprint
from train.model import adapters, attention
from train.model.build import DTYPES, whole
from train.model.encoder import SpeechEncoder, front_end_of
from train.model.lengths import LengthRule
from train.model.recompute import recompute_layers
from train.model.speech_llm import LiveTable, SpeechEmbeddings, SpeechLLM

RATE = 16_000
SECONDS, PROMPT, ANSWER = 12.0, 34, 44
"""The utterance that plans are made of: as LibriSpeech's, with BLSP's prompt and answers."""


class Typical:
    """Micro-batches of the planned utterance, for a run's encoder and adapter."""

    def __init__(self, config: cfg.Config, encoder: SpeechEncoder):
        self._losses, self._encoder = config.losses, encoder
        self._samples = round(min(SECONDS, config.data.max_seconds) * RATE)
        front = front_end_of(encoder.model.config, config.model.encoder.path)
        self._rule = LengthRule(front, adapters.geometry(config.model.adapter))

    def batch(self, tokens: int) -> Batch:
        """As many of the utterances as `tokens` LLM positions hold, at least one."""
        encoder, samples = self._encoder, self._samples
        slots, frames = int(self._rule.slots(samples)), int(self._rule.frames(samples))
        count = max(1, tokens // (slots + PROMPT + ANSWER))
        shape: tuple[int, ...] = (samples,)
        if encoder.kind == "whisper":
            heard = frames if encoder.own_length else encoder.model.config.max_source_positions
            shape = (encoder.model.config.num_mel_bins, 2 * heard)
        elif encoder.kind == "wav2vec2-bert":
            shape = (encoder.model.config.feature_projection_input_dim, frames)
        clip = Clip(np.zeros(shape, np.float32), samples, frames, slots)
        answer = Text((0,) * ANSWER, labelled=True)
        text = Text((0,) * PROMPT)
        sample = Sample(
            "planned",
            (text, Speech(0, slots), answer),
            clip,
            read=(text, answer) if self._losses.kl else None,
            transcript=(0, 1) * (ANSWER // 2),
            words=(Word(0, slots, (0,) * ANSWER),),
        )
        return collate([sample] * count)


class Planned:
    """A run's model on fake tensors."""

    def __init__(self, config: cfg.Config):
        self._fake = FakeTensorMode()
        with self._fake:
            parts = Blueprint.of(config.model, config.losses, "cpu")
            self._model = _assemble(parts, config)
        self.typical = Typical(config, parts.encoder)

    def peak(self, tokens: int) -> int:
        """Bytes alive at most in forward and backward of a micro-batch of `tokens` positions,
        gradients of what is trained not counted."""
        batch = self.typical.batch(tokens)
        for p in self._model.trained().values():
            if p.grad is None:  # there before, as in any micro-batch of a step but the first
                with self._fake:
                    p.grad = torch.zeros_like(p)
        with self._fake, _ctc_by_shape(), Live() as live:
            batch = batch.map(self._fake.from_tensor)
            self._model(batch).sum().backward()
        return live.peak


def _assemble(parts: Blueprint, config: cfg.Config) -> SpeechLLM:
    """The parts put together as `train.model.build` does it."""
    dtype = DTYPES[config.train.precision]
    decoder = parts.decoder
    for part in (decoder, parts.encoder, parts.adapter, *parts.others.values()):
        _cast(part, dtype)
    attention.prepare(decoder)
    if config.model.decoder.checkpointing:
        recompute_layers(decoder)
    lookup = None
    if config.model.decoder.train == "full":
        lookup = LiveTable(cast(nn.Embedding, decoder.get_input_embeddings()))
    embeddings = SpeechEmbeddings(decoder, whole, config.model.ops, lookup)
    _cast(embeddings, dtype)
    model = SpeechLLM(
        parts.encoder,
        parts.adapter,
        decoder,
        embeddings,
        layer_sum=parts.others.get("layer sum"),  # type: ignore[arg-type]
        sharded_encoder=config.model.encoder.sharded,
        losses=config.losses.model_copy(update={"ctc": None}),
    )
    if "ctc" in parts.others:
        model.losses, model.ctc = config.losses, parts.others["ctc"]  # type: ignore[assignment]
    return model.train()


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """As `module.to(dtype)`, which fake tensors refuse; parameters that are shared stay so."""
    like = {p: nn.Parameter(p.detach().to(dtype), p.requires_grad) for p in module.parameters()}
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = like[p]
        for name, b in part._buffers.items():
            if b is not None and b.is_floating_point():
                part._buffers[name] = b.to(dtype)


@contextmanager
def _ctc_by_shape() -> Iterator[None]:
    """In place of torch's CTC, whose result's shape hangs on values, something that keeps as much
    for the backward pass."""
    real = nn.functional.ctc_loss
    nn.functional.ctc_loss = lambda log_p_SCA, *_, **__: log_p_SCA.exp().sum((0, 2))
    try:
        yield
    finally:
        nn.functional.ctc_loss = real


class Live(TorchDispatchMode):
    """Bytes of the storages that operations make, while they are alive: `now`, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if (
                isinstance(tensor, torch.Tensor)
                and (key := _key(tensor)) not in given | self._known
            ):
                storage = tensor.untyped_storage()
                self._known.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
