import logging
from typing import Any

import pytest
import torch

from train.ops import Segments, library, ragged_conv1d

ARGUMENTS: dict[str, Any] = {
    "x": torch.zeros(4, 3),
    "weight": torch.zeros(2, 1, 3),
    "bias": None,
    "segments": Segments.packed([4]),
    "stride": 1,
    "padding": 0,
}


@pytest.fixture(autouse=True)
def forget_what_was_said() -> None:
    library._say.cache_clear()


def test_auto_says_once_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="train.ops.library"):
        for _ in range(3):
            ragged_conv1d(**ARGUMENTS)
    assert [r.getMessage() for r in caplog.records] == ["ragged_conv1d on cpu: fused"]


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(library._MISSING, "cpu", f"it is not built: {library.FIX}")
    with pytest.raises(RuntimeError, match=r"impl='fused' was asked for, but .*pip install"):
        ragged_conv1d(**ARGUMENTS, impl="fused")
    y, _ = ragged_conv1d(**ARGUMENTS, impl="auto")
    assert y.shape == (4, 2)
    assert "reference, because it is not built" in caplog.text


def test_the_cpu_library_is_built() -> None:
    assert library.missing("cpu") is None
