"""Prompts as token ids and speech slots: the one place where a template meets a tokenizer.

A prompt is prefix, input, suffix, answer. Each is tokenised apart and the ids are concatenated:
so the label mask is exact at the seam for any tokenizer, and a prompt that is heard has the same
seams as one that is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


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


class Prompt:
    """A template such as "<user> {instruction} : {input} <assistant>" under one tokenizer.

    `tokenizer` is any Hugging Face tokenizer. The template has `{input}` once and `{instruction}`
    any number of times. BOS comes first where the tokenizer has one and normally adds it.
    """

    def __init__(self, tokenizer: Any, template: str):
        if template.count("{input}") != 1:
            raise ValueError(
                f"template must have {{input}} exactly once, found {template.count('{input}')} "
                f"times in {template!r}"
            )
        self.template = template
        self._tokenizer = tokenizer
        self._before, self._after = template.split("{input}")
        added = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
        has_bos = tokenizer.bos_token_id is not None and added == [tokenizer.bos_token_id]
        self._bos = tuple(added) if has_bos else ()
        self._parts: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def parts(self, instruction: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids before (BOS included) and after the input."""
        if instruction not in self._parts:
            before = self._before.replace("{instruction}", instruction)
            after = self._after.replace("{instruction}", instruction)
            self._parts[instruction] = (
                self._bos + tuple(self.encode(before)),
                tuple(self.encode(after)),
            )
        return self._parts[instruction]

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, no special tokens added."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def with_text(self, instruction: str, text: str) -> list[int]:
        """The prompt's ids where the input is read."""
        prefix, suffix = self.parts(instruction)
        return [*prefix, *self.encode(text), *suffix]

    def with_speech(self, instruction: str, slots: int) -> Document:
        """The prompt where the input is heard, as `slots` adapter slots."""
        prefix, suffix = self.parts(instruction)
        return (Text(prefix), Speech(0, slots), Text(suffix))

    def answer(self, ids: Sequence[int], finished: bool) -> Text:
        """The labelled answer; EOS follows only where the answer is `finished`, not cut."""
        eos = self._tokenizer.eos_token_id
        if finished and eos is None:
            raise ValueError(f"{type(self._tokenizer).__name__} has no EOS token; set eos_token")
        return Text((*ids, eos) if finished else tuple(ids), labelled=True)
