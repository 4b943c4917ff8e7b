"""Ragged samples into bins of one capacity: full ones, and equal ones."""

import heapq
from bisect import bisect_left, insort

import numpy as np


def best_fit(costs: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack items, in the order given, each into the fullest bin that still has room for it.

    `costs` is [n] int64 within 1..capacity, best about descending: then a bin fills with items of
    like size, and small ones that come late close the gaps. Returns the item numbers per bin.
    """
    smallest = int(costs.min()) if len(costs) else 0
    bins: list[list[int]] = []
    # One sorted list of (room left, bin) as the integer room * n + bin: one comparison each.
    n = max(1, len(costs))
    rooms: list[int] = []
    for item, cost in enumerate(costs.tolist()):
        at = bisect_left(rooms, cost * n)
        if at == len(rooms):
            room, number = capacity, len(bins)
            bins.append([item])
        else:
            room, number = divmod(rooms.pop(at), n)
            bins[number].append(item)
        if room - cost >= smallest:
            insort(rooms, (room - cost) * n + number)
    return bins


def level(costs: np.ndarray, bins: list[np.ndarray]) -> list[np.ndarray]:
    """Deal the items of `bins` anew, the dearest first, each to the emptiest bin (Graham's LPT).

    `costs` [n] int64 is by item number. Returns as many bins, none fuller than the fullest was;
    those given where dealing makes them no more equal.
    """
    items = np.concatenate(bins)
    loads = [(0, number) for number in range(len(bins))]
    dealt: list[list[int]] = [[] for _ in bins]
    for item in items[np.argsort(-costs[items], kind="stable")].tolist():
        load, number = loads[0]
        dealt[number].append(item)
        heapq.heapreplace(loads, (load + int(costs[item]), number))
    fullest = max(int(costs[items].sum()) for items in bins)
    if max(loads)[0] >= fullest:
        return bins
    return [np.array(items, dtype=np.int64) for items in dealt]
