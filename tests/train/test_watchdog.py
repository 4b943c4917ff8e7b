from __future__ import annotations

import threading

import pytest
from torch.distributed import DistNetworkError, HashStore

from train.stopping import RESUMABLE
from train.watchdog import Watchdog


def test_the_rank_that_hangs_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    store, ended = HashStore(), threading.Event()
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    waiting = Watchdog(store, 0, 3, 2.0, end)
    hanging = Watchdog(store, 1, 3, 60, end)
    hanging.at("waiting for the data of step 7")
    waiting.at("step 7")
    assert ended.wait(10)
    waiting.close()
    hanging.close()
    assert codes == [RESUMABLE]
    said = capfd.readouterr().err
    assert "watchdog on rank 0: at 'step 7'" in said
    assert "rank 1 on" in said
    assert "waiting for the data of step 7" in said
    assert "rank 2: has said nothing yet" in said
    assert "test_the_rank_that_hangs_is_named" in said  # the stacks


def test_a_rank_that_moves_is_left_alone() -> None:
    codes: list[int] = []
    watchdog = Watchdog(HashStore(), 0, 1, 3.0, codes.append)
    for step in range(8):
        watchdog.at(f"step {step}")
        threading.Event().wait(0.5)
    watchdog.close()
    assert codes == []


class Gone:
    """The store of a rank 0 that has ended."""

    def set(self, key: str, value: str) -> None:
        pass

    def get(self, key: str) -> bytes:
        raise DistNetworkError("Connection reset by peer\nand a page of frames")

    def check(self, keys: list[str]) -> bool:
        raise DistNetworkError("Connection reset by peer\nand a page of frames")


def test_it_ends_though_rank_0_has_ended_before_it(capfd: pytest.CaptureFixture[str]) -> None:
    ended = threading.Event()
    watchdog = Watchdog(Gone(), 2, 4, 0.2, lambda code: ended.set())
    assert ended.wait(10)
    watchdog.close()
    said = capfd.readouterr().err
    assert "watchdog on rank 2" in said
    assert (
        "rank 0 has ended already, where all say where they are (Connection reset by peer)" in said
    )
