"""How well a running step uses its devices: `perf/` and `system/` metrics beside plain rates."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import psutil
import torch

from train import config as cfg
from train.blueprint import Blueprint
from train.engine import World
from train.flops import Flops, sum_work
from train.model.build import DTYPES
from train.peak import peak_bytes, peak_flops

if TYPE_CHECKING:
    from data.collate import Batch


class Meter:
    """Operations of all ranks' steps, by `train.flops`, over what their devices can at best.

        MFU = useful operations of the step, all ranks / (seconds * peak rate of all ranks)

    Useful is what the batch's own rows cost, padding, recomputation and dummies left out, and
    every frozen weight without the gradient that it does not need. The seconds are the whole
    step's, waiting for data included. A CPU's peak is measured when the run begins.
    """

    def __init__(self, config: cfg.Config, here: World):
        self.here = here
        self._process, self._output = psutil.Process(), config.run.output
        parts = Blueprint.of(config.model, config.losses)
        self._flops = Flops(parts.encoder, parts.adapter, parts.decoder)
        self._flops.stored = bool(config.data.states)
        mine = peak_flops(here.device, DTYPES[config.train.precision])
        # Nothing is said where one of the devices is not known.
        known, total = here.sum(mine is not None, mine or 0.0)
        self._peak = total if known == here.size else None
        self._done = self._memory = 0.0

    def count(self, batches: list[Batch]) -> None:
        """Take in one step's micro-batches of this rank. A collective."""
        work = (self._flops.of(self._flops.useful(batch)) for batch in batches)
        mine = sum_work(part for parts in work for part in parts.values()).total
        peaks = [0.0] * self.here.size
        peaks[self.here.rank] = peak_bytes(self.here.device)
        self._done, *memory = self.here.sum(mine, *peaks)
        self._memory = max(memory)

    def figures(self, seconds: float) -> dict[str, float]:
        """Metrics of the step that `count` has seen."""
        rate = self._done / seconds
        return {
            "perf/teraflops_per_second": rate / 1e12,
            **({"perf/mfu": rate / self._peak} if self._peak else {}),
            "perf/peak_memory_gb": self._memory / 1e9,
            **self._system(),
        }

    def _system(self) -> dict[str, float]:
        """What rank 0's host is doing beside."""
        found = {
            "system/cpu_percent": psutil.cpu_percent(),  # since the step before
            "system/host_memory_percent": psutil.virtual_memory().percent,
            "system/process_memory_gb": self._process.memory_info().rss / 1e9,
            "system/output_free_gb": shutil.disk_usage(self._output).free / 1e9,
        }
        if self.here.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.here.device)
            found["system/gpu_memory_gb"] = (total - free) / 1e9
        return found
