"""How long collectives ran alone, against counting instants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.communication import alone

names = st.sampled_from(["ncclDevKernel_AllGather", "gloo:all_reduce", "gemm", "aten::mm"])
events = st.lists(
    st.tuples(names, st.integers(0, 20), st.integers(0, 9)).map(lambda e: (e[0], e[1], e[1] + e[2]))
)


@given(events)
@pytest.mark.parametrize("gpu", [True, False])
def test_against_counting_instants(gpu: bool, events: list[tuple[str, int, int]]) -> None:
    count = 0
    for at in range(30):
        running = [name for name, begin, end in events if begin <= at < end]
        collective = any(name.startswith(("nccl", "gloo")) for name in running)
        other = any(not name.startswith(("nccl", "gloo")) for name in running)
        count += collective and not (gpu and other)
    assert alone(events, gpu) == count
