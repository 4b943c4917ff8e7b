"""One training step of the same model as four systems take it: ours, and three plain ones.

Each system cuts a step's utterances into micro-batches, and gives the loss of one: the sum over its
labels, divided by the step's count. Weights, utterances, optimizer and attention kernel are the
same; the plain ones right-pad, so that causal attention needs no mask, as it does not for us.

Shapes: B utterances, F encoder frames, R slots, T positions, H LLM width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel

from benchmarks.step_cases import RATE, Utterance
from data.collate import Batch, Clip, Sample, collate
from data.plan import Plan
from data.prompts import Speech, Text
from train.flops import Rows
from train.model.adapters.conv import ConvAdapter
from train.model.attention import set_packed
from train.model.encoder import WAVEFORM, SpeechEncoder
from train.model.kernels import Packing
from train.model.lengths import LengthRule
from train.model.speech_llm import SpeechLLM


class System(ABC):
    """`knob` is the utterances or the LLM positions of a micro-batch, whichever it counts."""

    own_length = True
    unit = "utterances"

    def __init__(self, model: SpeechLLM, rule: LengthRule, device: str):
        self.model, self.rule, self.device = model, rule, device

    @property
    def trained(self) -> list[nn.Parameter]:
        return list(self.model.trained().values())

    @abstractmethod
    def batches(self, utterances: list[Utterance], knob: int) -> list[Any]:
        """The step's micro-batches, as a loader's workers would hand them over."""

    @abstractmethod
    def loss(self, batch: Any, labels: int) -> Tensor:
        """Sum over the batch's labels, divided by the step's."""

    @abstractmethod
    def rows(self, batch: Any) -> Rows:
        """What this system puts through the model's parts, with the padding that it wants."""

    def positions(self, utterance: Utterance) -> int:
        text = len(utterance.before) + len(utterance.behind) + len(utterance.answer)
        return text + int(self.rule.slots(utterance.samples))


class Hearken(System):
    """Bins of the plan, collated and trained as `train/main.py` does it."""

    unit = "positions"

    def batches(self, utterances: list[Utterance], knob: int) -> list[Batch]:
        plan = Plan(
            np.zeros(len(utterances), np.int64),
            np.array([self.positions(u) for u in utterances]),
            np.array([u.samples for u in utterances]),
            seed=0,
            tokens_per_bin=knob,
            seconds_per_bin=3600.0,
            bins_per_step=1,
        )
        bins = [numbers for step in plan.iterate(0) for numbers in step]
        samples = ([self._sample(utterances[i]) for i in numbers] for numbers in bins)
        return [collate(made, share=True) for made in samples]

    def _sample(self, u: Utterance) -> Sample:
        slots = int(self.rule.slots(u.samples))
        document = (Text(u.before), Speech(0, slots), Text(u.behind), Text(u.answer, labelled=True))
        frames = int(self.rule.frames(u.samples))
        return Sample("random", document, Clip(u.heard(), u.samples, frames, slots))

    def loss(self, batch: Batch, labels: int) -> Tensor:
        return self.model(batch.to(self.device)).sum() / labels

    def rows(self, batch: Batch) -> Rows:
        shared = (batch.num_shared, 0)
        return Rows(batch.frames, batch.frames, batch.lengths, batch.num_labels, shared=shared)


class PaddedAdapter(nn.Module):
    """The conv adapter as torch's layers have it: padded, transposed and masked."""

    def __init__(self, adapter: ConvAdapter):
        super().__init__()
        self.geometry = adapter.geometry
        self.convs = nn.ModuleList()
        for layer, g in zip(adapter.convs, self.geometry, strict=True):
            out, kernel, channels = layer.weight.shape
            conv = nn.Conv1d(channels, out, kernel, g.stride, g.padding)
            # New ones, on the device and in the dtype of the adapter's own.
            conv.weight = nn.Parameter(layer.weight.detach().transpose(1, 2).contiguous())
            conv.bias = nn.Parameter(layer.bias.detach().clone())
            self.convs.append(conv)
        self.down, self.up = adapter.down, adapter.up

    def forward(self, x_BFC: Tensor, lengths: list[int]) -> Tensor:
        """[B, F, C] -> [B, R, H]; rows behind a clip's own slots hold nothing of use."""
        x_BCF = x_BFC.transpose(1, 2)
        for conv, g in zip(self.convs, self.geometry, strict=True):
            own = torch.tensor(lengths, device=x_BCF.device)[:, None]
            inside = torch.arange(x_BCF.shape[2], device=x_BCF.device) < own
            x_BCF = F.glu(conv(x_BCF * inside[:, None]), dim=1)
            lengths = [g.out(n) for n in lengths]
        x_BRH = x_BCF.transpose(1, 2)
        return x_BRH + self.up(F.gelu(self.down(x_BRH)))


class TrimmedWhisper(nn.Module):
    """Whisper on a batch that is as long as its longest clip, with a mask over what is padded."""

    def __init__(self, encoder: SpeechEncoder):
        super().__init__()
        self.model = encoder.model

    @torch.no_grad()
    def forward(self, features: Tensor, samples: tuple[int, ...]) -> Tensor:
        """As `SpeechEncoder`."""
        model, device = self.model, features.device
        features = features.to(model.dtype)
        own = torch.tensor([-(-n // (2 * RATE // 100)) for n in samples], device=device)[:, None]
        inside = torch.arange(features.shape[2], device=device) < 2 * own
        x_CEM = F.gelu(model.conv1(features * inside[:, None])) * inside[:, None]
        x_CFE = F.gelu(model.conv2(x_CEM)).transpose(1, 2)
        frames = x_CFE.shape[1]
        x_CFE = x_CFE + model.embed_positions.weight[:frames]
        heard = torch.arange(frames, device=device) < own
        mask = torch.zeros(heard.shape, dtype=x_CFE.dtype, device=device)
        mask = mask.masked_fill(~heard, torch.finfo(x_CFE.dtype).min)[:, None, None]
        for layer in model.layers:
            x_CFE = layer(x_CFE, mask)
        return model.layer_norm(x_CFE)


class PaddedWaveform(nn.Module):
    """Wav2Vec2 and its kin as transformers has them, with the same weights: every layer runs on the
    padded batch, with a mask over what is padded."""

    def __init__(self, encoder: SpeechEncoder):
        super().__init__()
        config = deepcopy(encoder.model.config)  # ours names our own attention
        with torch.device("meta"):
            self.model = AutoModel.from_config(config, attn_implementation="sdpa")
        self.model.load_state_dict(encoder.model.state_dict(), assign=True)
        self.model.requires_grad_(False)
        self.model.eval()

    @torch.no_grad()
    def forward(self, features: Tensor, samples: tuple[int, ...]) -> Tensor:
        """As `SpeechEncoder`."""
        device, dtype = features.device, self.model.dtype
        own = torch.tensor(samples, device=device)[:, None]
        mask = torch.arange(features.shape[1], device=device) < own
        states: Tensor = self.model(features.to(dtype), mask.long()).last_hidden_state
        return states


class Plain(System):
    """What the three plain systems share: padded speech, rows joined sample by sample in Python,
    and logits of all positions through the loss of transformers."""

    own_length, trims = False, True

    def __init__(self, model: SpeechLLM, rule: LengthRule, device: str):
        super().__init__(model, rule, device)
        self.encoder: nn.Module = model.encoder
        if self.trims and model.encoder.kind == "whisper":
            self.encoder = TrimmedWhisper(model.encoder)
        elif model.encoder.kind in WAVEFORM:
            self.encoder = PaddedWaveform(model.encoder)
        assert isinstance(model.adapter, ConvAdapter)
        self.adapter = PaddedAdapter(model.adapter)
        model.adapter = self.adapter  # the other one's weights go
        self.norm = model.embeddings

    @property
    def trained(self) -> list[nn.Parameter]:
        return [*self.adapter.parameters(), self.norm.weight, self.norm.bias]

    def batches(self, utterances: list[Utterance], knob: int) -> list[list[Utterance]]:
        return [utterances[i : i + knob] for i in range(0, len(utterances), knob)]

    def features(self, utterance: Utterance) -> np.ndarray:
        return utterance.heard()

    def loss(self, batch: list[Utterance], labels: int) -> Tensor:
        device, table = self.device, self.model.embeddings.table
        features = [torch.from_numpy(np.moveaxis(self.features(u), -1, 0)) for u in batch]
        padded = pad_sequence(features, batch_first=True).to(device)
        padded = padded if padded.dim() == 2 else padded.transpose(1, 2)
        x_BFC = self.encoder(padded, tuple(u.samples for u in batch))
        frames = [int(self.rule.frames(u.samples)) for u in batch]
        x_BFC = x_BFC[:, : max(frames)]
        slots_BRH = self.adapter(x_BFC.to(table.dtype), frames)
        slots_BRH = F.layer_norm(
            slots_BRH, slots_BRH.shape[2:], self.norm.weight, self.norm.bias, self.norm.eps
        )
        rows, targets = [], []
        for u, slots_RH in zip(batch, slots_BRH, strict=True):
            heard = slots_RH[: int(self.rule.slots(u.samples))]
            before, behind = (
                F.embedding(torch.tensor(ids, device=device), table)
                for ids in (u.before, (*u.behind, *u.answer))
            )
            rows.append(torch.cat([before, heard, behind]))
            unsaid = torch.full((len(rows[-1]) - len(u.answer),), -100, device=device)
            targets.append(torch.cat([unsaid, torch.tensor(u.answer, device=device)]))
        inputs_1TH, targets_1T, lengths = self.join(rows, targets)
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        extras = set_packed(self.model.decoder, Packing.of(lengths, device))
        made = self.model.decoder(
            inputs_embeds=inputs_1TH,
            position_ids=positions[None],
            labels=targets_1T,
            num_items_in_batch=labels,
            use_cache=False,
            **extras,
        )
        return made.loss

    def join(
        self, rows: list[Tensor], targets: list[Tensor]
    ) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """[1, T, H], [1, T] and lengths of the documents: all as long as the longest."""
        inputs_BTH = pad_sequence(rows, batch_first=True)
        targets_BT = pad_sequence(targets, batch_first=True, padding_value=-100)
        lengths = (inputs_BTH.shape[1],) * len(rows)
        return inputs_BTH.flatten(0, 1)[None], targets_BT.flatten()[None], lengths

    def rows(self, batch: list[Utterance]) -> Rows:
        frames = [self.frames(u) for u in batch]
        longest = max(int(self.rule.frames(u.samples)) for u in batch)
        documents = (max(map(self.positions, batch)),) * len(batch)
        count = len(batch)
        return Rows((max(frames),) * count, (longest,) * count, documents, sum(documents))

    def frames(self, utterance: Utterance) -> int:
        return int(self.rule.frames(utterance.samples))


class Padded30s(Plain):
    """BLSP's public code: as they come, each clip in a window of 30 s, batches padded to the
    longest."""

    trims = False

    def features(self, utterance: Utterance) -> np.ndarray:
        return utterance.features

    def frames(self, utterance: Utterance) -> int:
        per_sample = 1 if utterance.features.ndim == 1 else RATE // 100
        return int(self.rule.frames(utterance.features.shape[-1] * per_sample))


class Grouped(Plain):
    """A careful Hugging Face Trainer: grouped by length, and the input trimmed to the longest."""

    def batches(self, utterances: list[Utterance], knob: int) -> list[list[Utterance]]:
        ordered = sorted(utterances, key=lambda u: -u.samples)
        return super().batches(ordered, knob)


class Greedy(Plain):
    """As WEST does: as they come, into a pack until it is full; documents kept apart by their
    positions, input trimmed to the longest."""

    unit = "positions"

    def batches(self, utterances: list[Utterance], knob: int) -> list[list[Utterance]]:
        packs: list[list[Utterance]] = [[]]
        for u in utterances:
            if packs[-1] and sum(map(self.positions, [*packs[-1], u])) > knob:
                packs.append([])
            packs[-1].append(u)
        return packs

    def join(
        self, rows: list[Tensor], targets: list[Tensor]
    ) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        return torch.cat(rows)[None], torch.cat(targets)[None], tuple(map(len, rows))

    def rows(self, batch: list[Utterance]) -> Rows:
        padded, documents = super().rows(batch), tuple(map(self.positions, batch))
        return Rows(padded.encoder, padded.adapter, documents, sum(documents))


SYSTEMS: dict[str, type[System]] = {
    "hearken": Hearken,
    "padded_30s": Padded30s,
    "grouped": Grouped,
    "greedy": Greedy,
}
