"""Which batch ran out of memory, and which budget that was."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from data.bounded import bounded
from tests.train import mix
from train.exhaustion import OutOfMemory, blamed_on

SECONDS, BYTES = 60.0, 512 << 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> mix.World:
    return mix.World(tmp_path_factory.mktemp("memory"), {"ce": 1.0})


def test_too_much_audio_and_too_much_text_are_told_apart(world: mix.World) -> None:
    batch = dataclasses.replace(world.pack([0, 1]), epoch=1, step=2, bin=3)
    longest = batch.features.shape[-1]
    # The same clips behind hours of silence, which is not even stored.
    audio = dataclasses.replace(batch, features=torch.zeros(1, 1).expand(2, 1 << 33))
    text = dataclasses.replace(batch, source=batch.source[:1].expand(1 << 31), lengths=(1 << 31,))
    assert longest < 1 << 16
    for bad, budget, other in (
        (audio, "data.seconds_per_bin below 1 ", "tokens_per_bin"),
        (text, f"data.tokens_per_bin below {1 << 31} ", "seconds_per_bin"),
    ):
        with (
            pytest.raises(OutOfMemory, match="bin 3 of step 2 of epoch 1") as raised,
            bounded(SECONDS, BYTES),
            blamed_on(bad, 7),
        ):
            world.model(bad)
        said = str(raised.value)
        assert "on rank 7" in said
        assert budget in said
        assert other not in said
        assert "\n" not in said


def test_other_errors_are_left_alone(world: mix.World) -> None:
    with pytest.raises(RuntimeError, match="shapes"), blamed_on(world.pack([0]), 0):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
