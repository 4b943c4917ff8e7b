"""The exported model's config.json."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class HearkenConfig(PretrainedConfig):
    """What an exported folder is made of.

    speech        the run's `model` section (`train.config.Model`), every default written out
    sources       `encoder` and `decoder`: {path, files: {name: SHA-256}} of what was trained upon
    merged        whether `encoder/` and `decoder/` are in the folder, any low-rank updates in them
    norm_eps      of the LayerNorm in front of the LLM
    end_token_id  the tokenizer's end of sequence, which ends an answer
    """

    model_type = "hearken"

    def __init__(
        self,
        speech: dict[str, Any] | None = None,
        sources: dict[str, Any] | None = None,
        merged: bool = False,
        norm_eps: float = 1e-5,
        end_token_id: int | None = None,
        **others: Any,
    ):
        self.speech = speech or {}
        self.sources = sources or {}
        self.merged = merged
        self.norm_eps = norm_eps
        self.end_token_id = end_token_id
        super().__init__(**others)
