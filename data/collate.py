"""One layout per bin: what stands at every LLM position, planned once, on the CPU.

S positions of D documents in T rows, C clips, L labels. Device code follows the layout and never
looks at single samples.
"""

import dataclasses
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from data.audio import SAMPLE_RATE
from data.prompts import Document, Speech, Text
from data.sharing import Shared, share_prompts
from data.tensors import Tensors


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
    `language` as the corpus names it; empty for silence, which has none. `label` is its class,
    where languages are told apart; -1 for none.
    """

    features: np.ndarray
    samples: int
    frames: int
    slots: int
    language: str = ""
    label: int = -1


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
    clip        its audio, encoded whether the document uses its slots or not; None for a document
                of text alone
    read        the same document with the transcript in place of all speech: a teacher's input
    transcript  tokens of the transcript
    words       the transcript's words, where they were aligned
    """

    key: str
    document: Document
    clip: Clip | None = None
    read: Document | None = None
    transcript: tuple[int, ...] = ()
    words: tuple[Word, ...] = ()

    @property
    def slots(self) -> int:
        """Adapter slots of its clip, 0 without one."""
        return self.clip.slots if self.clip else 0


@dataclass
class Layout(Tensors):
    """Documents packed one after another; T = S unless they share rows.

    source      int64 [T]: a token id >= 0, or -(r + 1) for row r of all clips' slots in a row
    positions   int64 [T]: counted from 0 in each document
    cu_seqlens  int32 [D + 1]: where the documents begin, and S
    lengths     [D] positions of each document, on the host
    label_rows  int64 [L]: the row in T whose OUTPUT predicts the label, the position before it
    label_ids   int64 [L]
    shared      which rows several documents begin with; None where each has rows of its own
    """

    source: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]
    max_seqlen: int
    label_rows: torch.Tensor
    label_ids: torch.Tensor
    shared: Shared | None

    @property
    def num_shared(self) -> int:
        """Positions that have no row of their own, S - T."""
        return sum(self.lengths) - len(self.source)


@dataclass
class Transcripts(Tensors):
    """What the clips' slots spell, for a CTC loss whose alphabet is each transcript's own; and
    their language, for one that says it again for each token (BLOOMZMMS, 2404.10922).

    A distinct tokens in the richest transcript, U tokens in all that are trained.

    ids           int64 [C, A]: the distinct tokens of each, zeros behind them
    unused        bool [C, A]: those zeros
    targets       int64 [U]: one transcript after another, column of `ids` + 1 of each token
    lengths       [C] tokens of each, on the host; 0 where there is nothing to train
    trained       bool [C]: whether there is
    clip_of_slot  int64 [R]
    too_long      transcripts that do not fit their clip's slots, and so are not trained
    languages     int64: class + 1 of each clip's language, `repeats` times
    repeats       [C] on the host: as many as the transcript's tokens, but no more than fit with
                  the blanks that CTC needs between them; 0 where there is no class or no token
    told          bool [C]: whether there are any
    """

    ids: torch.Tensor
    unused: torch.Tensor
    targets: torch.Tensor
    lengths: tuple[int, ...]
    trained: torch.Tensor
    clip_of_slot: torch.Tensor
    too_long: int
    languages: torch.Tensor
    repeats: tuple[int, ...]
    told: torch.Tensor


@dataclass
class Spoken(Tensors):
    """Words where they are heard and as they are written; E tokens of W words.

    slot_rows     int64: rows of the words' slots among all clips' slots, word after word
    slot_starts   int64 [W]: where each word begins there
    token_ids     int64 [E], word after word
    token_starts  int64 [W]
    """

    slot_rows: torch.Tensor
    slot_starts: torch.Tensor
    token_ids: torch.Tensor
    token_starts: torch.Tensor


@dataclass
class Batch(Layout):
    """A packed micro-batch: a layout, and the audio that it places.

    features    float32 [C, ..., longest]: encoder inputs, zeros at the END of the last axis
    samples     [C] waveform samples at 16 kHz, on the host, like the next two
    frames      [C] valid encoder frames
    slots       [C] adapter slots
    languages   [C]
    silent      whether the only clip is silence, in place of none
    weight      1.0, or 0.0 for the dummy of an empty bin
    keys        [D] sample keys; none for a dummy
    skipped     content faults found while reading this bin
    read        the same labels where the transcripts are read instead of heard, for a teacher
    transcripts, words  of all clips
    """

    features: torch.Tensor
    samples: tuple[int, ...]
    frames: tuple[int, ...]
    slots: tuple[int, ...]
    languages: tuple[str, ...] = ()
    silent: bool = False
    weight: float = 1.0
    keys: tuple[str, ...] = ()
    epoch: int = -1
    step: int = -1
    bin: int = -1
    skipped: tuple[Skip, ...] = ()
    read: Layout | None = None
    transcripts: Transcripts | None = None
    words: Spoken | None = None

    @property
    def num_labels(self) -> int:
        """Labels that count for the loss; 0 for a dummy."""
        return len(self.label_ids) if self.weight else 0

    @property
    def seconds(self) -> float:
        """Of speech; 0 where the only clip is silence in place of none."""
        return 0.0 if self.silent else sum(self.samples) / SAMPLE_RATE

    @property
    def num_transcript_tokens(self) -> int:
        """Tokens that count for a CTC loss; 0 for a dummy."""
        return sum(self.transcripts.lengths) if self.transcripts and self.weight else 0

    @property
    def num_language_labels(self) -> int:
        """Labels that count for a CTC loss of languages; 0 for a dummy."""
        return sum(self.transcripts.repeats) if self.transcripts and self.weight else 0

    @property
    def num_words(self) -> int:
        """Words that have slots and tokens; 0 for a dummy."""
        return len(self.words.slot_starts) if self.words and self.weight else 0

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """The same batch with its tensors on `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; torch's DataLoader calls this."""
        return self.map(lambda tensor: tensor.pin_memory())


def collate(
    samples: Sequence[Sample],
    *,
    silence: Clip | None = None,
    share: bool = False,
    epoch: int = -1,
    step: int = -1,
    bin: int = -1,
    skipped: Sequence[Skip] = (),
) -> Batch:
    """Pack samples, one document each, and their clips.

    With `share`, a prompt that several documents begin with is there once (see `data.sharing`).

    Where none of them has a clip, encoder and adapter run on `silence`, which no document hears:
    under ZeRO-3 every rank must run every module equally often.

    Raises `ValueError`, naming the key, on slots that the clip does not have, on a label at a
    document's first position, which no output predicts, and where what is read does not have the
    labels of what is heard.
    """
    heard = lay_out([sample.document for sample in samples], samples, share)
    spoken = [sample for sample in samples if sample.clip]
    silent = not spoken and silence is not None
    if silent:
        spoken = [Sample("silence", (), silence)]
    clips = [sample.clip for sample in spoken if sample.clip]
    return Batch(
        **vars(heard),
        features=pad_features([clip.features for clip in clips]),
        samples=tuple(clip.samples for clip in clips),
        frames=tuple(clip.frames for clip in clips),
        slots=tuple(clip.slots for clip in clips),
        languages=tuple(clip.language for clip in clips),
        silent=silent,
        keys=tuple(sample.key for sample in samples),
        epoch=epoch,
        step=step,
        bin=bin,
        skipped=tuple(skipped),
        read=_lay_out_read(heard, samples, share),
        transcripts=_spell(spoken),
        words=_place_words(spoken),
    )


def lay_out(
    documents: Sequence[Document], samples: Sequence[Sample], share: bool = False
) -> Layout:
    """Pack one document of each sample; raises as `collate` does."""
    first_rows = np.cumsum([0, *(sample.slots for sample in samples)])
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
    positions = np.arange(len(source)) - np.repeat(cu_seqlens[:-1], lengths)
    label_at = np.flatnonzero(np.concatenate([np.empty(0, bool), *labelled]))
    label_rows, label_ids = label_at - 1, source[label_at]
    shared = share_prompts(documents, cu_seqlens) if share else None
    if shared is not None:
        first = shared.first.numpy()
        source, positions = source[first], positions[first]
        label_rows = shared.rows.numpy()[label_rows]
    return Layout(
        source=torch.from_numpy(source),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        lengths=tuple(lengths),
        max_seqlen=max(lengths, default=0),
        label_rows=torch.from_numpy(label_rows),
        label_ids=torch.from_numpy(label_ids),
        shared=shared,
    )


def dummy_batch(
    clip: Clip, *, epoch: int = -1, step: int = -1, bin: int = -1, skipped: Sequence[Skip] = ()
) -> Batch:
    """A batch of weight 0 that runs every module once: `clip` in one document with one label.

    Empty bins become this, since under ZeRO-3 every rank must run every module equally often.
    """
    answer = (Text((0,)), Text((0,), labelled=True))
    sample = Sample(
        "dummy",
        (Speech(0, clip.slots), *answer),
        clip,
        read=answer,
        transcript=(0,),
        words=(Word(0, 1, (0,)),),
    )
    batch = collate([sample], skipped=skipped, epoch=epoch, step=step, bin=bin)
    return dataclasses.replace(batch, weight=0.0, keys=(), silent=True)


def _lay_out_read(heard: Layout, samples: Sequence[Sample], share: bool) -> Layout | None:
    """The documents to read, if there are any: of all samples, with the labels of `heard`."""
    documents = [sample.read for sample in samples if sample.read is not None]
    if not documents:
        return None
    without = [sample.key for sample in samples if sample.read is None]
    if without:
        raise ValueError(f"{without[0]}: has no document to read, but others of its batch have")
    for sample in samples:
        if _labels(sample.document) != _labels(sample.read or ()):
            raise ValueError(f"{sample.key}: what is read has other labels than what is heard")
    read = lay_out(documents, samples, share)
    assert torch.equal(read.label_ids, heard.label_ids)
    return read


def _labels(document: Document) -> list[int]:
    return [id for part in document if isinstance(part, Text) and part.labelled for id in part.ids]


def _spell(samples: Sequence[Sample]) -> Transcripts:
    alphabets, targets, lengths, too_long = [], [], [], 0
    for sample in samples:
        tokens = sample.transcript
        # Between two of the same token CTC needs a blank.
        repeats = sum(a == b for a, b in pairwise(tokens))
        fits = len(tokens) + repeats <= sample.slots
        too_long += not fits
        tokens = tokens if fits else ()
        alphabet = {token: n for n, token in enumerate(dict.fromkeys(tokens))}
        alphabets.append(alphabet)
        targets += [alphabet[token] + 1 for token in tokens]
        lengths.append(len(tokens))
    ids = np.zeros((len(samples), max([1, *map(len, alphabets)])), np.int64)
    unused = np.ones(ids.shape, bool)
    for row, alphabet in enumerate(alphabets):
        ids[row, : len(alphabet)] = list(alphabet)
        unused[row, : len(alphabet)] = False
    slots = [sample.slots for sample in samples]
    labels = [sample.clip.label if sample.clip else -1 for sample in samples]
    told = [
        min(tokens, (room + 1) // 2) if label >= 0 else 0
        for tokens, room, label in zip(lengths, slots, labels, strict=True)
    ]
    said = [label + 1 for label, n in zip(labels, told, strict=True) for _ in range(n)]
    return Transcripts(
        ids=torch.from_numpy(ids),
        unused=torch.from_numpy(unused),
        targets=torch.tensor(targets, dtype=torch.int64),
        lengths=tuple(lengths),
        trained=torch.tensor(lengths, dtype=torch.int64) > 0,
        clip_of_slot=torch.from_numpy(np.repeat(np.arange(len(slots)), slots)),
        too_long=too_long,
        languages=torch.tensor(said, dtype=torch.int64),
        repeats=tuple(told),
        told=torch.tensor(told, dtype=torch.int64) > 0,
    )


def _place_words(samples: Sequence[Sample]) -> Spoken:
    """Raises `ValueError`, naming the key, on a word in slots that its clip does not have."""
    slot_rows: list[np.ndarray] = []
    tokens: list[tuple[int, ...]] = []
    first = 0
    for sample in samples:
        for word in sample.words:
            if word.start < 0 or word.start + word.count > sample.slots:
                raise ValueError(
                    f"{sample.key}: a word lies in slots {word.start} to "
                    f"{word.start + word.count}, but its clip has {sample.slots}"
                )
            if word.count and word.ids:  # else there is nothing to compare
                slot_rows.append(first + word.start + np.arange(word.count))
                tokens.append(word.ids)
        first += sample.slots

    def starts(parts: Sequence[Sized]) -> torch.Tensor:
        return torch.from_numpy(np.cumsum([0, *map(len, parts)])[: len(parts)])

    return Spoken(
        slot_rows=torch.from_numpy(np.concatenate([np.empty(0, np.int64), *slot_rows])),
        slot_starts=starts(slot_rows),
        token_ids=torch.tensor([id for ids in tokens for id in ids], dtype=torch.int64),
        token_starts=starts(tokens),
    )


def _source(part: Text | Speech, sample: Sample, first_row: int) -> np.ndarray:
    """int64 source entries of one part of a document."""
    if isinstance(part, Text):
        return np.asarray(part.ids, dtype=np.int64)
    if part.start < 0 or part.count < 0 or part.start + part.count > sample.slots:
        raise ValueError(
            f"{sample.key}: slots {part.start} to {part.start + part.count} are asked for, but its "
            f"clip has {sample.slots}"
        )
    return -1 - np.arange(first_row + part.start, first_row + part.start + part.count)


def _is_label(part: Text | Speech) -> bool:
    return isinstance(part, Text) and part.labelled


def pad_features(features: Sequence[np.ndarray]) -> torch.Tensor:
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
