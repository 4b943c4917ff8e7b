"""On two ranks, with the table cut as ZeRO-3 cuts it, in the middle of a row as well."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from train.ops import RowExchange, pack_embeddings

RANKS = 2


def partition(table: torch.Tensor, rank: int) -> torch.Tensor:
    """What ZeRO-3 leaves of a parameter on one rank."""
    size = -(-table.numel() // RANKS)
    flat = torch.nn.functional.pad(table.flatten(), (0, RANKS * size - table.numel()))
    return flat[rank * size : (rank + 1) * size].clone()


# Cut between two rows, within a row, and with padding at the end.
SIZES = [(8, 6), (7, 5), (5, 3)]


def run_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        for rows, hidden in SIZES:
            check(rank, rows, hidden)
    finally:
        dist.destroy_process_group()


def check(rank: int, rows: int, hidden: int) -> None:
    torch.manual_seed(0)
    table = torch.randn(rows, hidden).bfloat16()
    exchange = RowExchange(partition(table, rank), hidden)
    for step in range(3):
        torch.manual_seed(10 * step + rank)
        count = [9, 0, 4][(step + rank) % 3]  # the ranks differ, and one has nothing to ask
        source = torch.randint(0, rows, (count,))
        if count:
            source[-1] = -1  # speech
        got = exchange(source, capacity=9)
        assert torch.equal(got, table[source.clamp(min=0)] * (source >= 0)[:, None])
        # Packing from the exchanged rows is packing from the whole table.
        speech, weight, bias = torch.randn(1, hidden), torch.ones(hidden), torch.zeros(hidden)
        here = torch.where(source >= 0, torch.arange(count), source)
        assert torch.equal(
            pack_embeddings(got, speech, here, weight, bias, 1e-5),
            pack_embeddings(table, speech, source, weight, bias, 1e-5),
        )
    with pytest.raises(ValueError, match="capacity = 1, but are 2"):
        exchange(torch.tensor([0, 1]), capacity=1)


def test_rows_are_those_of_the_whole_table(tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(run_rank, args=(str(tmp_path / "store"),), nprocs=RANKS)
