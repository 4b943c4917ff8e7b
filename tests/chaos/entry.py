"""train/main.py, whose model breaks once when a file says so: `entry.py CONFIG`, below deepspeed.

`HEARKEN_CHAOS` is a folder. The rank N that finds `nan-N` there has a loss that is not a number,
and the one that finds `oom-N` asks for more memory than there is.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from train import main
from train.cli import guarded, leave
from train.model.speech_llm import SpeechLLM

_forward = SpeechLLM.forward


def _breaking(self: SpeechLLM, *args: Any, **kwargs: Any) -> torch.Tensor:
    sums_K = _forward(self, *args, **kwargs)
    if _told("oom"):
        torch.empty(1 << 60, dtype=torch.uint8)
    return sums_K * torch.nan if _told("nan") else sums_K


def _told(what: str) -> bool:
    try:
        Path(os.environ["HEARKEN_CHAOS"], f"{what}-{os.environ['RANK']}").unlink()
    except FileNotFoundError:
        return False
    return True


if __name__ == "__main__":
    SpeechLLM.forward = _breaking  # type: ignore[method-assign]
    leave(guarded(main.main))
