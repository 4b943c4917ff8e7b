"""Requests that wait are answered together.

One thread owns the model. It takes the request that waits longest and all that fit beside it, and
generates for them at once; each hands on its tokens as they come, and ends by itself: at its own
end, its own limit, or when nobody listens any more. What comes meanwhile waits for the next batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from train.model.export import HearkenModel, HearkenProcessor
from train.model.export.processing import Row
from train.model.generate import OwnNoise, Sampling
from train.serving.faults import Fault
from train.serving.limits import Limits

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """A request in the queue.

    deadline   of `time.monotonic`
    events     of `loop`: token ids, then "stop" or "length", or a `Fault` in their place
    cancelled  nobody waits for it any more
    """

    row: Row
    max_tokens: int
    temperature: float
    seed: int
    deadline: float
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[int | str | Fault] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    said: int = 0
    ended: bool = False

    def hand(self, event: int | str | Fault) -> None:
        """From the model's thread."""
        self.ended = self.ended or not isinstance(event, int)
        with contextlib.suppress(RuntimeError):  # its loop was closed: nobody waits any more
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def take(self, token: int, ends: Sequence[int]) -> None:
        """The next token of its answer."""
        if token in ends:
            self.hand("stop")
            return
        self.said += 1
        self.hand(token)
        if self.said == self.max_tokens:
            self.hand("length")

    @property
    def over(self) -> bool:
        """Whether there is nothing more to generate for it."""
        return self.ended or self.cancelled or time.monotonic() > self.deadline

    def uniforms(self, count: int) -> np.ndarray:
        """float64 [count]: its own random numbers, whoever is beside it."""
        return np.random.default_rng(self.seed).random(count)


class Batcher:
    """The queue and its thread."""

    def __init__(self, model: HearkenModel, processor: HearkenProcessor, limits: Limits):
        self.model, self.processor, self.limits = model, processor, limits
        found = model.generation_config
        assert found is not None
        self.ends: list[int] = found.eos_token_id
        self.batches: list[int] = []
        """Sizes of the batches so far, the last thousand."""
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """From the event loop's thread."""
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Ends after the batch that is under way; what waits is refused."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    break
                jobs = self._together()
            if jobs:
                self.batches = [*self.batches[-999:], len(jobs)]
                self._answer(jobs)
        for job in self._waiting:
            job.hand(Fault(503, "the server is shutting down"))

    def _together(self) -> list[Job]:
        """The longest waiting, and those behind it that fit: as warm, and not too long."""
        left: deque[Job] = deque()
        taken: list[Job] = []
        for job in self._waiting:
            if job.over:
                continue
            rows = [*taken, job]
            longest = max(len(j.row.ids) + j.max_tokens for j in rows)
            fits = not taken or (
                job.temperature == taken[0].temperature
                and len(rows) <= self.limits.batch
                and len(rows) * longest <= self.limits.batch_positions
            )
            (taken if fits else left).append(job)
        self._waiting = left
        return taken

    def _answer(self, jobs: list[Job]) -> None:
        try:
            self._generate(jobs)
        except Exception:
            if len(jobs) > 1 and not any(job.said for job in jobs):
                for job in jobs:  # one of them may be at fault for all
                    self._answer([job])
                return
            log.exception("a batch of %d failed", len(jobs))
            for job in jobs:
                if not job.ended:
                    job.hand(Fault(500, "the model failed on this request; see the server's log"))

    def _generate(self, jobs: list[Job]) -> None:
        device = self.model.device
        inputs = self.processor.collate([job.row for job in jobs]).to(device)
        longest = max(job.max_tokens for job in jobs)
        noise = []
        if jobs[0].temperature:
            uniforms = np.stack([job.uniforms(longest) for job in jobs])
            noise = [OwnNoise(Sampling(jobs[0].temperature, torch.from_numpy(uniforms)))]
        self.model.generate(
            **inputs,
            max_new_tokens=longest,
            logits_processor=noise,
            streamer=_Hand(jobs, self.ends),
            stopping_criteria=[_Over(jobs)],
        )


class _Hand(BaseStreamer):
    """Hands each row's token to its job."""

    def __init__(self, jobs: list[Job], ends: Sequence[int]):
        self._jobs, self._ends = jobs, ends

    def put(self, value: torch.Tensor) -> None:
        if value.dim() > 1:
            return  # the prompt, of which embeddings have no ids
        for job, token in zip(self._jobs, value.tolist(), strict=True):
            if not job.over:
                job.take(token, self._ends)

    def end(self) -> None:
        pass


class _Over(StoppingCriteria):
    """Ends the rows that nothing is wanted of any more."""

    def __init__(self, jobs: list[Job]):
        self._jobs = jobs

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([job.over for job in self._jobs], device=input_ids.device)
