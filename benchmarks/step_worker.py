"""The process of one system of `benchmarks.step`: builds its model once, then answers.

Questions, each with a size of micro-batch: `time` one step, `peak` of memory in one, `count` what
one moves. A step that takes more memory than the GPU has is answered by `does_not_fit`, and why.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.ops import recycle_memory
from benchmarks.step_cases import RATE, SIZES, length_rule, make_model, utterances
from benchmarks.step_systems import SYSTEMS, System
from train.flops import Flops, Rows, sum_work
from train.model import adapters
from train.peak import peak_bytes, reset_peak, resident_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Spec:
    """What a worker runs."""

    system: str
    size: str
    mix: str
    count: int
    device: str
    precision: str


def work(questions: Connection, spec: Spec) -> None:
    """Answer until the other end is closed."""
    if spec.device == "cpu":
        recycle_memory()
    job = Job(spec)
    while True:
        try:
            question, knob = questions.recv()
        except EOFError:
            return
        questions.send(answer(job, question, knob))


def answer(job: Job, question: str, knob: int) -> dict[str, Any]:
    """What the job says; after running out of memory it is fit for another question."""
    try:
        found: dict[str, Any] = getattr(job, question)(knob)
        return found
    except torch.OutOfMemoryError as e:
        why = str(e).splitlines()[0]
    job.recover()  # outside, where the exception no longer holds the step's tensors
    return {"does_not_fit": why}


class Job:
    def __init__(self, spec: Spec) -> None:
        size, kind = SIZES[spec.size], SYSTEMS[spec.system]
        self.device = spec.device
        model = make_model(size, kind.own_length, DTYPES[spec.precision], spec.device)
        self.system: System = kind(model, length_rule(size), spec.device)
        model.train()
        words = model.decoder.config.vocab_size
        self.utterances = utterances(spec.mix, spec.count, size.encoder(), words)
        self.labels = sum(len(u.answer) for u in self.utterances)
        # Rates of zero: a step of the same cost, and the next one is the same again.
        self.optimizer = torch.optim.AdamW(
            self.system.trained, lr=0.0, weight_decay=0.0, fused=True
        )
        with torch.device("meta"):  # the plain systems have put their own in the model's place
            adapter = adapters.make(
                size.adapter(), model.encoder.width, model.embeddings.table.shape[1]
            )
        self.flops = Flops(model.encoder, adapter, model.decoder)
        self._made: dict[int, list[Any]] = {}
        self.clock = Clock(spec.device)
        parts: dict[str, nn.Module] = {
            "encoder": getattr(self.system, "encoder", model.encoder),
            "adapter": model.adapter,
            "decoder": model.decoder.get_decoder(),
            "head": model.decoder.get_output_embeddings(),
        }
        for name, module in parts.items():
            self.clock.watch(name, module)

    def batches(self, knob: int) -> list[Any]:
        if knob not in self._made:
            self._made[knob] = self.system.batches(self.utterances, knob)
        return self._made[knob]

    def step(self, knob: int) -> float:
        loss = 0.0
        for batch in self.batches(knob):
            with self.clock.part("forward"):
                part = self.system.loss(batch, self.labels)
            with self.clock.part("backward"):
                part.backward()
            loss += part.detach()
        with self.clock.part("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.system.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return float(loss)

    def recover(self) -> None:
        """Let go of what a step that broke off has left."""
        self.optimizer.zero_grad()
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def time(self, knob: int) -> dict[str, Any]:
        self.batches(knob)
        self.clock.reset()
        with self.clock.part("all"):
            loss = self.step(knob)
        parts = self.clock.seconds()
        seconds = parts.pop("all")
        named = sum(parts[name] for name in ("encoder", "adapter", "decoder", "head"))
        parts["joining and loss"] = parts.pop("forward") - named
        return {"seconds": seconds, "parts": parts, "loss": loss}

    def peak(self, knob: int) -> dict[str, Any]:
        gc.collect()
        reset_peak(self.device)
        self.step(knob)
        on_cpu = self.device == "cpu"
        return {"peak": resident_bytes("VmHWM") if on_cpu else peak_bytes(self.device)}

    def count(self, knob: int) -> dict[str, Any]:
        """What one step holds, and what it is counted to cost."""
        batches = self.batches(knob)
        flops = sum_work(w for b in batches for w in self.flops.of(self.system.rows(b)).values())
        with Moved() as moved:
            self.step(knob)
        return {
            "unit": self.system.unit,
            "labels": self.labels,
            "audio": sum(u.samples for u in self.utterances) / RATE,
            "flops": flops.total,
            "useful": self._useful(),
            "bytes": moved.bytes,
        }

    def _useful(self) -> float:
        """Operations of the step if nothing is padded, every clip being heard at its own length:
        the same for all systems."""
        frames = tuple(int(self.system.rule.frames(u.samples)) for u in self.utterances)
        documents = tuple(map(self.system.positions, self.utterances))
        return sum_work(self.flops.of(Rows(frames, frames, documents, self.labels)).values()).total


class Moved(TorchDispatchMode):
    """Bytes that every operation reads and writes, but for products and what only looks anew at
    the same memory. Attention is products, by whichever kernel: FlexAttention comes as an operator
    of higher order, or compiled, when nothing of it comes here."""

    supports_higher_order_operators = True
    _PRODUCTS = (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "ragged_conv1d",
        "_scaled_dot",
        "_varlen_attn",
        "_flash_attn",
        "linear",
    )

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Otherwise what is compiled would run as if it were not, for as long as this counts."""
        return True

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(func, HigherOrderOperator):
            return out
        name = func._schema.name.split("::")[1]
        looks = any(
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        )
        if not looks and not name.startswith(self._PRODUCTS) and not name.startswith("empty"):
            leaves = tree_leaves((args, kwargs, out))
            self.bytes += sum(t.nbytes for t in leaves if isinstance(t, torch.Tensor))
        return out


class Clock:
    """Seconds by part; on a GPU by events, so that nothing waits in between."""

    def __init__(self, device: str) -> None:
        self._gpu = device != "cpu"
        self._marks: dict[str, list[tuple[Any, Any]]] = {}
        self._open: dict[str, Any] = {}

    def reset(self) -> None:
        self._marks = {}

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self, name: str) -> None:
        self._open[name] = self._now()

    def end(self, name: str) -> None:
        self._marks.setdefault(name, []).append((self._open.pop(name), self._now()))

    def part(self, name: str) -> Any:
        return _Part(self, name)

    def watch(self, name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda *_: self.begin(name))
        module.register_forward_hook(lambda *_: self.end(name))

    def seconds(self) -> dict[str, float]:
        if self._gpu:
            torch.cuda.synchronize()
            return {n: sum(a.elapsed_time(b) for a, b in m) / 1000 for n, m in self._marks.items()}
        return {n: sum(b - a for a, b in m) for n, m in self._marks.items()}


class _Part:
    def __init__(self, clock: Clock, name: str) -> None:
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._clock.begin(self._name)

    def __exit__(self, *_: object) -> None:
        self._clock.end(self._name)
