"""What only a GPU can show; run by benchmarks/gpu.sh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.oracles import conv_one_by_one, pack_one_by_one, worst
from tests.ops.test_pack_embeddings import plan
from train.ops import Segments, library, pack_embeddings, ragged_conv1d

pytestmark = pytest.mark.gpu

BLSP: dict[str, Any] = {"stride": 2, "padding": 2}
LENGTHS = [300, 7, 0, 1009, 129, 64]


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    made = [torch.randn(shape, device="cuda", generator=generator) for shape in shapes]
    return [t.to(dtype).requires_grad_() for t in made]


def with_grads(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    y = function(*inputs)
    generator = torch.Generator("cuda").manual_seed(1)
    grad = torch.randn(y.shape, device="cuda", generator=generator).to(y.dtype)
    return [y, *torch.autograd.grad(y, inputs, grad)]


def test_the_library_is_there() -> None:
    assert library.missing("cuda") is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", ["none", "gelu", "glu"])
def test_conv_errs_at_most_twice_as_much_as_pytorch(dtype: torch.dtype, activation: Any) -> None:
    segments = Segments.packed(LENGTHS, "cuda")
    inputs = leaves((segments.rows, 256), (384, 5, 256), (384,), dtype=dtype)
    inputs[1].data /= (5 * 256) ** 0.5
    arguments = {**BLSP, "activation": activation}
    found, again = (
        with_grads(lambda *t: ragged_conv1d(*t, segments, **arguments, impl="fused")[0], inputs)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    plain = with_grads(lambda *t: conv_one_by_one(*t, segments, **arguments), inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = with_grads(lambda *t: conv_one_by_one(*t, segments, **arguments), exact)
    slack = 4 * torch.finfo(torch.float32).eps
    for got, other, want in zip(found, plain, truth, strict=True):
        assert worst(got, want) <= 2 * worst(other, want) + slack


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pack_errs_at_most_twice_as_much_as_pytorch(dtype: torch.dtype) -> None:
    source = plan(700, 500, 50, 520).cuda()
    inputs = leaves((50, 1024), (520, 1024), (1024,), (1024,), dtype=dtype)

    def ours(table: Tensor, speech: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return pack_embeddings(table, speech, source, weight, bias, 1e-5, impl="fused")

    def plain(table: Tensor, speech: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return pack_one_by_one(table, speech, source, weight, bias, 1e-5, table.dtype)

    found, again = (with_grads(ours, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    other = with_grads(plain, inputs)
    truth = with_grads(plain, [t.detach().double().requires_grad_() for t in inputs])
    slack = 4 * torch.finfo(torch.float32).eps
    for got, theirs, want in zip(found, other, truth, strict=True):
        assert worst(got, want) <= 2 * worst(theirs, want) + slack


def test_no_step_waits_for_the_device() -> None:
    inputs = leaves((sum(LENGTHS), 64), (128, 5, 64), (128,), dtype=torch.bfloat16)
    table, speech, weight, bias = leaves(
        (50, 128), (755, 128), (128,), (128,), dtype=torch.bfloat16
    )
    source = plan(100, 50, 50, 755).cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        segments = Segments.packed(LENGTHS, "cuda")
        y, _ = ragged_conv1d(*inputs, segments, **BLSP, activation="gelu", impl="fused")
        packed = pack_embeddings(table, speech, source, weight, bias, 1e-5, impl="fused")
        (y.sum() + packed.sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream() -> None:
    segments = Segments.packed(LENGTHS, "cuda")
    inputs = leaves((segments.rows, 64), (128, 5, 64), (128,), dtype=torch.bfloat16)
    y, _ = ragged_conv1d(*inputs, segments, **BLSP, impl="fused")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late = inputs[0] * 1  # is there only when the sleep is over
        again, _ = ragged_conv1d(late, *inputs[1:], segments, **BLSP, impl="fused")
    stream.synchronize()
    assert torch.equal(again, y)


def test_more_than_two_to_the_31_elements() -> None:
    rows, channels = 1_100_000, 2048  # 2.25e9 elements, 4.5 GB
    segments = Segments.packed([rows - 100, 100], "cuda")
    x = torch.randn(rows, channels, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(16, 3, channels, device="cuda", dtype=torch.bfloat16) / 80
    y, out = ragged_conv1d(x, weight, None, segments, stride=2, padding=1, impl="fused")
    tail = ragged_conv1d(
        x[-100:].clone(),
        weight,
        None,
        Segments.packed([100], "cuda"),
        stride=2,
        padding=1,
        impl="fused",
    )[0]
    torch.testing.assert_close(y[out.host_starts[1] :], tail)
    source = torch.arange(-1, -1 - rows, -1, device="cuda")
    ones = torch.ones(channels, device="cuda", dtype=torch.bfloat16)
    packed = pack_embeddings(x[:1], x, source, ones, ones * 0, 1e-5, impl="fused")
    last = torch.nn.functional.layer_norm(x[-1:].float(), (channels,))
    torch.testing.assert_close(packed[-1:].float(), last, rtol=2e-2, atol=2e-2)
