"""Recordings and conversations as the exported model takes them.

Shapes: B conversations, T positions (padded at the start), C clips of all of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, ProcessorMixin

from data.prompts import Prompt
from train.model.encoder import SAMPLE_RATE, Featurize
from train.model.export.markers import SEAM, SPEECH
from train.model.lengths import Conv, LengthRule

_MARKERS = re.compile(f"({re.escape(SPEECH)}|{re.escape(SEAM)})")


@dataclass(frozen=True)
class Row:
    """One conversation.

    ids        -1 where a slot stands
    features   of each clip, float32 [..., length]
    samples    of each clip, at 16 kHz
    languages  of each clip
    """

    ids: tuple[int, ...]
    features: tuple[torch.Tensor, ...]
    samples: tuple[int, ...]
    languages: tuple[str, ...]


class HearkenProcessor(ProcessorMixin):
    """Feature extractor, tokenizer, and the arithmetic from seconds to slots.

    Args:
        front_end, adapter: [kernel, stride, padding] of every convolution on the way to a slot.
        own_length: Whisper hears a clip at its own length.
        max_seconds: of one clip, as in training.
        languages: those that the encoder has adapters for; none where it takes any.
    """

    def __init__(
        self,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        front_end: Sequence[Sequence[int]] = (),
        adapter: Sequence[Sequence[int]] = (),
        own_length: bool = False,
        max_seconds: float = 30.0,
        languages: Sequence[str] = (),
    ):
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)
        self.front_end, self.adapter = front_end, adapter
        self.own_length, self.max_seconds = own_length, max_seconds
        self.languages = languages

    def __call__(
        self,
        audio: Any = None,
        text: str | Sequence[str] = "",
        *,
        sampling_rate: int = SAMPLE_RATE,
        languages: Sequence[str] = (),
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """One or several instructions, each about its own recording.

        Args:
            audio: a waveform [samples] (mono, full scale 1.0); for several texts a list of
                waveforms, None for a text without one.
            text: the instruction, as a person would give it: the prompt is put around it here.
            languages: of the recordings, for a model that has adapters of languages.
            return_tensors: "pt"; there is no other form.
        Raises:
            ValueError: a recording that the model cannot hear.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', found {return_tensors!r}")
        texts = [text] if isinstance(text, str) else list(text)
        waves = [audio] if isinstance(text, str) else list(audio if audio is not None else ())
        waves = waves or [None] * len(texts)
        if len(waves) != len(texts):
            raise ValueError(f"audio must have one clip for each text: {len(texts)} texts, found "
                             f"{len(waves)} clips")  # fmt: skip
        conversations = []
        for instruction, wave in zip(texts, waves, strict=True):
            parts: list[dict[str, Any]] = [{"type": "text", "text": instruction}]
            if wave is not None:
                parts.append({"type": "audio", "audio": wave})
            conversations.append([{"role": "user", "content": parts}])
        return self.encode(conversations, sampling_rate=sampling_rate, languages=languages)

    def apply_chat_template(
        self, conversation: Any, *args: Any, tokenize: bool = False, **others: Any
    ) -> Any:
        """A conversation, or several, as text; or with `tokenize` as the model takes it.

        Contents are text, or lists of {"type": "text", "text": ...} and {"type": "audio", "audio":
        waveform}. In a user's turn the first part, or else the last, is the instruction if it is
        text; all the others, heard and read, are what it is about.
        """
        if not tokenize:
            return super().apply_chat_template(conversation, *args, **others)
        several = not isinstance(conversation[0], dict)
        kept = {k: others[k] for k in ("sampling_rate", "languages") if k in others}
        return self.encode(conversation if several else [conversation], **kept)

    def encode(
        self,
        conversations: Sequence[Sequence[dict[str, Any]]],
        *,
        sampling_rate: int = SAMPLE_RATE,
        languages: Sequence[str] = (),
    ) -> BatchFeature:
        """What the model's `generate` takes: see `HearkenModel.embed`; raises as `read` does.

        Args:
            languages: of all clips, in their order.
        """
        rows, spoken = [], list(languages)
        for talk in conversations:
            count = len(_waves(talk))
            mine, spoken = spoken[:count], spoken[count:]
            rows.append(self.read(talk, sampling_rate=sampling_rate, languages=mine))
        if spoken:
            raise ValueError(f"languages must name one for each clip, found {len(spoken)} more")
        return self.collate(rows)

    def read(
        self,
        conversation: Sequence[dict[str, Any]],
        *,
        sampling_rate: int = SAMPLE_RATE,
        languages: Sequence[str] = (),
    ) -> Row:
        """One conversation, ready to be put beside others.

        Raises:
            ValueError: a recording that the model cannot hear; jinja2's `TemplateError`, which
                says why, on a conversation that the model was not trained for.
        """
        waves = _waves(conversation)
        clips = [self._checked(n, wave, sampling_rate) for n, wave in enumerate(waves)]
        slots = iter([int(self.rule.slots(len(clip))) for clip in clips])
        ids = self.tokens(self.apply_chat_template(list(conversation)), slots)
        featurize = Featurize("", self.own_length)
        featurize._extractor = self.feature_extractor
        return Row(
            tuple(ids),
            tuple(torch.from_numpy(featurize(clip)) for clip in clips),
            tuple(map(len, clips)),
            self._spoken(len(clips), languages),
        )

    def collate(self, rows: Sequence[Row]) -> BatchFeature:
        """Conversations padded at the start, and all of their clips padded at the end."""
        made: dict[str, Any] = _padded([row.ids for row in rows], self.tokenizer.eos_token_id)
        features = [clip for row in rows for clip in row.features]
        if features:
            # Time is the last axis, whether it is samples or mel frames.
            padded = pad_sequence([f.movedim(-1, 0) for f in features], batch_first=True)
            made["input_features"] = padded.movedim(1, -1)
            made["samples"] = torch.tensor([n for row in rows for n in row.samples])
            made["languages"] = tuple(code for row in rows for code in row.languages)
        return BatchFeature(made)

    @property
    def rule(self) -> LengthRule:
        """Samples → slots."""
        return LengthRule(
            tuple(Conv(*conv) for conv in self.front_end),
            tuple(Conv(*conv) for conv in self.adapter),
        )

    def tokens(self, rendered: str, slots: Any) -> list[int]:
        """Ids of what the chat template wrote; -1 where a slot stands.

        Args:
            slots: iterator over how many each clip has.
        """
        prompt = Prompt(self.tokenizer, "{input}")
        ids = list(prompt.parts("")[0])  # BOS, where the tokenizer adds one
        for piece in _MARKERS.split(rendered):
            if piece == SPEECH:
                ids += [-1] * next(slots)
            elif piece != SEAM:
                ids += prompt.encode(piece)
        return ids

    def _checked(self, number: int, wave: Any, sampling_rate: int) -> np.ndarray:
        clip = np.asarray(wave)
        if clip.ndim != 1 or clip.dtype.kind != "f":
            raise ValueError(
                f"audio {number} must be floats of one channel, [samples], full scale 1.0; found "
                f"{clip.dtype} {list(clip.shape)}"
            )
        if sampling_rate != SAMPLE_RATE:
            raise ValueError(
                f"audio must be sampled at {SAMPLE_RATE} Hz, found {sampling_rate}; resample it, "
                "as by torchaudio.functional.resample"
            )
        if not np.isfinite(clip).all():
            raise ValueError(f"audio {number} has samples that are NaN or infinite")
        seconds = len(clip) / SAMPLE_RATE
        if seconds > self.max_seconds:
            raise ValueError(
                f"audio {number} is {seconds:.1f} s long, over the {self.max_seconds:g} s that the "
                "model was trained for; cut it"
            )
        if int(self.rule.slots(len(clip))) == 0:
            raise ValueError(f"audio {number}: {1000 * seconds:.0f} ms is too short to be heard")
        return clip.astype(np.float32)

    def _spoken(self, clips: int, languages: Sequence[str]) -> tuple[str, ...]:
        """The language of each clip."""
        if not self.languages:
            return ("",) * clips
        if len(languages) != clips or not set(languages) <= set(self.languages):
            raise ValueError(
                f"languages must name one of {', '.join(self.languages)} for each of {clips} "
                f"clips, found {list(languages)}"
            )
        return tuple(languages)


def _waves(conversation: Sequence[dict[str, Any]]) -> list[Any]:
    """The waveforms of a conversation, in the order in which the chat template places them."""
    parts = [
        part
        for message in conversation
        if not isinstance(message["content"], str)
        for part in message["content"]
    ]
    return [part["audio"] for part in parts if part["type"] == "audio"]


def _padded(rows: Sequence[tuple[int, ...]], pad: int) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    attended = torch.zeros_like(ids)
    for row, found in enumerate(rows):
        at = longest - len(found)
        ids[row, at:] = torch.tensor(found)
        attended[row, at:] = 1
    speech = ids < 0
    return {
        "input_ids": ids.masked_fill(speech, pad),
        "attention_mask": attended,
        "speech_mask": speech,
    }
