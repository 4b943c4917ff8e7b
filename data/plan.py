"""The order of training: which samples make each bin of each global step.

A pure function of (shards, costs, seed, epoch, budgets), not of the number of ranks or workers.
Shards are shuffled globally and taken in windows; a window's samples are ordered by length, with
some jitter, and packed into bins; what does not fill a whole global step waits for the next
window; a step whose bins are not of nearly equal cost has its samples dealt anew among them. A
sample's cost is its larger share of the two budgets, LLM tokens and audio seconds, in exact
integers, so that no bin goes over either.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from data.audio import SAMPLE_RATE
from data.draws import draws
from data.packing import best_fit, level

PerEpoch = np.ndarray | Callable[[int], np.ndarray]
_EPOCHS_KEPT = 2
_UNEVEN = 0.01  # a step's fullest bin may exceed the mean by this share of it
_JITTER = 128  # costs are scaled by 1024..1151 / 1024 before sorting: bins differ between epochs


@dataclass(frozen=True)
class _Layout:
    """One epoch: bin b holds samples order[starts[b] : starts[b + 1]]."""

    order: np.ndarray
    starts: np.ndarray


class Plan:
    """Global steps of `bins_per_step` bins each.

    `shard_of` [N] int64 is each sample's shard, not decreasing; `num_samples` [N] int64 its
    length at 16 kHz and `cost_tokens` its LLM positions, or functions of the epoch that give
    them; `refused` are samples to leave out, with the reason. Raises `ValueError` on arguments
    that do not fit.
    """

    def __init__(
        self,
        shard_of: np.ndarray,
        cost_tokens: PerEpoch,
        num_samples: PerEpoch,
        *,
        seed: int,
        tokens_per_bin: int,
        seconds_per_bin: float,
        bins_per_step: int,
        window_shards: int = 16,
        refused: Mapping[int, str] | None = None,
    ):
        sizes = {
            "tokens_per_bin": tokens_per_bin,
            "seconds_per_bin": seconds_per_bin,
            "bins_per_step": bins_per_step,
            "window_shards": window_shards,
        }
        for name, value in sizes.items():
            if value <= 0:
                raise ValueError(f"{name} must be above 0, but is {value}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be within 0 and 2**64 - 1, but is {seed}")
        if (np.diff(shard_of) < 0).any():
            raise ValueError("shard_of must not decrease: samples are numbered shard by shard")
        self.bins_per_step = bins_per_step
        self._seed = seed
        self._tokens_per_bin = tokens_per_bin
        self._samples_per_bin = int(seconds_per_bin * SAMPLE_RATE)
        self._window_shards = window_shards
        self._num_samples = num_samples
        self._cost_tokens = cost_tokens
        self._refused = dict(refused or {})
        edges = np.flatnonzero(np.diff(shard_of)) + 1
        self._shard_starts = np.concatenate([[0], edges, [len(shard_of)]]).astype(np.int64)
        self._layouts: OrderedDict[int, _Layout] = OrderedDict()

    def steps_in_epoch(self, epoch: int) -> int:
        """Global steps of this epoch."""
        return -(-(len(self._layout(epoch).starts) - 1) // self.bins_per_step)

    def step(self, epoch: int, i: int) -> list[np.ndarray]:
        """Sample numbers (int64) per bin of global step i: `bins_per_step` bins.

        Bins of an epoch's last step may be empty. Raises `IndexError` outside of the epoch.
        """
        if not 0 <= i < self.steps_in_epoch(epoch):
            raise IndexError(f"epoch {epoch} has {self.steps_in_epoch(epoch)} steps, asked for {i}")
        layout = self._layout(epoch)
        first = i * self.bins_per_step
        edges = layout.starts[first : first + self.bins_per_step + 1]
        bins = [layout.order[a:b] for a, b in pairwise(edges)]
        return bins + [layout.order[:0]] * (self.bins_per_step - len(bins))

    def iterate(self, epoch: int, start_step: int = 0) -> Iterator[list[np.ndarray]]:
        """The epoch's steps from `start_step` on."""
        for i in range(start_step, self.steps_in_epoch(epoch)):
            yield self.step(epoch, i)

    def skipped(self, epoch: int) -> list[tuple[int, str]]:
        """Samples left out of this epoch, with the reason: refused, or more than a bin holds."""
        tokens = _in_epoch(self._cost_tokens, epoch)
        samples = _in_epoch(self._num_samples, epoch)
        reasons = list(self._refused.items())
        for i in np.flatnonzero(self._costs(epoch) > self._capacity).tolist():
            if i in self._refused:
                continue
            found = [
                f"{kind} {value:g} over the budget of {limit:g} per bin"
                for kind, value, limit in (
                    ("tokens", tokens[i], self._tokens_per_bin),
                    ("seconds", samples[i] / SAMPLE_RATE, self._samples_per_bin / SAMPLE_RATE),
                )
                if value > limit
            ]
            reasons.append((i, ", ".join(found)))
        return sorted(reasons)

    @property
    def _capacity(self) -> int:
        return self._tokens_per_bin * self._samples_per_bin

    def _costs(self, epoch: int) -> np.ndarray:
        """[N] int64 in units where a bin's capacity is tokens_per_bin * samples_per_bin."""
        by_tokens = _in_epoch(self._cost_tokens, epoch) * self._samples_per_bin
        by_seconds = _in_epoch(self._num_samples, epoch) * self._tokens_per_bin
        return np.maximum(1, np.maximum(by_tokens, by_seconds))

    def _layout(self, epoch: int) -> _Layout:
        if epoch not in self._layouts:
            while len(self._layouts) >= _EPOCHS_KEPT:
                self._layouts.popitem(last=False)
            self._layouts[epoch] = self._lay_out(epoch)
        return self._layouts[epoch]

    def _lay_out(self, epoch: int) -> _Layout:
        costs = self._costs(epoch)
        taken = costs <= self._capacity
        taken[list(self._refused)] = False
        bins: list[np.ndarray] = []
        carried = np.empty(0, dtype=np.int64)
        for number, fresh in enumerate(self._windows(epoch)):
            window = np.concatenate([carried, fresh[taken[fresh]]])
            steps, carried = self._pack_window(window, len(carried), costs, epoch, number)
            bins += steps
        # The rest of the epoch: whatever bins it takes, the last step being filled up with none.
        rest, _ = self._pack_window(carried, -1, costs, epoch, len(self._shard_starts))
        bins += rest
        order = np.concatenate(bins) if bins else carried
        return _Layout(order, np.cumsum([0, *map(len, bins)]))

    def _windows(self, epoch: int) -> Iterator[np.ndarray]:
        """Sample numbers of `window_shards` shards at a time, the shards in random order."""
        shards = np.argsort(draws(len(self._shard_starts) - 1, self._seed, epoch, 0), kind="stable")
        for first in range(0, len(shards), self._window_shards):
            window = shards[first : first + self._window_shards].tolist()
            starts = self._shard_starts
            yield np.concatenate([np.arange(starts[s], starts[s + 1]) for s in window])

    def _pack_window(
        self, window: np.ndarray, carried: int, costs: np.ndarray, epoch: int, number: int
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Bins of whole steps, shuffled, and the samples that wait for the next window.

        The first `carried` samples have waited once already; -1: nothing may wait.
        """
        random = draws(len(window) * 2, self._seed, epoch, number + 1)
        noise, random = np.split(random, 2)
        jittered = costs[window] * (1024 + (noise % _JITTER).astype(np.int64))
        # Those that have waited go first, so that the others fill up their bins.
        fresh = np.arange(len(window)) >= carried
        by_length = np.lexsort((noise, -jittered, fresh))
        packed = best_fit(costs[window[by_length]], self._capacity)
        bins = [by_length[items] for items in packed]
        fill = np.array([costs[window[items]].sum() for items in bins], dtype=np.int64)
        waited = np.array([not fresh[items].all() for items in bins], dtype=bool)
        # In front the bins to keep, the fullest first by whole per cents; those of samples that
        # have waited before all others, so that none is put off for ever.
        grade = -(fill * 100 // self._capacity)
        keep = np.lexsort((random[: len(bins)], grade, ~waited))
        # At least one bin waits, the last and emptiest.
        whole = max(0, len(bins) - 1) // self.bins_per_step * self.bins_per_step
        if carried < 0:
            whole = len(bins)
        kept, put_off = keep[:whole], keep[whole:]
        kept = kept[np.argsort(grade[kept], kind="stable")]
        steps = [kept[a : a + self.bins_per_step] for a in range(0, whole, self.bins_per_step)]
        full = whole // self.bins_per_step
        levelled = [_levelled([window[bins[b]] for b in step], costs) for step in steps[:full]]
        shuffled = [levelled[s] for s in np.argsort(random[:full], kind="stable")]
        shuffled += [[window[bins[b]] for b in step] for step in steps[full:]]
        waiting = [window[bins[b]] for b in put_off]
        return [b for step in shuffled for b in step], np.concatenate([window[:0], *waiting])


def _levelled(bins: list[np.ndarray], costs: np.ndarray) -> list[np.ndarray]:
    loads = [int(costs[items].sum()) for items in bins]
    even = max(loads) * len(bins) <= sum(loads) * (1 + _UNEVEN)
    return bins if even else level(costs, bins)


def _in_epoch(values: PerEpoch, epoch: int) -> np.ndarray:
    return np.asarray(values(epoch) if callable(values) else values, dtype=np.int64)


def bins_of(rank: int, world: int, bins: list[np.ndarray]) -> list[tuple[int, np.ndarray]]:
    """A rank's (bin number, samples): ceil(bins / world) of them, filled up with (-1, none)."""
    mine = [(number, bins[number]) for number in range(rank, len(bins), world)]
    return mine + [(-1, bins[0][:0])] * (-(-len(bins) // world) - len(mine))
