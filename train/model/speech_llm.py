"""The speech LLM: encoder → adapter → slots placed among text tokens → decoder → loss.

Shapes: C clips, F encoder frames (padded), N = C * F, R slots, T packed LLM positions, H LLM
width, L labels, K losses. A `Batch` (data.collate) holds the layout; this code follows it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import copy
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from train import config as cfg
from train.ctc import EmbeddingCTC, language_ctc
from train.loss import Divergence, alignment
from train.model.attention import set_packed
from train.model.draws import drawn_for
from train.model.encoder import LayerSum, SpeechEncoder, StoredStates
from train.model.head import answer_losses, prepare_head
from train.model.hearing import hear
from train.model.kernels import Packing
from train.model.lora import lora_modules, without_updates
from train.ops import RowExchange, pack_embeddings
from train.ops.library import Impl

if TYPE_CHECKING:
    from data.collate import Batch, Layout

Gathered = Callable[[list[nn.Parameter]], AbstractContextManager[None]]
"""Makes partitioned parameters whole inside the context (on every rank; a collective)."""


Partition = Callable[[nn.Parameter], torch.Tensor]
"""This rank's flat part of a partitioned parameter."""


class SpeechEmbeddings(nn.Module):
    """LLM inputs of a packed batch: text embeddings, and slots through the last LayerNorm.

    The frozen text table stays whole on every rank, as the buffer `table`: under ZeRO-3 the
    decoder's own is partitioned, and gathering it (2 GB in BLOOMZ) for each micro-batch to read a
    few thousand rows would cost more than keeping it. With a `lookup` in its place (the exchange
    costs no memory but two small collectives a batch), `table` is empty.
    """

    table: torch.Tensor

    def __init__(
        self,
        decoder: PreTrainedModel,
        gathered: Gathered,
        impl: Impl = "auto",
        lookup: ExchangedTable | LiveTable | None = None,
    ):
        super().__init__()
        self.impl, self._lookup = impl, lookup
        embed = decoder.get_input_embeddings()
        with torch.no_grad(), gathered(list(embed.parameters())):
            # Through the module, not its weight: Gemma 3 and others scale inside it.
            ids = torch.arange(decoder.config.vocab_size, device=decoder.device)
            table = torch.cat([embed(part) for part in ids.split(4096)])
        hidden = table.shape[1]
        self.eps = 1e-5
        # Slots start at the scale of the text embeddings they will stand among.
        self.weight = nn.Parameter(table.float().std().cpu().repeat(hidden))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.register_buffer("table", table[:0] if lookup else table, persistent=False)

    def forward(self, speech_RH: torch.Tensor, source_T: torch.Tensor) -> torch.Tensor:
        table = self.table
        if self._lookup is not None:
            table, source_T = self._lookup(source_T)
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
        # The module without its weight, which is what the engine would gather.
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
        self._embed._parameters["weight"] = cast(nn.Parameter, rows_TH)
        # Through the module's own forward, as above, but past the hooks of the engine.
        table = type(self._embed).forward(self._embed, at)
        return table, torch.where(source_T >= 0, at, source_T)


class LiveTable:
    """The text rows of one batch, out of embeddings that are trained: gathered, with gradients."""

    def __init__(self, embed: nn.Embedding):
        self._embed = embed

    def __call__(self, source_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `ExchangedTable`."""
        at = torch.arange(len(source_T), device=source_T.device)
        return self._embed(source_T.clamp(min=0)), torch.where(source_T >= 0, at, source_T)


class SpeechLLM(nn.Module):
    """What stage 2 trains and evaluation runs: of it, what requires gradients is trained.

    Args:
        encoder: with `sharded_encoder` False it is hidden from the module tree, so that DeepSpeed
            neither partitions nor gathers it; its low-rank updates, if any, stay in the tree.
        layer_sum: of the encoder's layers, in front of the adapter; None hears the last one.
        seed: of the adapter's dropout.
        losses: what `forward` computes.
    """

    def __init__(
        self,
        encoder: SpeechEncoder | StoredStates,
        adapter: nn.Module,
        decoder: PreTrainedModel,
        embeddings: SpeechEmbeddings,
        *,
        layer_sum: LayerSum | None = None,
        sharded_encoder: bool = False,
        losses: cfg.Losses | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.losses, self.seed = losses or cfg.Losses(), seed
        decoder.eval()
        if sharded_encoder:
            self.encoder = encoder
        else:
            object.__setattr__(self, "encoder", encoder)
            if isinstance(encoder, SpeechEncoder) and encoder.lora:
                self.encoder_updates = lora_modules(encoder)
        self.layer_sum = layer_sum
        self.adapter = adapter
        self.decoder = decoder
        prepare_head(decoder)
        self.embeddings = embeddings
        if self.losses.ctc is not None:
            kernel = "plain" if self.losses.kernel == "plain" else "chunked"
            ctc = EmbeddingCTC(len(embeddings.weight), self.losses.ctc.scale, kernel)
            self.ctc = ctc.to(embeddings.table.dtype)

    def train(self, mode: bool = True) -> SpeechLLM:
        """The decoder stays in eval mode: its dropout must not wake up."""
        super().train(mode)
        self.decoder.eval()
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        """Name → parameter of everything that is trained: what a checkpoint holds."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def listen(
        self,
        features: torch.Tensor,
        samples: tuple[int, ...],
        frames: tuple[int, ...],
        languages: tuple[str, ...] = (),
        **wanted: Literal[True],
    ) -> Any:
        """Slots [R, H] of all clips: `hear` by the parts of this model."""
        return hear(
            self.encoder,
            self.layer_sum,
            self.adapter,
            self.embeddings.weight.dtype,
            features,
            samples,
            frames,
            languages,
            **wanted,
        )

    def forward(self, batch: Batch) -> torch.Tensor:
        """Sums of the losses that are on, float32 [K], in the order of `losses.weights`.

        Not means: the caller divides each by its own count over the whole step. A batch of
        weight 0 gives zeros, and gradients of zero.
        """
        on = self.losses
        heard = (batch.features, batch.samples, batch.frames, batch.languages)
        logits_RK = None
        with drawn_for(self.seed, batch.epoch, batch.step, batch.bin, device=batch.source.device):
            if on.language is None:
                speech_RH = self.listen(*heard)
            else:
                speech_RH, logits_RK = self.listen(*heard, with_languages=True)
        if speech_RH.shape[0] != sum(batch.slots):
            raise ValueError(
                f"the adapter made {speech_RH.shape[0]} slots, the batch's plan has "
                f"{sum(batch.slots)}; was it collated with another length rule?"
            )
        rows = self._rows(batch, speech_RH)
        sums = []
        if on.ce or on.kl:
            sums.append(self._answer(batch, rows))
        if on.ctc is not None:
            assert batch.transcripts is not None
            table = self.embeddings.table
            sums.append(self.ctc(rows["slots"], table, batch.slots, batch.transcripts)[None])
        if logits_RK is not None:
            assert batch.transcripts is not None
            sums.append(language_ctc(logits_RK, batch.slots, batch.transcripts)[None])
        if on.align is not None:
            assert batch.words is not None
            distance = alignment(
                rows["slots"],
                rows["words"],
                batch.words.slot_rows,
                batch.words.slot_starts,
                batch.words.token_starts,
                on.align.distance,
            )
            sums.append(distance[None])
        return torch.cat(sums) * batch.weight

    def _rows(self, batch: Batch, speech_RH: torch.Tensor) -> dict[str, torch.Tensor]:
        """Everything that is looked up or normalised for this batch, in one call.

        heard [T, H], the LLM's input; read, the teacher's; slots [R, H], all of them, whether
        placed in a document or not; words [E, H], the embeddings of the words' tokens.
        """
        on, wanted = self.losses, {}
        if on.ce or on.kl:
            wanted["heard"] = batch.source
        if on.kl is not None:
            if batch.read is None:
                raise ValueError("losses.kl needs what a teacher reads, but the batch has none")
            wanted["read"] = batch.read.source
        if on.ctc is not None or on.align is not None:
            # A second copy: no row is placed twice in one call.
            wanted["slots"] = -1 - torch.arange(len(speech_RH), device=speech_RH.device)
            if "heard" in wanted:
                wanted["slots"] -= len(speech_RH)
                speech_RH = torch.cat([speech_RH, speech_RH])
        if on.align is not None:
            assert batch.words is not None
            wanted["words"] = batch.words.token_ids
        # One call: a module that is called twice confuses those who gather its parameters.
        found = self.embeddings(speech_RH, torch.cat(list(wanted.values())))
        return dict(zip(wanted, found.split([len(w) for w in wanted.values()]), strict=True))

    def _answer(self, batch: Batch, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sums over the labels of `ce` and `kl`, those that are on."""
        kl, teacher_LH = self.losses.kl, None
        if kl is not None:
            assert batch.read is not None
            # Before the pass that is trained: hooks and attention are left as that one needs them.
            with torch.no_grad(), without_updates(self.decoder):
                teacher_LH = self._decode(rows["read"].detach(), batch.read)
        return answer_losses(
            self.decoder,
            self._decode(rows["heard"], batch),
            batch.label_ids,
            teacher_LH,
            ce=bool(self.losses.ce),
            kl=None if kl is None else Divergence(kl.temperature, kl.top_k),
            kernel=self.losses.kernel,
        )

    def _decode(self, inputs_TH: torch.Tensor, layout: Layout) -> torch.Tensor:
        """The decoder's last hidden states [L, H] where the labels are predicted."""
        extras = set_packed(self.decoder, Packing(layout.lengths, layout.cu_seqlens, layout.shared))
        hidden_TH = self.decoder.get_decoder()(
            inputs_embeds=inputs_TH[None],
            position_ids=layout.positions[None],
            use_cache=False,
            **extras,
        ).last_hidden_state[0]
        hidden_LH: torch.Tensor = hidden_TH[layout.label_rows]
        return hidden_LH
