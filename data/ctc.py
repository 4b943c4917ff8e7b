"""Word times by CTC forced alignment, on a Hugging Face model's own CTC head.

C labels of the model, its blank among them, and one more that stands for anything; T frames.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchaudio.functional import TokenSpan, forced_align, merge_tokens
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer

from data.audio import SAMPLE_RATE
from data.words import WordTime, split_words

_LEAST_SCORE = 1e-4  # of a word that was spelled: 0 means that it was not


class AlignError(ValueError):
    """A model that cannot align, or settings that do not fit it; the message names them."""


class Unaligned(ValueError):
    """One utterance that cannot be aligned; the message is the reason."""


class Aligner:
    """A CTC model (Wav2Vec2, MMS, HuBERT, ...) in float32, one utterance at a time.

    So an utterance's times depend on nothing but itself. `languages` gives the model's names of
    the corpus' languages ("en": "eng"), for a model with an alphabet per language such as MMS.
    """

    def __init__(
        self, path: str, device: str = "cpu", languages: Mapping[str, str] | None = None
    ) -> None:
        """Raises `AlignError` where the model has no trained CTC head."""
        config = AutoConfig.from_pretrained(path)
        if type(config) not in AutoModelForCTC._model_mapping:
            raise AlignError(
                f"{path}: a {config.model_type!r} model has no CTC head; give one that has, such "
                "as Wav2Vec2 or MMS"
            )
        self._model, found = AutoModelForCTC.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
        if fresh := sorted(name for name in found["missing_keys"] if "lm_head" in name):
            raise AlignError(
                f"{path}: its CTC head is not trained ({', '.join(fresh)} not in the checkpoint); "
                "give a model that was fine-tuned for recognition"
            )
        self._model.to(device).eval()
        self._device = device
        self._extractor = AutoFeatureExtractor.from_pretrained(path)
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._languages = dict(languages or {})
        self._language: str | None = None
        self._path = path

    @cached_property
    def weights(self) -> str:
        """What these weights are: SHA-256 (hex) of a local folder's, else the hub's commit."""
        if not Path(self._path).is_dir():
            return str(self._model.config._commit_hash)
        whole = hashlib.sha256()
        for file in sorted(Path(self._path).glob("*")):
            if file.suffix in {".safetensors", ".bin"}:
                with file.open("rb") as weights:
                    whole.update(hashlib.file_digest(weights, "sha256").digest())
        return whole.hexdigest()

    def check_languages(self, languages: Iterable[str]) -> None:
        """Raise `AlignError` where a model of many alphabets has none for one of these."""
        alphabets = self._alphabets
        for language in sorted(set(languages)) if alphabets else []:
            if self._languages.get(language, language) not in alphabets:
                raise AlignError(
                    f"{self._path}: has no language {self._languages.get(language, language)!r} "
                    f"(it has {', '.join(sorted(alphabets)[:8])}, ...); name the right one by "
                    f"--languages {language}=NAME"
                )

    def __call__(self, wave: np.ndarray, text: str, language: str) -> list[WordTime]:
        """When each word of `text` is spoken in a float32 [S] waveform at 16 kHz.

        A word that the alphabet cannot spell ("1984") takes the time that its neighbours leave;
        one of marks alone ("-") takes none. Both score 0. Raises `Unaligned` where the transcript
        is empty, none of its words can be spelled, or it has more letters than there are frames.
        """
        self._speak(language)
        spans = split_words(text)
        spelled = [_spell(text[a:b], self._alphabet) for a, b in spans]
        if not spans:
            raise Unaligned("the transcript is empty")
        if not any(spelled):
            raise Unaligned(f"no word can be spelled with the model's alphabet: {text[:60]!r}")
        labels, words = self._labels(text, spans, spelled)
        needed = len(labels) + int((np.diff(labels) == 0).sum())
        log_probs_1TC = self._log_probs(wave, needed)
        targets = torch.tensor([labels], dtype=torch.int32)
        path, scores = forced_align(log_probs_1TC, targets, blank=self._blank)
        found = merge_tokens(path[0], scores[0].exp(), self._blank)
        hop = len(wave) / log_probs_1TC.shape[1]
        hop = getattr(self._model.config, "inputs_to_logits_ratio", hop)
        return _times(text, spans, spelled, words, found, hop, len(wave))

    @property
    def _alphabets(self) -> dict[str, Any]:
        """Language → alphabet, of a model with one per language; else empty."""
        vocabulary = getattr(self._tokenizer, "vocab", {})
        nested = any(isinstance(value, dict) for value in vocabulary.values())
        return vocabulary if nested else {}

    @property
    def _blank(self) -> int:
        return int(self._model.config.pad_token_id)

    def _speak(self, language: str) -> None:
        """Switch to the alphabet, and adapter, of an utterance's language."""
        name = self._languages.get(language, language) if self._alphabets else ""
        if name == self._language:
            return
        if name:
            self._tokenizer.set_target_lang(name)
            self._model.load_adapter(name)
            self._model.to(self._device).eval()
        self._language = name
        special = {*self._tokenizer.all_special_tokens, self._delimiter}
        vocabulary = self._tokenizer.get_vocab()
        self._alphabet = {c: i for c, i in vocabulary.items() if len(c) == 1 and c not in special}

    @property
    def _delimiter(self) -> str | None:
        return getattr(self._tokenizer, "word_delimiter_token", None)

    @property
    def _delimiter_label(self) -> int | None:
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        return vocabulary.get(self._delimiter) if self._delimiter else None

    def _labels(
        self, text: str, spans: list[tuple[int, int]], spelled: list[list[int] | None]
    ) -> tuple[list[int], list[int]]:
        """The labels to align, and of each the number of its word, -1 for a delimiter."""
        anything = int(self._model.config.vocab_size)
        delimiter = self._delimiter_label
        labels: list[int] = []
        words: list[int] = []
        for number, ids in enumerate(spelled):
            if ids == []:
                continue
            apart = number and text[spans[number - 1][1] : spans[number][0]]
            if labels and apart and delimiter is not None:
                labels.append(delimiter)
                words.append(-1)
            letters = [anything] if ids is None else ids
            labels += letters
            words += [number] * len(letters)
        return labels, words

    @torch.inference_mode()
    def _log_probs(self, wave: np.ndarray, needed: int) -> torch.Tensor:
        """float32 [1, T, C + 1], T at least `needed`; anything has probability 1 everywhere."""
        inputs = self._extractor(wave, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        features = inputs[self._extractor.model_input_names[0]]
        frames = features.shape[1]
        if features.ndim == 2:  # a waveform, of which the model's convolutions need enough
            frames = int(self._model._get_feat_extract_output_lengths(torch.tensor(frames)))
        if frames >= needed:
            logits = self._model(**inputs.to(self._device)).logits.float().cpu()
            frames = logits.shape[1]
        if frames < needed:
            raise Unaligned(f"too short: {max(0, frames)} frames for {needed} labels")
        anything = torch.zeros(*logits.shape[:-1], 1)
        return torch.cat([logits.log_softmax(-1), anything], dim=-1)


def _spell(word: str, alphabet: Mapping[str, int]) -> list[int] | None:
    """The labels of a word; none of marks alone, None where a letter or digit is unknown."""
    labels: list[int] = []
    for letter in unicodedata.normalize("NFC", word):
        known = next((f for f in _forms(letter) if f and all(c in alphabet for c in f)), None)
        if known is not None:
            labels += [alphabet[c] for c in known]
        elif unicodedata.category(letter)[0] in "LN":
            return None
    return labels


def _forms(letter: str) -> list[str]:
    """Ways to write a letter, the best first: as it is, in another case, without its accents."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(c))
    return [form for one in (letter, bare) for form in (one, one.lower(), one.upper())]


def _times(
    text: str,
    spans: list[tuple[int, int]],
    spelled: list[list[int] | None],
    words: list[int],
    found: list[TokenSpan],
    hop: float,
    samples: int,
) -> list[WordTime]:
    """The words' times from their labels' frames; a word of marks stands where the last ended."""
    labels_of: dict[int, list[TokenSpan]] = {}
    for word, span in zip(words, found, strict=True):
        labels_of.setdefault(word, []).append(span)
    made: list[WordTime] = []
    for number, (a, b) in enumerate(spans):
        labels = labels_of.get(number)
        if labels:
            start, end = (min(samples, round(f * hop)) for f in (labels[0].start, labels[-1].end))
        else:
            start = end = made[-1].end if made else 0
        score = 0.0
        if labels and spelled[number]:
            frames = sum(len(label) for label in labels)
            score = sum(label.score * len(label) for label in labels) / frames
            score = max(_LEAST_SCORE, score)
        made.append(WordTime(text[a:b], start, end, score))
    return made
