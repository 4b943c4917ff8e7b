"""The speech LLM: encoder → adapter → slots placed among text tokens → decoder → loss.

Shapes: C clips, F encoder frames (padded), N = C * F, R slots, T packed LLM positions, H LLM
width, L labels, V vocabulary. A `Batch` (data.collate) holds the layout; this code follows it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from train.model.adapter import ConvAdapter
from train.model.attention import Packing, set_packed
from train.model.encoder import SpeechEncoder
from train.ops import RowExchange, Segments, pack_embeddings
from train.ops.library import Impl

if TYPE_CHECKING:
    from data.collate import Batch

Gathered = Callable[[list[nn.Parameter]], AbstractContextManager[None]]
"""Makes partitioned parameters whole inside the context (on every rank; a collective)."""


Partition = Callable[[nn.Parameter], torch.Tensor]
"""This rank's flat part of a partitioned parameter."""


class SpeechEmbeddings(nn.Module):
    """LLM inputs of a packed batch: text embeddings, and slots through the last LayerNorm.

    The frozen text table stays whole on every rank, as the buffer `table`: under ZeRO-3 the
    decoder's own is partitioned, and gathering it (2 GB in BLOOMZ) for each micro-batch to read a
    few thousand rows would cost more than keeping it. With `exchanged`, which costs no memory but
    two small collectives a batch, `table` is empty.
    """

    table: torch.Tensor

    def __init__(
        self,
        decoder: PreTrainedModel,
        gathered: Gathered,
        impl: Impl = "auto",
        exchanged: ExchangedTable | None = None,
    ):
        super().__init__()
        self.impl, self._exchanged = impl, exchanged
        embed = decoder.get_input_embeddings()
        with torch.no_grad(), gathered(list(embed.parameters())):
            # Through the module, not its weight: Gemma 3 and others scale inside it.
            ids = torch.arange(decoder.config.vocab_size, device=decoder.device)
            table = torch.cat([embed(part) for part in ids.split(4096)])
        hidden = table.shape[1]
        self.eps = 1e-5
        # Slots start at the scale of the text embeddings they will stand among.
        self.weight = nn.Parameter(torch.full((hidden,), table.float().std().item()))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.register_buffer("table", table[:0] if exchanged else table, persistent=False)

    def forward(self, speech_RH: torch.Tensor, source_T: torch.Tensor) -> torch.Tensor:
        table = self.table
        if self._exchanged is not None:
            table, source_T = self._exchanged(source_T)
        return pack_embeddings(
            table,
            speech_RH,
            source_T,
            self.weight,
            self.bias,
            self.eps,
            dtype=table.dtype,
            impl=self.impl,
        )


class ExchangedTable:
    """The text rows of one batch, out of a table that is partitioned over the ranks.

    Args:
        embed: the decoder's input embeddings, frozen.
        partition: see `Partition`; asked at the first batch, when the engine has put it in place.
        capacity: positions of the largest batch on any rank.
    """

    def __init__(self, embed: nn.Embedding, partition: Partition, capacity: int):
        # The module without its weight and without the hooks of the engine, which would gather.
        self._embed = copy(embed)
        self._embed._parameters = {"weight": None}
        self._embed.padding_idx = None  # matters to gradients alone, and may exceed a batch
        self._weight: nn.Parameter = embed.weight  # type: ignore[assignment]
        self._partition, self._capacity = partition, capacity
        self._rows: RowExchange | None = None

    @torch.no_grad()
    def __call__(self, source_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`source` of `pack_embeddings` -> a table [T, H] of this batch alone, and its source."""
        if self._rows is None:
            self._rows = RowExchange(self._partition(self._weight), self._embed.embedding_dim)
        rows_TH = self._rows(source_T, self._capacity)
        at = torch.arange(len(source_T), device=source_T.device)
        # Through the module, as above.
        table = functional_call(self._embed, {"weight": rows_TH}, (at,))
        return table, torch.where(source_T >= 0, at, source_T)


class SpeechLLM(nn.Module):
    """What stage 2 trains and evaluation runs. Only the adapter and its LayerNorm are trained.

    Args:
        encoder: frozen; with `sharded_encoder` False it is hidden from the module tree, so
            that DeepSpeed neither partitions nor gathers it.
    """

    def __init__(
        self,
        encoder: SpeechEncoder,
        adapter: ConvAdapter,
        decoder: PreTrainedModel,
        embeddings: SpeechEmbeddings,
        *,
        sharded_encoder: bool = False,
    ):
        super().__init__()
        decoder.requires_grad_(False)
        decoder.eval()
        if sharded_encoder:
            self.encoder = encoder
        else:
            object.__setattr__(self, "encoder", encoder)
        self.adapter = adapter
        self.decoder = decoder
        self.embeddings = embeddings

    def train(self, mode: bool = True) -> SpeechLLM:
        """The frozen decoder stays in eval mode: its dropout must not wake up."""
        super().train(mode)
        self.decoder.eval()
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        """Name → parameter of everything that is trained: what a checkpoint holds."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def listen(
        self, features: torch.Tensor, samples: tuple[int, ...], frames: tuple[int, ...]
    ) -> torch.Tensor:
        """Slots [R, H] of all clips, one after another, before the last LayerNorm.

        Args:
            features: the encoder's input of each clip, padded at the end (see `SpeechEncoder`).
            samples, frames: each clip's own length in samples and in encoder frames.
        """
        frames_CFE = self.encoder(features, samples)
        segments = Segments.padded(frames, frames_CFE.shape[1], frames_CFE.device)
        # A plain model may hold the adapter in float32 over a bf16 encoder.
        rows_NE = frames_CFE.flatten(0, 1).to(self.embeddings.weight.dtype)
        return self.adapter(rows_NE, segments)

    def embed(self, batch: Batch) -> torch.Tensor:
        """LLM inputs [T, H] of a packed batch."""
        speech_RH = self.listen(batch.features, batch.samples, batch.frames)
        if speech_RH.shape[0] != sum(batch.slots):
            raise ValueError(
                f"the adapter made {speech_RH.shape[0]} slots, the batch's plan has "
                f"{sum(batch.slots)}; was it collated with another length rule?"
            )
        return self.embeddings(speech_RH, batch.source)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Sum of the cross entropies of the batch's labels (float32 scalar), times its weight.

        Not a mean: the caller divides by the global count of labels of the step.
        """
        inputs_TH = self.embed(batch)
        extras = set_packed(self.decoder, Packing(batch.lengths))
        hidden_TH = self.decoder.get_decoder()(
            inputs_embeds=inputs_TH[None],
            position_ids=batch.positions[None],
            use_cache=False,
            **extras,
        ).last_hidden_state[0]
        logits_LV = self.decoder.get_output_embeddings()(hidden_TH[batch.label_rows])
        loss = nn.functional.cross_entropy(logits_LV.float(), batch.label_ids, reduction="sum")
        return loss * batch.weight
