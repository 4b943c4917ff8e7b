"""One layout per bin: what stands at every LLM position, planned once, on the CPU.

T packed LLM positions, D documents, C clips, L labels. Device code follows the layout and never
looks at single samples.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from data.prompts import Document, Speech, Text


@dataclass(frozen=True)
class Skip:
    """A sample that was not trained, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Clip:
    """A document's audio, ready for the encoder.

    `features` float32 [..., length]: the waveform [S] or log-mel [mel, frames]; `samples` at
    16 kHz, and what the length rule makes of them: valid encoder `frames`, adapter `slots`.
    """

    features: np.ndarray
    samples: int
    frames: int
    slots: int


@dataclass(frozen=True)
class Word:
    """A word of a transcript, where it is spoken: `count` slots from `start`, and its tokens."""

    start: int
    count: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """What one utterance trains.

    key         of the shard's sample
    document    what the LLM gets and learns to say, some of it heard as slots of `clip`
    clip        its audio, encoded whether the document uses its slots or not
    read        the same document with the transcript in place of all speech: a teacher's input
    transcript  tokens of the transcript
    words       the transcript's words, where they were aligned
    """

    key: str
    document: Document
    clip: Clip
    read: Document | None = None
    transcript: tuple[int, ...] = ()
    words: tuple[Word, ...] = ()


@dataclass
class Layout:
    """Documents packed one after another.

    source      int64 [T]: a token id >= 0, or -(r + 1) for row r of all clips' slots in a row
    positions   int64 [T]: counted from 0 in each document
    cu_seqlens  int32 [D + 1]: where the documents begin, and T
    lengths     [D] positions of each document, on the host
    label_rows  int64 [L]: the position whose OUTPUT predicts the label, the one before it
    label_ids   int64 [L]
    """

    source: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]
    max_seqlen: int
    label_rows: torch.Tensor
    label_ids: torch.Tensor

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same layout with `change` done to all of its tensors."""

        def changed(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return change(value)
            return value.map(change) if isinstance(value, Layout) else value

        made = {f.name: changed(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return type(self)(**made)


@dataclass
class Batch(Layout):
    """A packed micro-batch: a layout, and the audio that it places.

    features    float32 [C, ..., longest]: encoder inputs, zeros at the END of the last axis
    samples     [C] waveform samples at 16 kHz, on the host, like the next two
    frames      [C] valid encoder frames
    slots       [C] adapter slots
    weight      1.0, or 0.0 for the dummy of an empty bin
    keys        [D] sample keys; none for a dummy
    skipped     content faults found while reading this bin
    """

    features: torch.Tensor
    samples: tuple[int, ...]
    frames: tuple[int, ...]
    slots: tuple[int, ...]
    weight: float = 1.0
    keys: tuple[str, ...] = ()
    epoch: int = -1
    step: int = -1
    bin: int = -1
    skipped: tuple[Skip, ...] = ()

    @property
    def num_labels(self) -> int:
        """Labels that count for the loss; 0 for a dummy."""
        return len(self.label_ids) if self.weight else 0

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """The same batch with its tensors on `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; torch's DataLoader calls this."""
        return self.map(lambda tensor: tensor.pin_memory())


def collate(
    samples: Sequence[Sample],
    *,
    epoch: int = -1,
    step: int = -1,
    bin: int = -1,
    skipped: Sequence[Skip] = (),
) -> Batch:
    """Pack samples, one document and one clip each.

    Raises `ValueError`, naming the key, on slots that the clip does not have, and on a label at
    a document's first position, which no output predicts.
    """
    clips = [sample.clip for sample in samples]
    return Batch(
        **vars(lay_out([sample.document for sample in samples], samples)),
        features=_pad_features([clip.features for clip in clips]),
        samples=tuple(clip.samples for clip in clips),
        frames=tuple(clip.frames for clip in clips),
        slots=tuple(clip.slots for clip in clips),
        keys=tuple(sample.key for sample in samples),
        epoch=epoch,
        step=step,
        bin=bin,
        skipped=tuple(skipped),
    )


def lay_out(documents: Sequence[Document], samples: Sequence[Sample]) -> Layout:
    """Pack one document of each sample; raises as `collate` does."""
    first_rows = np.cumsum([0, *(sample.clip.slots for sample in samples)])
    sources: list[np.ndarray] = []
    labelled: list[np.ndarray] = []
    lengths: list[int] = []
    for document, sample, row in zip(documents, samples, first_rows[:-1], strict=True):
        parts = [_source(part, sample, int(row)) for part in document]
        marks = [np.full(len(p), _is_label(q)) for p, q in zip(parts, document, strict=True)]
        sources += parts
        labelled += marks
        lengths.append(sum(map(len, parts)))
        if np.concatenate([np.empty(0, bool), *marks])[:1].any():
            raise ValueError(
                f"{sample.key}: the document begins with a label; put a prompt before it"
            )
    source = np.concatenate([np.empty(0, np.int64), *sources])
    cu_seqlens = np.cumsum([0, *lengths])
    label_at = np.flatnonzero(np.concatenate([np.empty(0, bool), *labelled]))
    return Layout(
        source=torch.from_numpy(source),
        positions=torch.from_numpy(np.arange(len(source)) - np.repeat(cu_seqlens[:-1], lengths)),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        lengths=tuple(lengths),
        max_seqlen=max(lengths, default=0),
        label_rows=torch.from_numpy(label_at - 1),
        label_ids=torch.from_numpy(source[label_at]),
    )


def dummy_batch(
    clip: Clip, *, epoch: int = -1, step: int = -1, bin: int = -1, skipped: Sequence[Skip] = ()
) -> Batch:
    """A batch of weight 0 that runs every module once: `clip` in one document with one label.

    Empty bins become this, since under ZeRO-3 every rank must run every module equally often.
    """
    document: Document = (Speech(0, clip.slots), Text((0,)), Text((0,), labelled=True))
    where = {"epoch": epoch, "step": step, "bin": bin}
    batch = collate([Sample("dummy", document, clip)], skipped=skipped, **where)
    return dataclasses.replace(batch, weight=0.0, keys=())


def _source(part: Text | Speech, sample: Sample, first_row: int) -> np.ndarray:
    """int64 source entries of one part of a document."""
    if isinstance(part, Text):
        return np.asarray(part.ids, dtype=np.int64)
    if part.start < 0 or part.count < 0 or part.start + part.count > sample.clip.slots:
        raise ValueError(
            f"{sample.key}: slots {part.start} to {part.start + part.count} are asked for, but its "
            f"clip has {sample.clip.slots}"
        )
    return -1 - np.arange(first_row + part.start, first_row + part.start + part.count)


def _is_label(part: Text | Speech) -> bool:
    return isinstance(part, Text) and part.labelled


def _pad_features(features: Sequence[np.ndarray]) -> torch.Tensor:
    """[..., length] arrays as one float32 [C, ..., longest], zeros at the end."""
    if not features:
        return torch.zeros(0, 0)
    longest = max(feature.shape[-1] for feature in features)
    # By NumPy: torch would copy with all its threads, which costs more than it gains, and much
    # more where the cores are busy.
    padded = np.zeros((len(features), *features[0].shape[:-1], longest), dtype=np.float32)
    for row, feature in zip(padded, features, strict=True):
        row[..., : feature.shape[-1]] = feature
    return torch.from_numpy(padded)
