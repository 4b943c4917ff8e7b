"""One layout per bin: what stands at every LLM position, planned once, on the CPU.

T packed LLM positions, D documents, C clips, L labels. Device code follows the layout and never
looks at single samples.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


@dataclass
class Batch:
    """A packed micro-batch.

    features    float32 [C, ..., longest]: encoder inputs, zeros at the END of the last axis
    samples     [C] waveform samples at 16 kHz, on the host, like the next two
    frames      [C] valid encoder frames
    slots       [C] adapter slots
    source      int64 [T]: a token id >= 0, or -(r + 1) for row r of all clips' slots in a row
    positions   int64 [T]: counted from 0 in each document
    cu_seqlens  int32 [D + 1]: where the documents begin, and T
    lengths     [D] positions of each document, on the host
    label_rows  int64 [L]: the position whose OUTPUT predicts the label, the one before it
    label_ids   int64 [L]
    weight      1.0, or 0.0 for the dummy of an empty bin
    keys        [D] sample keys; none for a dummy
    skipped     content faults found while reading this bin
    """

    features: torch.Tensor
    samples: tuple[int, ...]
    frames: tuple[int, ...]
    slots: tuple[int, ...]
    source: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]
    max_seqlen: int
    label_rows: torch.Tensor
    label_ids: torch.Tensor
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
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; torch's DataLoader calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        changed = dataclasses.replace(self)
        for name, value in vars(changed).items():
            if isinstance(value, torch.Tensor):
                setattr(changed, name, change(value))
        return changed


def collate(
    documents: Sequence[Document],
    clips: Sequence[Clip],
    *,
    keys: Sequence[str],
    epoch: int = -1,
    step: int = -1,
    bin: int = -1,
    skipped: Sequence[Skip] = (),
) -> Batch:
    """Pack documents, each with its own clip, whether it uses the clip's slots or not.

    Raises `ValueError`, naming the key, on slots that the clip does not have, and on a label at
    a document's first position, which no output predicts.
    """
    if not len(documents) == len(clips) == len(keys):
        raise ValueError(
            f"documents, clips and keys must be as many, but are {len(documents)}, {len(clips)} "
            f"and {len(keys)}"
        )
    first_rows = np.cumsum([0, *(clip.slots for clip in clips)])
    sources: list[np.ndarray] = []
    labelled: list[np.ndarray] = []
    lengths: list[int] = []
    for document, clip, row, key in zip(documents, clips, first_rows[:-1], keys, strict=True):
        parts = [_source(part, clip, int(row), key) for part in document]
        marks = [np.full(len(p), _is_label(q)) for p, q in zip(parts, document, strict=True)]
        sources += parts
        labelled += marks
        lengths.append(sum(map(len, parts)))
        if np.concatenate([np.empty(0, bool), *marks])[:1].any():
            raise ValueError(f"{key}: the document begins with a label; put a prompt before it")
    source = np.concatenate([np.empty(0, np.int64), *sources])
    cu_seqlens = np.cumsum([0, *lengths])
    label_at = np.flatnonzero(np.concatenate([np.empty(0, bool), *labelled]))
    return Batch(
        features=_pad_features([clip.features for clip in clips]),
        samples=tuple(clip.samples for clip in clips),
        frames=tuple(clip.frames for clip in clips),
        slots=tuple(clip.slots for clip in clips),
        source=torch.from_numpy(source),
        positions=torch.from_numpy(np.arange(len(source)) - np.repeat(cu_seqlens[:-1], lengths)),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        lengths=tuple(lengths),
        max_seqlen=max(lengths, default=0),
        label_rows=torch.from_numpy(label_at - 1),
        label_ids=torch.from_numpy(source[label_at]),
        keys=tuple(keys),
        epoch=epoch,
        step=step,
        bin=bin,
        skipped=tuple(skipped),
    )


def dummy_batch(
    clip: Clip, *, epoch: int = -1, step: int = -1, bin: int = -1, skipped: Sequence[Skip] = ()
) -> Batch:
    """A batch of weight 0 that runs every module once: `clip` in one document with one label.

    Empty bins become this, since under ZeRO-3 every rank must run every module equally often.
    """
    document: Document = (Speech(0, clip.slots), Text((0,)), Text((0,), labelled=True))
    where = {"epoch": epoch, "step": step, "bin": bin}
    batch = collate([document], [clip], keys=["dummy"], skipped=skipped, **where)
    return dataclasses.replace(batch, weight=0.0, keys=())


def _source(part: Text | Speech, clip: Clip, first_row: int, key: str) -> np.ndarray:
    """int64 source entries of one part of a document."""
    if isinstance(part, Text):
        return np.asarray(part.ids, dtype=np.int64)
    if part.start < 0 or part.count < 0 or part.start + part.count > clip.slots:
        raise ValueError(
            f"{key}: slots {part.start} to {part.start + part.count} are asked for, but its clip "
            f"has {clip.slots}"
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
