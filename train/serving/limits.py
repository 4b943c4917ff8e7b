"""What one request, and all of them together, may ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of one request: bytes of its body, clips, seconds of all of them, tokens of its answer,
    LLM positions of its prompt, and seconds from its arrival to its end. Of the server: requests
    in hand (those that are answered among them), and rows and padded positions of one batch.
    """

    body_bytes: int = 32 * 2**20
    clips: int = 16
    audio_seconds: float = 120.0
    tokens: int = 512
    positions: int = 4096
    seconds: float = 60.0
    queue: int = 64
    batch: int = 16
    batch_positions: int = 32_768
