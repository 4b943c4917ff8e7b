"""`train/main.py` with a mistake: one weight of the frozen LLM is left trainable.

deepspeed tests/train/unfrozen.py CONFIG
"""

from __future__ import annotations

from typing import Any

from train import main
from train.cli import guarded, leave
from train.model.build import build
from train.model.speech_llm import SpeechLLM


def mistaken(*args: Any, **settings: Any) -> SpeechLLM:
    model = build(*args, **settings)
    model.decoder.get_decoder().norm.weight.requires_grad_(True)
    return model


if __name__ == "__main__":
    main.build = mistaken
    leave(guarded(main.main))
