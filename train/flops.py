"""Floating point operations of a step: one count for `--dry-run`, for MFU and for the benchmarks.

Counted are products with weights and attention's two, a multiplication and an addition being two
operations; what is recomputed, normalised or looked up is not. Of each weight of n numbers, per row
that goes through it:

    forward                                                     2 n
    backward, where a gradient goes on to what was put in       2 n
    backward, where the weight is trained                       2 n

So a frozen LLM in front of which something is trained costs 4 n a position, not 6 n, a frozen
encoder 2 n a frame, and the adapter's first layer, behind a frozen encoder, 4 n. A pair of
positions that see each other costs attention 4 operations per channel forward, and twice that
backward; causal attention has half the pairs. The head costs at the positions whose logits are
wanted alone. Experts of a mixture are all counted, whether they are chosen or not.

MFU is the count of `useful` rows over seconds and the peak rate of the devices. Layers that are run
again (`model.decoder.checkpointing`) cost 2 n more a position, which `Flops.again` counts and MFU
leaves out: it falls by what recomputation costs, to about two thirds with a frozen LLM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from train.model.adapters import conv, ebranchformer, stack_mlp
from train.model.encoder import WAVEFORM, SpeechEncoder
from train.model.lengths import Conv
from train.model.windows import starts

if TYPE_CHECKING:
    from data.collate import Batch


@dataclass(frozen=True)
class Work:
    """Operations, forward and backward."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.forward + other.forward, self.backward + other.backward)

    def times(self, rows: float) -> Work:
        return Work(self.forward * rows, self.backward * rows)

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Rows:
    """What a micro-batch puts through each part, padding included where it is run.

    encoder     frames of each clip that the encoder runs
    adapter     frames of each clip that the adapter is given
    documents   LLM positions of each document
    head        positions whose logits are computed
    read        positions of each document that a teacher reads
    shared      positions of `documents` that are rows of others, run there; of `read`
    """

    encoder: tuple[int, ...]
    adapter: tuple[int, ...]
    documents: tuple[int, ...]
    head: int
    read: tuple[int, ...] = ()
    shared: tuple[int, int] = (0, 0)


class Flops:
    """Operations of one model's parts, from the modules' shapes (which may be on `meta`).

    Args:
        encoder, adapter, decoder: as `train.blueprint` makes them, or real ones that are whole.
    """

    def __init__(self, encoder: SpeechEncoder, adapter: nn.Module, decoder: PreTrainedModel):
        config = decoder.config.get_text_config()
        self._through_encoder = encoder.lora
        self._encoder = _encoder_frame(encoder)
        self._encoder_pair = _pair(encoder.width * (encoder.num_layers - 1), encoder.lora)
        self._adapter = adapter
        self.stored = False
        """Whether batches bring the encoder's states, and it does not run."""
        self._window = encoder.window
        self._whole_windows = encoder.kind == "whisper" and not encoder.own_length
        head = decoder.get_output_embeddings()
        table = decoder.get_input_embeddings()
        self._position = sum_work(
            _weight(p, True) for p in _weights(decoder, without=(head, table))
        )
        self._head = _weight(head.weight, True)
        self._decoder_width = _attention_width(config)
        self._windows = _windows(config)

    def of(self, rows: Rows) -> dict[str, Work]:
        """Operations by part: `encoder`, `adapter`, `decoder`, `head`."""
        encoder = self._encoder.times(sum(rows.encoder))
        encoder += self._encoder_pair.times(sum(n * n for n in rows.encoder))
        decoder = self._trained_on(rows)
        read = self._position.times(sum(rows.read) - rows.shared[1]).forward
        read += _pair(self._decoder_width, False).times(self._pairs(rows.read)).forward
        heads = self._head.times(rows.head)
        if rows.read:
            heads += Work(heads.forward)
        adapter = sum_work(
            _adapter_clip(self._adapter, n, self._through_encoder) for n in rows.adapter
        )
        return {
            "encoder": encoder,
            "adapter": adapter,
            "decoder": decoder + Work(read),
            "head": heads,
        }

    def again(self, rows: Rows) -> Work:
        """What `model.decoder.checkpointing` adds to the backward pass: the forward of what the
        layers are trained on. At most: where they are not partitioned, torch leaves out what is
        behind the last tensor that the backward asks for, in most families a layer's last product.
        """
        return Work(backward=self._trained_on(rows).forward)

    def _trained_on(self, rows: Rows) -> Work:
        """The decoder without its head, on `rows.documents`."""
        work = self._position.times(sum(rows.documents) - rows.shared[0])
        return work + _pair(self._decoder_width, True).times(self._pairs(rows.documents))

    def useful(self, batch: Batch) -> Rows:
        """The rows of a batch that do not pad: a clip's own frames, or the window that a Whisper
        in its faithful mode has to hear."""
        if not batch.weight:
            return Rows((), (), (), 0)
        frames = () if batch.silent else batch.frames
        heard = () if self.stored else tuple(n for count in frames for n in self._heard(count))
        read = batch.read
        shared = (batch.num_shared, 0 if read is None else read.num_shared)
        documents = () if read is None else read.lengths
        return Rows(heard, frames, batch.lengths, batch.num_labels, documents, shared)

    def _heard(self, count: int) -> tuple[int, ...]:
        """Frames of each of a clip's windows."""
        window = self._window
        if window is None:
            return (count,)
        begins = starts(count, window)
        return tuple(window if self._whole_windows else min(window, count - b) for b in begins)

    def _pairs(self, lengths: tuple[int, ...]) -> float:
        """Mean over the layers of the pairs of positions that see each other."""
        return sum(
            share * sum(_causal_pairs(n, window) for n in lengths)
            for window, share in self._windows.items()
        )


def sum_work(parts: Iterable[Work]) -> Work:
    return sum(parts, Work())


def _weight(p: nn.Parameter, through: bool) -> Work:
    """One row through one weight; `through`: the gradient goes on to what was put in."""
    return Work(2 * p.numel(), 2 * p.numel() * (through + p.requires_grad))


def _weights(module: nn.Module, without: tuple[nn.Module | None, ...] = ()) -> list[nn.Parameter]:
    """Everything that rows are multiplied with: parameters of two axes or more, without tables."""
    return [
        p
        for part in module.modules()
        if part not in without and not isinstance(part, nn.Embedding)
        for p in part.parameters(recurse=False)
        if p.dim() >= 2
    ]


def _pair(width: int, through: bool) -> Work:
    """One pair of positions in all layers: scores and weighted values, `width` channels in all."""
    return Work(4 * width, 8 * width * through)


def _encoder_frame(encoder: SpeechEncoder) -> Work:
    """One frame through the encoder's weights. Convolutions in front run at higher rates, and no
    gradient goes back beyond the layers."""
    model: Any = encoder.model
    front: list[tuple[Any, int]] = []
    if encoder.kind == "whisper":
        front = [(model.conv1, 2), (model.conv2, 1)]
    elif encoder.kind in WAVEFORM:
        convs = [layer.conv for layer in model.feature_extractor.conv_layers]
        strides = [conv.stride[0] for conv in convs]
        front = [(conv, math.prod(strides[i + 1 :])) for i, conv in enumerate(convs)]
    layers = model.layers if encoder.kind == "whisper" else model.encoder.layers
    once = _weights(model, (*(conv for conv, _ in front), *layers.modules()))
    return sum_work(
        [
            *(_weight(conv.weight, False).times(rate) for conv, rate in front),
            *(_weight(p, False) for p in once),
            *(_weight(p, encoder.lora) for p in _weights(layers)),
        ]
    )


def _attention_width(config: PretrainedConfig) -> int:
    """Channels of all heads of all layers."""
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return int(width * config.num_hidden_layers)


def _windows(config: Any) -> dict[int | None, float]:
    """Positions that a query sees, its own among them -> share of the layers."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return {None: 1.0}
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    share = kinds.count("sliding_attention") / len(kinds)
    return {window: share, None: 1 - share}


def _causal_pairs(length: int, window: int | None) -> float:
    seen = min(length, window or length)
    return seen * (seen + 1) / 2 + (length - seen) * seen


def _adapter_clip(adapter: nn.Module, frames: int, through: bool) -> Work:
    """One clip through the adapter; `through`: the encoder is trained, too."""
    for kind, clip in _ADAPTERS.items():
        if isinstance(adapter, kind):
            return clip(adapter, frames, through)
    raise TypeError(f"the operations of a {type(adapter).__name__} are not known")


def _conv_clip(adapter: Any, frames: int, through: bool) -> Work:
    work, length = Work(), frames
    for i, layer in enumerate(adapter.convs):
        length = layer.geometry.out(length)
        work += _weight(layer.weight, through or i > 0).times(length)
    ends = (adapter.down.weight, adapter.up.weight)
    return work + sum_work(_weight(p, True) for p in ends).times(length)


def _stack_mlp_clip(adapter: Any, frames: int, through: bool) -> Work:
    slots = Conv(adapter.frames, adapter.frames).out(frames)
    return (_weight(adapter.up.weight, through) + _weight(adapter.out.weight, True)).times(slots)


def _ebranchformer_clip(adapter: Any, frames: int, through: bool) -> Work:
    bands, length = adapter.project.out_features, frames
    work = _weight(adapter.project.weight, through).times(length)
    for layer, shape in zip(adapter.front, ebranchformer.FRONT, strict=True):
        bands, length = shape.out(bands), shape.out(length)
        work += _weight(layer.weight, True).times(bands * length)
    blocks = _weights(adapter.blocks)
    work += sum_work(_weight(p, True) for p in (adapter.embed.weight, *blocks)).times(length)
    # Scores by content, scores by distance (twice as many as positions), weighted values.
    width = 2 * adapter.embed.out_features * len(adapter.blocks)
    work += _pair(width, True).times(length * length)
    ends = [adapter.back.weight, adapter.out.weight]
    if adapter.language is not None:
        ends += _weights(adapter.language)
    return work + sum_work(_weight(p, True) for p in ends).times(ebranchformer.BACK.out(length))


_ADAPTERS: dict[type[nn.Module], Callable[[Any, int, bool], Work]] = {
    conv.ConvAdapter: _conv_clip,
    stack_mlp.StackMLP: _stack_mlp_clip,
    ebranchformer.EBranchformer: _ebranchformer_clip,
}
