"""Prompts as token ids and speech slots: the one place where a template meets a tokenizer.

A prompt is prefix, input, suffix, answer. Each is tokenised apart and the ids are concatenated:
so the label mask is exact at the seam for any tokenizer, and a prompt that is heard has the same
seams as one that is read.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Text:
    """Tokens; `labelled` ones are what the LLM learns to say."""

    ids: tuple[int, ...]
    labelled: bool = False


@dataclass(frozen=True)
class Speech:
    """`count` adapter slots of the document's own clip, from slot `start`."""

    start: int
    count: int


Document = tuple[Text | Speech, ...]


@dataclass(frozen=True)
class Spelling:
    """A text of W words in tokens.

    ids        of the whole text
    word_ends  [W] int64: tokens up to each word's end, spaces going with the word behind them; -1
               where a token runs on into the next word, so that the two cannot be parted
    """

    ids: list[int]
    word_ends: np.ndarray


_BATCH = 4096  # texts that are tokenised at once

# From the template's instruction to its input, or the other way round.
_BETWEEN = re.compile(r"\{instruction\}.*\{input\}|\{input\}.*\{instruction\}", flags=re.DOTALL)


class Prompt:
    """A template such as "<user> {instruction} : {input} <assistant>" under one tokenizer.

    `tokenizer` is any Hugging Face tokenizer. The template has `{input}` once and `{instruction}`
    any number of times. An instruction that holds `{input}` itself (`Is "{input}" good or bad?`)
    stands in place of all that lies between the template's own two. BOS comes first where the
    tokenizer has one and normally adds it.
    """

    def __init__(self, tokenizer: Any, template: str):
        if template.count("{input}") != 1:
            raise ValueError(
                f"template must have {{input}} exactly once, found {template.count('{input}')} "
                f"times in {template!r}"
            )
        self.template = template
        self._tokenizer = tokenizer
        added = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
        has_bos = tokenizer.bos_token_id is not None and added == [tokenizer.bos_token_id]
        self._bos = tuple(added) if has_bos else ()
        self._parts: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def parts(self, instruction: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids before (BOS included) and after the input."""
        if instruction not in self._parts:
            before, after = self.halves(instruction)
            self._parts[instruction] = (
                self._bos + tuple(self.encode(before)),
                tuple(self.encode(after)),
            )
        return self._parts[instruction]

    def halves(self, instruction: str) -> tuple[str, str]:
        """The prompt's text before and after the input.

        Raises `ValueError` on an instruction with an `{input}` of its own where the template has
        not exactly one place for it.
        """
        if "{input}" not in instruction:
            before, after = self.template.split("{input}")
            return (
                before.replace("{instruction}", instruction),
                after.replace("{instruction}", instruction),
            )
        pieces = _BETWEEN.split(self.template)
        own = instruction.split("{input}")
        if len(pieces) != 2 or len(own) != 2 or "{instruction}" in pieces[0] + pieces[1]:
            raise ValueError(
                f"instruction {instruction!r} and prompt {self.template!r} do not fit: each may "
                "have {input} once, and the prompt {instruction} once"
            )
        return pieces[0] + own[0], own[1] + pieces[1]

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, no special tokens added."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def count(self, texts: Sequence[str]) -> np.ndarray:
        """[texts] int64: tokens of each, as `encode` would give them."""
        if not getattr(self._tokenizer, "is_fast", False):
            return np.array([len(self.encode(text)) for text in texts], dtype=np.int64)
        parts = (texts[at : at + _BATCH] for at in range(0, len(texts), _BATCH))
        found = (self._tokenizer(list(p), add_special_tokens=False)["input_ids"] for p in parts)
        return np.array([len(ids) for part in found for ids in part], dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def encode_words(
        self, texts: Sequence[str], words: Sequence[Sequence[tuple[int, int]]]
    ) -> list[Spelling]:
        """Token ids of whole texts, and where in them each word ends.

        `words` are the character spans of each text's words, at least one.
        """
        if not getattr(self._tokenizer, "is_fast", False):
            return [self._encode_by_beginnings(t, w) for t, w in zip(texts, words, strict=True)]
        found = self._tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=True,
            return_attention_mask=False, return_token_type_ids=False,
        )  # fmt: skip
        each = zip(found["input_ids"], found["offset_mapping"], words, strict=True)
        return [Spelling(ids, _word_ends(offsets, spans)) for ids, offsets, spans in each]

    def _encode_by_beginnings(self, text: str, words: Sequence[tuple[int, int]]) -> Spelling:
        """`encode_words` for any tokenizer: by the tokens of the text up to each word's end."""
        ids = self.encode(text)
        begun = [self.encode(text[:end]) for _, end in words[:-1]]
        ends = [len(some) if ids[: len(some)] == some else -1 for some in begun]
        return Spelling(ids, np.array([*ends, len(ids)], dtype=np.int64))

    def with_text(self, instruction: str, text: str) -> list[int]:
        """The prompt's ids where the input is read."""
        prefix, suffix = self.parts(instruction)
        return [*prefix, *self.encode(text), *suffix]

    def with_speech(self, instruction: str, slots: int) -> Document:
        """The prompt where the input is heard, as `slots` adapter slots."""
        return self.with_parts(instruction, (Speech(0, slots),))

    def with_parts(self, instruction: str, parts: Document) -> Document:
        """The prompt where the input is `parts` heard and read."""
        prefix, suffix = self.parts(instruction)
        return (Text(prefix), *parts, Text(suffix))

    def answer(self, ids: Sequence[int], finished: bool) -> Text:
        """The labelled answer; EOS follows only where the answer is `finished`, not cut."""
        eos = self._tokenizer.eos_token_id
        if finished and eos is None:
            raise ValueError(f"{type(self._tokenizer).__name__} has no EOS token; set eos_token")
        return Text((*ids, eos) if finished else tuple(ids), labelled=True)


def _word_ends(offsets: Sequence[tuple[int, int]], words: Sequence[tuple[int, int]]) -> np.ndarray:
    """`Spelling.word_ends` by the characters (first, past the last) that each token stands for."""
    number = len(words)
    word_ends = np.array([end for _, end in words])
    first, past = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    begins_in = np.searchsorted(word_ends, first, side="right")
    ends_in = np.maximum(begins_in, np.searchsorted(word_ends, past - 1, side="right"))
    ends_in = np.minimum(np.maximum.accumulate(ends_in), number - 1)
    ends = np.searchsorted(ends_in, np.arange(number), side="right")
    # The first word that any token from here on reaches back to.
    back = np.minimum.accumulate(np.append(begins_in, number)[::-1])[::-1]
    return np.where(back[ends] > np.arange(number), ends, -1)
