"""Tokens of an answer as text, all at once or piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Wording:
    """The text of tokens as they come: the pieces together are `to_text` of all of them.

    What may still change is held back: white space at the end, which is stripped from a whole
    answer, and characters of which only some bytes are there.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.ids: list[int] = []
        self._given = ""

    def add(self, token: int) -> str:
        """The next piece, which may be empty."""
        self.ids.append(token)
        return self._piece(text(self._tokenizer, self.ids).rstrip("\ufffd").rstrip())

    def rest(self) -> str:
        """What was held back, when there are no more tokens."""
        return self._piece(text(self._tokenizer, self.ids))

    def _piece(self, said: str) -> str:
        if not said.startswith(self._given):
            return ""
        piece, self._given = said[len(self._given) :], said
        return piece


def text(tokenizer: Any, ids: Sequence[int]) -> str:
    """As `listen.py` prints it: without special tokens, stripped."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
