"""Fixtures shared by all rooms."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Before transformers and MLflow read it: tests never look anything up outside.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# How long an example takes is the machine's business.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Bit-exact comparisons hold for one number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout's root."""
    return Path(__file__).parent.parent
