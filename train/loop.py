"""Stage 2: train the adapter, step by step, from wherever the last checkpoint left it."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from data.ledger import Ledger
from train import checkpoint as ckpt
from train import config as cfg
from train import nonfinite
from train.communication import Communication
from train.engine import Engine, World
from train.exhaustion import blamed_on
from train.feed import Feed
from train.loss import counted, mixed
from train.meter import Meter
from train.owner import Owner, Superseded
from train.progress import bar, console
from train.provenance import Sources
from train.schedule import lr_at
from train.stopping import Stopped, StopRequest, stop_requests
from train.tracking import StepTracker, revision
from train.validation import Validation
from train.writing import Checkpoints

if TYPE_CHECKING:
    from data.collate import Batch


@dataclass
class Counts:
    """What one global step held, summed over ranks."""

    loss: float
    """What was descended: the losses by their weights."""
    losses: dict[str, float]
    """Each a mean over what it counts."""
    labels: float
    tokens: float
    seconds: float
    documents: int
    too_long: int = 0
    """Transcripts that do not fit their slots, and so had no CTC loss."""
    skipped: list[dict[str, str]] = field(default_factory=list)
    fault: nonfinite.Fault | None = None
    """Why the update was not made, if it was not."""


def train_step(
    engine: Engine, here: World, batches: list[Batch], lr: float, weights: dict[str, float]
) -> tuple[Counts, float]:
    """One global step on this rank's micro-batches; returns what it held and the gradient norm.

    Args:
        weights: of the losses that the model computes, in its order.
    """
    totals = here.sum(*(sum(counted(b, loss) for b in batches) for loss in weights))
    losses, largest = [], []
    for batch in batches:
        with blamed_on(batch, here.rank):
            sums_K = engine(batch.to(here.device))
            loss = mixed(sums_K, list(weights.values()), totals)
            largest.append(engine.backward(loss, last=batch is batches[-1]))
        losses.append(sums_K.detach())
    *sums, labels, tokens, seconds, documents, too_long = here.sum(
        *torch.stack(losses).double().sum(0).tolist(),
        sum(b.num_labels for b in batches),
        sum(sum(b.lengths) * b.weight for b in batches),
        sum(b.seconds for b in batches),
        sum(len(b.keys) for b in batches),
        sum(b.transcripts.too_long for b in batches if b.transcripts),
    )
    means = {n: s / max(1.0, t) for n, s, t in zip(weights, sums, totals, strict=True)}
    total = sum(weights[name] * mean for name, mean in means.items())
    counts = Counts(total, means, labels, tokens, seconds, int(documents), int(too_long))
    mine = [{"key": s.key, "reason": s.reason} for b in batches for s in b.skipped]
    # Skips are rare; whether there are any is asked with the cheapest of collectives.
    if here.sum(len(mine))[0]:
        counts.skipped = [skip for rank in here.gather(mine) for skip in rank]
    norm, made = engine.step(lr)
    if not made:
        named = [dict(zip(weights, sums_K.tolist(), strict=True)) for sums_K in losses]
        counts.fault = nonfinite.gather(here, batches, named, largest)
    return counts, norm


def check_plan(feed: Feed, epoch: int, section: str = "data") -> None:
    """Raises `ConfigError` where `epoch` has no step: the loop would look for one for ever.

    Args:
        section: of the configuration, which the data is from.
    """
    if feed.stream.steps_in_epoch(epoch):
        return
    reasons = [skip.reason for skip in feed.left_out(epoch)]
    # Alike but for their numbers; the first of each kind is shown.
    kinds = [re.sub(r"\d+(\.\d+)?", "N", reason) for reason in reasons]
    most = Counter(kinds).most_common(3)
    why = "; ".join(f"{count} as {reasons[kinds.index(kind)]!r}" for kind, count in most)
    raise cfg.ConfigError(
        f"{section}: there is nothing to do in epoch {epoch}: {len(reasons)} of "
        f"{len(feed.stream.shards)} samples are left out ({why or 'there are none'}); raise "
        "data.tokens_per_bin, data.seconds_per_bin or data.max_seconds where samples are over it, "
        f"else see that {section}.shards and {section}.targets are the ones you mean"
    )


class Trainer:
    """One run: engine, data, tracker and position, tied together by checkpoints."""

    def __init__(
        self,
        config: cfg.Config,
        here: World,
        engine: Engine,
        feed: Feed,
        found: ckpt.Checkpoint | None,
        tracker: StepTracker | None,
        tracker_run: str,
        validation: Validation | None = None,
        owner: Owner | None = None,
        sources: Sources | None = None,
    ):
        self.config, self.here, self.engine, self.feed = config, here, engine, feed
        self.validation, self.meter, self.owner = validation, Meter(config, here), owner
        self.tracker, self.tracker_run, self.sources = tracker, tracker_run, dict(sources or {})
        every = config.train.communication_every if here.rank == 0 else 0
        self.communication = Communication(every, here.device)
        self.folder = config.run.output / "checkpoints"
        self.step = self.epoch = self.epoch_step = self.trained = 0
        self.skipped: list[dict[str, str]] = []
        self.refused: list[int] = []
        if found is not None:
            state = found.state
            self.step, self.epoch, self.epoch_step = state.step, state.epoch, state.epoch_step
            self.trained, self.skipped = state.trained, list(state.skipped)
            self.refused = list(state.refused)
            if validation is not None:
                validation.history = list(state.validated)
        else:
            self._leave_out(0)
        self._at: Callable[[str], object] = lambda where: None  # tells the watchdog
        self.checkpoints = Checkpoints(
            here, self.folder, config.train.keep, lambda: self._at("waiting for the disk")
        )
        self._ledger: Ledger | None = None
        self._uncommitted: list[dict[str, Any]] = []  # the ledger's lines since the checkpoint
        if config.run.ledger and here.rank == 0:
            self._ledger = Ledger(config.run.output / "ledger.jsonl", {"plan": feed.digest})
            self._ledger.rewind(self.epoch, self.epoch_step)

    def run(self, step_done: Callable[[], None] = lambda: None) -> None:
        """Train until the configured number of steps, over as many epochs as that takes.

        Raises:
            Stopped: a signal asked for it; the checkpoint is written.
            Superseded: the run was started once more; nothing is written.
            NonFinite: more steps than `train.max_nonfinite` were not; see `_refuse`.
            WriteError: a checkpoint could not be written.
        """
        began = time.perf_counter()
        try:
            self._run(step_done)
        finally:
            self.checkpoints.writer.wait()
        if self.here.rank == 0:
            console.print(self.checkpoints.describe(time.perf_counter() - began))

    def _run(self, step_done: Callable[[], None]) -> None:
        total, weights = self.config.train.steps, self.config.losses.weights
        # Rank 0 may have sent pictures to a slow tracker: nobody is watched who waits for that.
        self.here.barrier()
        with (
            bar("train", total, self.step, enabled=self.here.rank == 0) as shown,
            stop_requests() as stop,
            self.here.watched(self.config.train.hang_seconds) as watchdog,
        ):
            self._at = watchdog.at
            while self.step < total and not self._given_up():
                watchdog.at(f"the plan of epoch {self.epoch}")
                check_plan(self.feed, self.epoch)
                began = time.perf_counter()
                for batches in self.feed.steps(self.here, self.epoch, self.epoch_step):
                    watchdog.at(f"step {self.step}")
                    waited = time.perf_counter() - began
                    lr = lr_at(self.step, self.config.train)
                    with self.communication.measured(self.step):
                        counts, norm = train_step(self.engine, self.here, batches, lr, weights)
                    self.meter.count(batches)
                    if counts.fault is not None:
                        self._refuse(counts.fault)
                    self._enter([] if counts.fault else batches)
                    self._after(counts, norm, lr, waited, time.perf_counter() - began)
                    step_done()
                    shown.advance(text=self._line(counts, time.perf_counter() - began))
                    self._stop_if(stop)
                    watchdog.at(f"waiting for the data of step {self.step}")
                    began = time.perf_counter()
                    if self.step == total or self._given_up():
                        break
                else:
                    watchdog.at(f"the plan of epoch {self.epoch + 1}")
                    self.epoch, self.epoch_step = self.epoch + 1, 0
                    self._leave_out(self.epoch)
            if self.step % self.config.train.checkpoint_every:
                self.save()
            self.checkpoints.written()

    def _given_up(self) -> bool:
        """Whether the validation's patience is at its end."""
        return self.validation is not None and self.validation.given_up()

    def _stop_if(self, request: StopRequest) -> None:
        """Stop where any rank was asked to, or a checkpoint has failed. A collective."""
        lost = self.checkpoints.writer.error is not None
        newer = self.owner.taken() if self.owner else None
        asked, failed, taken = self.here.sum(request.by is not None, lost, newer is not None)
        if taken:
            raise Superseded(
                f"{self.config.run.output} was started once more, by {self.here.broadcast(newer)}; "
                f"this start ends after step {self.step} and leaves the run to it"
            )
        if failed:
            self.checkpoints.written()
        if not asked:
            return
        if self.step % self.config.train.checkpoint_every:
            self.save()
        # On all ranks: the launcher ends the others with the first that leaves.
        self.checkpoints.written()
        by = [name for name in self.here.gather(request.by) if name]
        raise Stopped(f"{by[0]} after {self.step} of {self.config.train.steps} steps")

    def _refuse(self, fault: nonfinite.Fault) -> None:
        """Book a step that made no update, or stop where there are too many. A collective.

        Raises:
            NonFinite: naming the samples and the folder that has the step for `train/replay.py`.
            WriteError: it could not be saved.
        """
        self._at(f"saving step {self.step}, which is not finite")
        self.checkpoints.written()
        weights, state = self.engine.weights(), self._state()
        folder = self.config.run.output / "nonfinite"
        path = folder / ckpt.name_of(self.step)
        # As a checkpoint is: the others would else wait for a slow disk in a collective.
        if self.here.rank == 0:
            self.checkpoints.writer.begin(
                str(path), lambda: nonfinite.save(folder, state, weights, fault)
            )
        self.checkpoints.written()
        allowed, what = self.config.train.max_nonfinite, f"step {self.step} is not finite: {fault}"
        if len(self.refused) >= allowed:
            raise nonfinite.NonFinite(
                f"{what}; no update was made. Look at it with `python train/replay.py {path}`; "
                f"train.max_nonfinite is how many such steps are skipped (now {allowed})"
            )
        self.refused.append(self.step)
        about = {"epoch": str(self.epoch), "reason": "its step is not finite"}
        self.skipped += [about | {"key": key, "step": str(self.step)} for key in fault.keys]
        if self.here.rank == 0:
            console.print(f"skipped: {what}; saved in {path}")

    def _after(self, counts: Counts, norm: float, lr: float, waited: float, seconds: float) -> None:
        """Book one finished step: position, skips, metrics, validation, checkpoint."""
        due = (self.step + 1) % self.config.train.checkpoint_every == 0
        validated = {}
        if due and self.validation is not None:
            validated = self.validation.measure(self.engine, self.here, self.step + 1, self._at)
            if self.here.rank == 0:
                console.print(f"validation {self.step + 1}: {validated['validation/loss']:.4f}")
        if self.tracker is not None:
            self.tracker.log(
                self.step,
                {
                    "train/loss": counts.loss,
                    **{f"train/{name}": mean for name, mean in counts.losses.items()},
                    "train/grad_norm": norm,
                    "train/lr": lr,
                    "train/epoch": self.epoch,
                    "data/label_tokens": counts.labels,
                    "data/tokens": counts.tokens,
                    "data/audio_seconds": counts.seconds,
                    "data/skipped": len(self.skipped) + len(counts.skipped),
                    "train/nonfinite": len(self.refused),
                    **({"data/ctc_too_long": counts.too_long} if "ctc" in counts.losses else {}),
                    "perf/tokens_per_second": counts.tokens / seconds,
                    "perf/label_tokens_per_second": counts.labels / seconds,
                    "perf/audio_hours_per_hour": counts.seconds / seconds,
                    **self.meter.figures(seconds),
                    "perf/data_wait_share": waited / seconds,
                    **self.communication.figures(),
                    "perf/step_seconds": seconds,
                    "perf/checkpoint_stall_ms": 1000 * self.checkpoints.stall,
                    **validated,
                },
            )
        self.checkpoints.stall = 0.0
        self._count_skips(counts)
        self.step += 1
        self.epoch_step += 1
        if due:
            self.save()

    def _enter(self, batches: list[Batch]) -> None:
        """Put the step's keys, of all ranks, into the ledger. A collective."""
        if self.config.run.ledger:
            mine = [key for batch in batches for key in batch.keys]
            keys = [key for rank in self.here.gather(mine) for key in rank]
            if self._ledger is not None:
                line = {"epoch": self.epoch, "step": self.epoch_step, "keys": keys}
                self._uncommitted.append(line)

    def _leave_out(self, epoch: int) -> None:
        """Book the samples that no bin of `epoch` can hold."""
        for skip in self.feed.left_out(epoch):
            self.skipped.append({"epoch": str(epoch), "key": skip.key, "reason": skip.reason})
            if self.here.rank == 0:
                console.print(f"skipped {skip.key}: {skip.reason}")

    def _count_skips(self, counts: Counts) -> None:
        self.trained += 0 if counts.fault else counts.documents
        for skip in counts.skipped:
            self.skipped.append({"epoch": str(self.epoch), **skip})
            if self.here.rank == 0:
                console.print(f"skipped {skip['key']}: {skip['reason']}")
        if not counts.skipped:
            return
        # Those of steps that were not finite have a limit of their own.
        bad = [skip for skip in self.skipped if "step" not in skip]
        share = len(bad) / max(1, self.trained + len(self.skipped))
        limit = self.config.data.max_skipped
        # A share of a handful of samples says nothing yet.
        if len(bad) > 10 and share > limit:
            raise cfg.ConfigError(
                f"{len(bad)} samples ({share:.1%}) were skipped for bad content, more "
                f"than data.max_skipped = {limit:.1%}; last: {bad[-1]}"
            )

    def save(self) -> None:
        """Have a checkpoint written; waits for its copy to host memory. A collective."""
        self._at(f"the checkpoint after step {self.step}")
        entered, self._uncommitted = self._uncommitted, []

        def before() -> None:
            if self.tracker is not None:
                self.tracker.sync()
            if self._ledger is not None:  # ahead of a checkpoint it can be rewound
                self._ledger.extend(entered)

        self.checkpoints.save(
            self._state(),
            lambda: (self.engine.weights(), self.engine.moments()),
            self.validation.best() if self.validation else [],
            before,
        )

    def _state(self) -> ckpt.State:
        """Everything but tensors, as it is now."""
        return ckpt.State(
            step=self.step,
            epoch=self.epoch,
            epoch_step=self.epoch_step,
            trained=self.trained,
            plan=self.feed.digest,
            tracker_run=self.tracker_run,
            config=self.config.shown(),
            revision=revision(),
            skipped=list(self.skipped),
            refused=list(self.refused),
            validated=list(self.validation.history) if self.validation else [],
            sources=self.sources,
        )

    def _line(self, counts: Counts, seconds: float) -> str:
        return (
            f"loss {counts.loss:.4f}  "
            f"{counts.tokens / seconds:,.0f} tokens/s  "
            f"{counts.seconds / seconds:.0f}x real time"
        )
