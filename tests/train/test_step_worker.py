"""What `benchmarks.step` needs on a GPU, as far as a CPU can show it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import report, step, step_worker
from benchmarks.step_cases import Size, length_rule, make_model, utterances
from benchmarks.step_systems import SYSTEMS
from benchmarks.step_worker import Moved, Spec
from tests.train.test_step_systems import WORDS, llama, wav2vec2, whisper
from train.model import kernels, speech_llm
from train.model.kernels import Packing, Scores, attend

SIZES = {"wav2vec2": Size(wav2vec2, llama, 8), "whisper": Size(whisper, llama, 8)}


def to(module: nn.Module, *wanted: Any) -> nn.Module:
    """`nn.Module.to`, which fake tensors refuse."""
    device, dtype, *_ = torch._C._nn._parse_to(*wanted)

    def moved(t: torch.Tensor) -> torch.Tensor:
        return t.detach().to(device or t.device, dtype if t.is_floating_point() else None)

    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(moved(p), p.requires_grad)
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = moved(b)
    return module


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """Fake tensors can be on a GPU that is not there, and refuse to meet one of the CPU's."""
    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(kernels, "choose", lambda q, scores: "sdpa")
    # Pinned memory and random states are asked of the driver.
    made = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *a, pin_memory=False, **kw: made(*a, **kw))
    monkeypatch.setattr(speech_llm, "drawn_for", lambda *_, **__: nullcontext())
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize("encoder", SIZES)
@pytest.mark.parametrize("name", SYSTEMS)
def test_nothing_of_a_step_stays_on_the_cpu(name: str, encoder: str, fakes: FakeTensorMode) -> None:
    size, kind = SIZES[encoder], SYSTEMS[name]
    sounds = utterances("blsp", 3, size.encoder(), WORDS)
    with fakes:
        model = make_model(size, kind.own_length, torch.float32, "cuda").train()
        system = kind(model, length_rule(size), "cuda")
    where = {
        name: t.device.type
        for part in (model, model.encoder)
        for name, t in (*part.named_parameters(), *part.named_buffers())
    }
    assert set(where.values()) == {"cuda"}, where
    for batch in system.batches(sounds, 3 if kind.unit == "utterances" else 300):
        with fakes:
            assert system.loss(batch, 100).device.type == "cuda"


def test_flex_attention_is_counted_as_products() -> None:
    packing, asked = Packing.of((150, 50)), Scores(0.2, slopes=torch.tensor([0.5, 0.1]))
    q, k, v = torch.randn(3, 1, 2, 200, 32)
    want = attend(q, k, v, packing, asked, "flex")  # makes its mask, too
    with Moved() as moved:
        found = attend(q, k, v, packing, asked, "flex")
    assert moved.bytes == 0
    torch.testing.assert_close(found, want)
    with Moved() as moved:
        q + k
    assert moved.bytes == 3 * q.nbytes


def test_counting_leaves_compiled_what_is_compiled() -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with Moved():
        torch.compile(torch.nn.functional.relu, backend=backend)(torch.ones(2))
    assert len(graphs) == 1


class Roomy(step_worker.Job):
    """A job without a model, whose steps fit up to a size of micro-batch."""

    def __init__(self, spec: Spec, room: int = 8) -> None:
        self.device, self.room = "cpu", room
        self.optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)

    def time(self, knob: int) -> dict[str, Any]:
        if knob > self.room:
            self.optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
            raise torch.OutOfMemoryError(f"tried to allocate {knob} GB\nand more")
        return {"seconds": 1 / knob}


class Here:
    """In place of `step.Worker`'s process: questions are answered on the spot."""

    def __init__(self) -> None:
        self.job = Roomy(SPEC)

    def send(self, question: tuple[str, int]) -> None:
        self.answer = step_worker.answer(self.job, *question)

    def poll(self, seconds: float) -> bool:
        return True

    def recv(self) -> dict[str, Any]:
        return self.answer


SPEC = Spec("greedy", "micro", "blsp", 4, "cpu", "fp32")


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(worker: step.Worker, spec: Spec) -> None:
        worker.spec, worker._here = spec, Here()  # type: ignore[assignment]

    monkeypatch.setattr(step.Worker, "__init__", make)
    monkeypatch.setattr(step.Worker, "close", lambda worker: None)


@pytest.mark.parametrize("knobs", [(4, 2, 8, 16), (32, 16, 8, 4)])
def test_a_micro_batch_that_does_not_fit_is_out(
    knobs: tuple[int, ...], no_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert step.best_knob(SPEC, knobs) == 8
    assert "does not fit: greedy at 16 a micro-batch: tried to allocate 16 GB\n" in (
        capsys.readouterr().out
    )


def test_what_did_not_fit_leaves_no_gradients() -> None:
    job = Roomy(SPEC)
    assert "does_not_fit" in step_worker.answer(job, "time", 16)
    assert job.optimizer.param_groups[0]["params"][0].grad is None


def test_no_micro_batch_fits(no_process: None) -> None:
    with pytest.raises(step.DoesNotFit, match=r"greedy: no size of micro-batch fits, tried \(16,"):
        step.best_knob(SPEC, (16, 32))


def test_a_report_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert report.commit() == "unknown"
