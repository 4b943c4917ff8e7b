from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.ops.oracles import conv_one_by_one, worst
from train.ops import Segments, ragged_conv1d, ragged_conv1d_reference

BLSP: dict[str, Any] = {"stride": 2, "padding": 2}
ACTIVATIONS = ["none", "gelu", "glu"]
# Lengths that are awkward: empty, single, primes, around a tile of 128 rows, empty at the end.
AWKWARD = [5, 0, 1, 17, 127, 129, 2, 257, 0]


def tensors(
    segments: Segments, channels: int, out: int, kernel: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias, all of which want a gradient; sums come out around 1."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(segments.rows, channels), (out, kernel, channels), (out,)]
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    weight /= (kernel * channels) ** 0.5
    return tuple(t.to(dtype).requires_grad_() for t in (x, weight, bias))  # type: ignore[return-value]


def with_grads(function: Any, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """What the function makes, and its gradients for a fixed random vector."""
    y = function(*leaves)
    if not y.requires_grad:  # nothing went in, so nothing comes back
        return [y, *(torch.zeros_like(t) for t in leaves)]
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, grad, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(5, 2, 2), (3, 3, 0), (1, 1, 0), (2, 5, 1), (4, 3, 5)]
)
def test_equals_conv1d_one_by_one(
    impl: Any, activation: Any, padded: bool, kernel: int, stride: int, padding: int
) -> None:
    segments = Segments.padded(AWKWARD, 260) if padded else Segments.packed(AWKWARD)
    leaves = tensors(segments, 7, 6, kernel)
    arguments = {"stride": stride, "padding": padding, "activation": activation}
    found = with_grads(lambda *t: ragged_conv1d(*t, segments, **arguments, impl=impl)[0], leaves)
    truth = with_grads(lambda *t: conv_one_by_one(*t, segments, **arguments), leaves)
    for got, want in zip(found, truth, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=12),
    gap=st.none() | st.integers(0, 5),
    kernel=st.integers(1, 7),
    stride=st.integers(1, 6),
    padding=st.integers(0, 4),
    channels=st.integers(1, 9),
    activation=st.sampled_from(ACTIVATIONS),
    biased=st.booleans(),
)
def test_any_layout(
    lengths: list[int],
    gap: int | None,
    kernel: int,
    stride: int,
    padding: int,
    channels: int,
    activation: Any,
    biased: bool,
) -> None:
    pitch = max(lengths, default=0) + (gap or 0)
    segments = Segments.packed(lengths) if gap is None else Segments.padded(lengths, pitch)
    leaves = tensors(segments, channels, 4, kernel)[: 3 if biased else 2]
    bias = () if biased else (None,)
    arguments = {"stride": stride, "padding": padding, "activation": activation}
    found = with_grads(
        lambda *t: ragged_conv1d(*t, *bias, segments, **arguments, impl="fused")[0], leaves
    )
    truth = with_grads(lambda *t: conv_one_by_one(*t, *bias, segments, **arguments), leaves)
    for got, want in zip(found, truth, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [1] * 1000, [1009]])
def test_edge_layouts(lengths: list[int]) -> None:
    segments = Segments.packed(lengths)
    leaves = tensors(segments, 3, 4, 5)
    found = with_grads(lambda *t: ragged_conv1d(*t, segments, **BLSP, impl="fused")[0], leaves)
    truth = with_grads(lambda *t: conv_one_by_one(*t, segments, **BLSP, activation="none"), leaves)
    for got, want in zip(found, truth, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_not_contiguous() -> None:
    segments = Segments.packed([30, 11])
    x, weight, bias = tensors(segments, 8, 6, 5)
    y, _ = ragged_conv1d(x, weight, bias, segments, **BLSP, impl="fused")
    wide = torch.cat([x, x], 1).detach()
    turned = weight.detach().transpose(1, 2).contiguous().transpose(1, 2)
    for other in (wide[:, :8], wide[:, 8:], x.detach().t().contiguous().t()):
        again, _ = ragged_conv1d(other, turned, bias, segments, **BLSP, impl="fused")
        assert torch.equal(again, y)
    grad = torch.randn(y.shape[1], y.shape[0], dtype=y.dtype).t()
    for got, want in zip(
        torch.autograd.grad(y, (x, weight, bias), grad, retain_graph=True),
        torch.autograd.grad(y, (x, weight, bias), grad.contiguous()),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_rows_beyond_the_segments_are_never_read() -> None:
    segments = Segments.padded([3, 5, 0], 6)
    x, weight, bias = tensors(segments, 4, 6, 5)
    with torch.no_grad():
        for start, length in zip(segments.host_starts, segments.host_lengths, strict=True):
            x[start + length : start + 6] = float("nan")
    for got in with_grads(
        lambda *t: ragged_conv1d(*t, segments, **BLSP, activation="gelu", impl="fused")[0],
        (x, weight, bias),
    ):
        assert got.isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: Any) -> None:
    segments = Segments.padded([4, 0, 7, 1], 8)
    leaves = tensors(segments, 3, 4, 5)
    assert torch.autograd.gradcheck(
        lambda *t: ragged_conv1d(*t, segments, **BLSP, activation=activation, impl="fused")[0],
        leaves,
    )


@pytest.mark.parametrize("activation", [0, 1, 2])
def test_opcheck(activation: int) -> None:
    segments = Segments.padded([4, 0, 7, 1], 8)
    out, groups = segments.conv(5, 2, 2), Segments.packed([2, 0, 4, 1])
    x, weight, bias = tensors(segments, 3, 4, 5, torch.float32)
    plan = (segments.starts, segments.lengths, out.starts, groups.starts)
    torch.library.opcheck(
        torch.ops.hearken.ragged_conv1d.default,
        (x, weight, bias, *plan, out.rows, groups.rows, 2, 2, activation, True),
    )
    grad = torch.randn(out.rows, 2 if activation == 2 else 4)
    sums = torch.randn(out.rows, 4)
    frozen = (x.detach(), weight.detach())
    torch.library.opcheck(
        torch.ops.hearken.ragged_conv1d_backward.default,
        (grad, *frozen, sums, *plan, groups.rows, 2, 2, activation, True, False, True),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_low_precision_errs_at_most_twice_as_much_as_pytorch(
    dtype: torch.dtype, activation: Any
) -> None:
    segments = Segments.packed([300, 7, 129, 64])
    leaves = tensors(segments, 96, 128, 5, dtype)
    arguments = {**BLSP, "activation": activation}
    found = with_grads(lambda *t: ragged_conv1d(*t, segments, **arguments, impl="fused")[0], leaves)
    plain = with_grads(lambda *t: conv_one_by_one(*t, segments, **arguments), leaves)
    exact = tuple(t.detach().double().requires_grad_() for t in leaves)
    truth = with_grads(lambda *t: conv_one_by_one(*t, segments, **arguments), exact)
    # In float32 both err by a few units in the last place, where twice says little.
    slack = 4 * torch.finfo(torch.float32).eps
    for name, got, other, want in zip(
        ("y", "grad_x", "grad_weight", "grad_bias"), found, plain, truth, strict=True
    ):
        assert got.dtype == dtype
        assert worst(got, want) <= 2 * worst(other, want) + slack, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_is_the_same_to_the_last_bit(dtype: torch.dtype) -> None:
    segments = Segments.packed([300, 7, 129, 64])
    leaves = tensors(segments, 64, 96, 5, dtype)
    first, second = (
        with_grads(
            lambda *t: ragged_conv1d(*t, segments, **BLSP, activation="glu", impl="fused")[0],
            leaves,
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_only_where_asked_for() -> None:
    segments = Segments.packed([9, 4])
    leaves = tensors(segments, 3, 4, 5)
    for wanted in product([False, True], repeat=3):
        if not any(wanted):
            continue
        now = [t.detach().requires_grad_(want) for t, want in zip(leaves, wanted, strict=True)]
        y, _ = ragged_conv1d(*now, segments, **BLSP, activation="gelu", impl="fused")
        y.sum().backward()
        assert [t.grad is not None for t in now] == list(wanted)


def test_compiles_whole() -> None:
    segments = Segments.packed([9, 0, 4])
    leaves = tensors(segments, 3, 4, 5, torch.float32)

    def step(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, out = ragged_conv1d(x, weight, bias, segments, **BLSP, activation="glu", impl="fused")
        return y * out.total

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for got, want in zip(with_grads(compiled, leaves), with_grads(step, leaves), strict=True):
        torch.testing.assert_close(got, want)


def test_autocast_and_checkpointing() -> None:
    segments = Segments.packed([9, 0, 4])
    leaves = tensors(segments, 8, 4, 5, torch.float32)

    def step(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ragged_conv1d(x, weight, bias, segments, **BLSP, activation="gelu", impl="fused")[0]

    with torch.autocast("cpu", torch.bfloat16):
        under = with_grads(step, leaves)
    assert under[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in under[1:])
    plain = with_grads(step, leaves)
    again = with_grads(lambda *t: checkpoint(step, *t, use_reentrant=False), leaves)
    for got, want in zip(again, plain, strict=True):
        assert torch.equal(got, want)


def test_a_sequence_does_not_see_its_batch_mates() -> None:
    x, weight, bias = tensors(Segments.packed([40, 13, 25]), 16, 8, 5, torch.float32)
    whole, out = ragged_conv1d(x, weight, bias, Segments.packed([40, 13, 25]), **BLSP, impl="fused")
    alone, _ = ragged_conv1d(x[40:53], weight, bias, Segments.packed([13]), **BLSP, impl="fused")
    start = out.host_starts[1]
    torch.testing.assert_close(whole[start : start + len(alone)], alone, rtol=1e-6, atol=1e-6)


def test_reference_is_what_conv1d_is() -> None:
    """A padded batch of equal lengths is an ordinary nn.Conv1d."""
    segments = Segments.padded([21] * 3, 21)
    x, weight, bias = tensors(segments, 5, 4, 5)
    y, _ = ragged_conv1d_reference(x, weight, bias, segments, **BLSP)
    truth = F.conv1d(x.view(3, 21, 5).transpose(1, 2), weight.transpose(1, 2), bias, **BLSP)
    torch.testing.assert_close(y, truth.transpose(1, 2).reshape(-1, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(13)}, r"x must be \[rows, channels\], but has shape \[13\]"),
        ({"x": torch.zeros(13, 3, dtype=torch.int64)}, "x must be of .*, but is torch.int64"),
        ({"weight": torch.zeros(4, 5, 2)}, r"weight must be .*3.* but has shape \[4, 5, 2\]"),
        ({"weight": torch.zeros(4, 5, 3).bfloat16()}, "weight must be of x's torch.float32"),
        ({"bias": torch.zeros(3)}, r"bias must be \[4\], but has shape \[3\]"),
        ({"segments": Segments.packed([14])}, "segments must fit the 13 rows of x.* 14"),
        ({"stride": 0}, "stride must be at least 1, but is 0"),
        ({"padding": -1}, "padding must not be negative, but is -1"),
        ({"activation": "relu"}, "activation must be one of none, gelu, glu, but is 'relu'"),
        ({"impl": "fast"}, "impl must be one of auto, fused, reference, but is 'fast'"),
        (
            {"weight": torch.zeros(3, 5, 3), "bias": None, "activation": "glu"},
            "even number of channels out for glu, but has 3",
        ),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(13, 3),
        "weight": torch.zeros(4, 5, 3),
        "bias": torch.zeros(4),
        "segments": Segments.packed([9, 4]),
        **BLSP,
    }
    with pytest.raises(ValueError, match=message):
        ragged_conv1d(**{**arguments, **change})


def test_the_op_itself_refuses_what_would_reach_outside() -> None:
    x, weight = torch.zeros(6, 3), torch.zeros(4, 5, 3)
    ints = [torch.tensor(v) for v in ([0], [7], [0], [0])]
    with pytest.raises(RuntimeError, match="segments must lie in the 6 rows of x"):
        torch.ops.hearken.ragged_conv1d(x, weight, None, *ints, 4, 4, 2, 2, 0, False)
    ints[1] = torch.tensor([6])
    with pytest.raises(RuntimeError, match="out_rows must be 3, but is 4"):
        torch.ops.hearken.ragged_conv1d(x, weight, None, *ints, 4, 3, 2, 2, 0, False)
