"""Stopped anywhere and continued on any ranks and workers, training is on the same bins."""

import random
import shutil
import tempfile
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from data.archive import write_shard
from data.augment import Augment
from data.prompts import Prompt
from data.shards import Overlay, ShardSet
from data.stream import Stream
from tests.data import made
from tests.data.test_stream import fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
# One of these is each rank's number of workers; processes are dear, so mostly none.
WORKERS = (0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4)


def corpus(folder: Path, sizes: list[int], bad: int, draw: random.Random) -> list[str]:
    """Shards and targets in `folder`; `bad` clips of them are no audio. Returns all keys."""
    keys = [f"k{s}-{n}" for s, size in enumerate(sizes) for n in range(size)]
    broken = set(draw.sample(keys, min(bad, len(keys))))
    for s, size in enumerate(sizes):
        rows = [
            made.row(key, draw.randint(2000, 40_000), b"no audio" if key in broken else None)
            for key in (f"k{s}-{n}" for n in range(size))
        ]
        write_shard(folder / "s" / f"train-{s:06d}.tar", rows, made.FIELDS, {})
    made.targets(folder / "t", ShardSet.open(folder / "s"), per_sample=2)
    return keys


def opened(folder: Path, budgets: dict) -> Stream:
    base = ShardSet.open(folder / "s")
    prompt = Prompt(made.ByteTokenizer(), "{instruction}{input}")
    return Stream.build(
        base, Overlay.open(folder / "t", base), prompt, made.Rule(), made.waveform,
        augment=Augment((0.9, 1.0, 1.1)), **budgets,
    )  # fmt: skip


def check(sizes: list[int], bad: int, budgets: dict, draw: random.Random) -> int:
    """Train two epochs in pieces, and compare with the same in one; returns the pieces."""
    folder = Path(tempfile.mkdtemp())
    try:
        return _check(folder, corpus(folder, sizes, bad, draw), budgets, draw)
    finally:
        shutil.rmtree(folder)


def _check(folder: Path, keys: list[str], budgets: dict, draw: random.Random) -> int:
    whole = opened(folder, budgets)
    pieces = 0
    for epoch in (0, 1):
        truth = [[fingerprint(b) for b in step] for step in whole.steps(epoch)]
        found: Counter[str] = Counter(skip.key for skip in whole.skipped(epoch))
        step = 0
        while step < len(truth):
            stream, world = opened(folder, budgets), draw.randint(1, 16)
            count = draw.randint(1, max(1, len(truth) // 2))
            ranks = []
            for rank in range(world):
                stream.workers = draw.choice(WORKERS)
                steps = stream.steps(epoch, step, rank=rank, world=world)
                ranks.append(list(islice(steps, count)))
                steps.close()  # type: ignore[attr-defined]
            assert len({len(rank) for rank in ranks}) == 1
            for number, shares in enumerate(zip(*ranks, strict=True)):
                assert {len(share) for share in shares} == {-(-budgets["bins_per_step"] // world)}
                batches = [batch for share in shares for batch in share]
                bins = {b.bin: fingerprint(b) for b in batches if b.bin >= 0}
                assert [bins[n] for n in range(len(bins))] == truth[step + number]
                assert all(b.weight == 0 and not b.keys for b in batches if b.bin < 0)
                found.update(key for batch in batches for key in batch.keys)
                found.update(skip.key for batch in batches for skip in batch.skipped)
            step += len(ranks[0])
            pieces += 1
        assert found == Counter(keys)
    return pieces


budgets = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**64 - 1),
        "tokens_per_bin": st.integers(30, 200),
        "seconds_per_bin": st.floats(1.0, 6.0),
        "bins_per_step": st.integers(1, 17),
        "window_shards": st.integers(1, 3),
    }
)
case = given(
    st.lists(st.integers(0, 12), min_size=1, max_size=5), st.integers(0, 3), budgets, st.randoms()
)
relaxed = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    # A failing case is not made smaller: it takes seconds each time, hundreds of times.
    "phases": [Phase.explicit, Phase.reuse, Phase.generate],
}


@pytest.mark.parametrize("seed", range(3))
def test_any_worlds_workers_and_stops(seed) -> None:
    draw = random.Random(seed)
    budgets = {
        "seed": draw.getrandbits(64),
        "tokens_per_bin": draw.randint(30, 200),
        "seconds_per_bin": draw.uniform(1.0, 6.0),
        "bins_per_step": draw.randint(1, 7),
        "window_shards": draw.randint(1, 3),
    }
    assert check([draw.randint(0, 12) for _ in range(4)], seed, budgets, draw) > 2


@pytest.mark.slow
@case
@settings(max_examples=25, **relaxed)
def test_any_worlds_workers_and_stops_many_times(sizes, bad, budgets, draw) -> None:
    check(sizes, bad, budgets, draw)


def test_every_world_and_number_of_workers_once() -> None:
    """What the random cases may miss: each world from 1 to 16, with 0 to 4 workers."""
    fixed = {
        "seed": 5, "tokens_per_bin": 120, "seconds_per_bin": 4.0, "bins_per_step": 6,
        "window_shards": 2,
    }  # fmt: skip
    folder = Path(tempfile.mkdtemp())
    try:
        corpus(folder, [9, 7, 8], 1, random.Random(0))
        stream = opened(folder, fixed)
        truth = [fingerprint(batch) for batch in next(stream.steps(1, 1))]
        for world in range(1, 17):
            bins = {}
            for rank in range(world):
                stream.workers = world % 5 if rank == world // 2 else 0
                for batch in next(stream.steps(1, 1, rank=rank, world=world)):
                    bins[batch.bin] = fingerprint(batch)
            assert [bins[n] for n in range(6)] == truth
    finally:
        shutil.rmtree(folder)


def test_the_check_sees_a_sample_twice(monkeypatch) -> None:
    """The test's own test: a plan that depends on its start does not pass."""
    from data.plan import Plan

    step = Plan.step
    asked: list[int] = []

    def shifted(self, epoch, i):
        asked.append(i)
        return [np.roll(bin, len(asked) % 2) for bin in step(self, epoch, i)]

    monkeypatch.setattr(Plan, "step", shifted)
    with pytest.raises(AssertionError):
        check([8, 8], 0, {
            "seed": 1, "tokens_per_bin": 200, "seconds_per_bin": 6.0, "bins_per_step": 2,
            "window_shards": 2,
        }, random.Random(0))  # fmt: skip
