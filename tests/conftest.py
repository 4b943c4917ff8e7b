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


@pytest.hookimpl(tryfirst=True)  # xdist's own hook reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `--dist loadgroup`: a file's tests share what they made, and no two that use the
    launcher's own port, as a user does, run at once."""
    for item in items:
        alone = item.path.name in ("test_demo.py", "test_tutorial.py")
        item.add_marker(pytest.mark.xdist_group("port" if alone else item.path.name))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Bit-exact comparisons hold for one number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout's root."""
    return Path(__file__).parent.parent
