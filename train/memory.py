"""What a rank holds and sends, in bytes, from counts of parameters and DeepSpeed's policy.

Weights are in the run's precision; gradients, masters and moments are float32 (4, 4 and 2 x 4
bytes for each trained parameter). Stage 1 partitions the optimizer over the ranks, stage 2 the
gradients, too, stage 3 the decoder's and the trained weights, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from train import config as cfg

SIZE = {"bf16": 2, "fp32": 4}

_FLOAT32 = 4
# DeepSpeed's own, where its file does not say.
_BUCKET, _LIVE = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class Counts:
    """Parameters of a run: trained ones, frozen ones, and of these the table of text embeddings
    and the decoder's linear layers but for its head."""

    trained: int
    encoder: int
    decoder: int
    table: int
    linear: int = 0


class Plan:
    """Bytes of one rank of `ranks`.

    Args:
        policy: DeepSpeed's file (see `train.engine.policy`).
    """

    def __init__(self, config: cfg.Config, policy: dict[str, Any], counts: Counts, ranks: int):
        self.config, self.counts, self.ranks = config, counts, ranks
        self.size = SIZE[config.train.precision]
        self.zero: dict[str, Any] = policy["zero_optimization"]
        self.stage = int(self.zero["stage"])

    def held(self) -> dict[str, dict[str, int]]:
        """What stays from step to step, by part and kind; what is offloaded is left out."""
        counts, size = self.counts, self.size
        whole = self.config.model.decoder.table == "whole"
        whole = whole and self.config.model.decoder.train == "none"
        sharded = self.config.model.encoder.sharded and self.stage == 3
        weights_away = self._offloaded("offload_param")
        optimizer_away = self._offloaded("offload_optimizer")
        decoder = counts.decoder * size
        if self.config.model.decoder.eight_bit:
            decoder -= counts.linear * (size - 1)
        return {
            "parameters": {
                "decoder, frozen": 0 if weights_away else self._share(decoder, 3),
                "encoder, frozen": self._share(counts.encoder * size, 3 if sharded else 4),
                "text embeddings": counts.table * size * whole,
                "trained": 0 if weights_away else self._share(counts.trained * size, 3),
            },
            "gradients": {
                "float32": 0 if optimizer_away else self._share(counts.trained * _FLOAT32, 2),
            },
            "optimizer": {
                "masters and moments, float32": 0
                if optimizer_away
                else self._share(counts.trained * 3 * _FLOAT32, 1),
            },
        }

    def buffers(self) -> dict[str, int]:
        """What collectives hold: the bucket of gradients, and weights while they are whole."""
        bucket = int(self.zero.get("reduce_bucket_size", _BUCKET)) * _FLOAT32
        if self.stage < 3:
            return {"bucket of gradients": min(bucket, self.counts.trained * _FLOAT32)}
        live = int(self.zero.get("stage3_max_live_parameters", _LIVE))
        live = min(live, self.counts.decoder + self.counts.trained) * (self.ranks > 1)
        return {"bucket of gradients": bucket, "gathered weights": live * self.size}

    def moved(self, micro_batches: int) -> dict[str, int]:
        """What a rank receives in one step of so many micro-batches."""
        counts, size = self.counts, self.size
        others = (self.ranks - 1) / self.ranks
        if self.stage == 3:
            # Once forward and once backward; the frozen text embeddings are not asked for. Layers
            # that are run again are gathered for that, and held for their backward.
            return {
                "weights": round(2 * (counts.decoder + counts.trained) * size * others)
                * micro_batches,
                "gradients": round(counts.trained * _FLOAT32 * others) * micro_batches,
            }
        # All-reduced in two halves; partitioned updates are then gathered.
        times = 2 if self.stage < 2 else 1
        gathered = counts.trained * size if self.stage else 0
        return {
            "weights": round(gathered * others),
            "gradients": round(times * counts.trained * _FLOAT32 * others),
        }

    def _share(self, size: int, from_stage: int) -> int:
        """Bytes on one rank of what is partitioned from a stage on."""
        return math.ceil(size / self.ranks) if self.stage >= from_stage else size

    def _offloaded(self, what: str) -> bool:
        return self.zero.get(what, {}).get("device", "none") != "none"


def total(held: dict[str, dict[str, int]]) -> int:
    return sum(sum(kinds.values()) for kinds in held.values())
