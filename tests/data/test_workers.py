"""A worker that never comes back: waited for so long, then replaced, then the run stops."""

import time

import pytest
from torch.utils.data import Dataset

from data import retry, workers
from data.retry import ReadError
from data.workers import in_workers


class Hanging(Dataset):
    """Numbers; one of them never comes."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, n: int) -> int:
        if n == 3:
            time.sleep(600)
        return n


def test_a_hung_worker_ends_in_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PAUSES", (0.0,))
    monkeypatch.setattr(workers, "_HANG_SECONDS", 2.0)
    found: list[int] = []
    began = time.monotonic()
    with pytest.raises(ReadError, match=r"data workers died 2 times .* resume"):
        found.extend(in_workers(Hanging(), 2, 1))
    assert found == [0, 1, 2]
    assert time.monotonic() - began < 60


def test_a_slow_worker_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_LOOK_SECONDS", 0.2)

    class Slow(Hanging):
        def __getitem__(self, n: int) -> int:
            time.sleep(0.7)
            return n

    assert list(in_workers(Slow(), 2, 1)) == list(range(6))
