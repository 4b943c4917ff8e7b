"""Rows of an embedding table that is partitioned over ranks, without gathering the table.

Shapes: V rows of the table, H hidden size, P elements of a rank's partition, W ranks,
        T positions asked for.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class RowExchange:
    """This rank's part of a frozen `[V, H]` table, and how to get any rows of all of it.

    The table is cut as ZeRO-3 cuts it: flattened, padded at the end, rank r holding elements
    `[r * P, (r + 1) * P)`; so a row may lie on two ranks. Every rank must ask equally often.
    """

    def __init__(self, partition: Tensor, hidden: int, group: dist.ProcessGroup | None = None):
        """partition: [P], e.g. the `ds_tensor` of a partitioned parameter; copied only where a
        row is cut. Raises ValueError when it is not flat."""
        if partition.dim() != 1:
            raise ValueError(f"partition must be flat, but has shape {list(partition.shape)}.")
        self.group = group
        self.ranks = dist.get_world_size(group)
        first = dist.get_rank(group) * partition.numel()
        self.first_row, cut = divmod(first, hidden)
        behind = -(cut + partition.numel()) % hidden
        if cut or behind:  # missing pieces of rows are zeros, which another rank fills in
            partition = torch.nn.functional.pad(partition, (cut, behind))
        self.rows = partition.view(-1, hidden)

    def __call__(self, ids: Tensor, capacity: int) -> Tensor:
        """ids: int64 [T], negative for no row -> [T, H], zeros where there is none.

        capacity: at least T on every rank, and the same on all, such as the token budget of a
        batch: so that no rank has to ask how much the others want. Raises ValueError when T
        is more.
        """
        if len(ids) > capacity:
            raise ValueError(f"ids must be at most capacity = {capacity}, but are {len(ids)}.")
        asked = ids.new_full((capacity,), -1)
        asked[: len(ids)] = ids
        all_asked = ids.new_empty(self.ranks * capacity)
        dist.all_gather_into_tensor(all_asked, asked, group=self.group)
        local = all_asked - self.first_row
        here = (all_asked >= 0) & (local >= 0) & (local < len(self.rows))
        found = self.rows.index_select(0, local.clamp(0, len(self.rows) - 1))
        found.masked_fill_(~here[:, None], 0)
        received = torch.empty_like(found)
        # As bytes: not every backend knows every dtype.
        dist.all_to_all_single(
            received.view(torch.uint8), found.view(torch.uint8), group=self.group
        )
        # One rank has each element, the others zeros, so this adds nothing up.
        return received.view(self.ranks, capacity, -1)[:, : len(ids)].sum(0)
