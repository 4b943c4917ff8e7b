from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.ops.oracles import pack_one_by_one, worst
from train.ops import pack_embeddings

EPS = 1e-5
NAMES = ("table", "speech", "ln_weight", "ln_bias")


def plan(text: int, heard: int, vocabulary: int, rows: int, seed: int = 0) -> Tensor:
    """`text` table rows and `heard` of the `rows` speech rows, in any order."""
    draw = random.Random(seed)
    source = [draw.randrange(vocabulary) for _ in range(text)]
    source += [-1 - row for row in draw.sample(range(rows), heard)]
    draw.shuffle(source)
    return torch.tensor(source, dtype=torch.int64)


def tensors(
    vocabulary: int, rows: int, hidden: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """table, speech, ln_weight and ln_bias, all of which want a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(vocabulary, hidden), (rows, hidden), (hidden,), (hidden,)]
    return tuple(
        torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes
    )


def with_grads(
    function: Any, leaves: tuple[Tensor, ...], source: Tensor, **kw: Any
) -> list[Tensor]:
    table, speech, ln_weight, ln_bias = leaves
    y = function(table, speech, source, ln_weight, ln_bias, EPS, **kw)
    if not y.requires_grad:  # nothing went in, so nothing comes back
        return [y, *(torch.zeros_like(t) for t in leaves)]
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    wanted = [t for t in leaves if t.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, grad, allow_unused=True, materialize_grads=True)]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    text=st.integers(0, 30),
    rows=st.integers(0, 20),
    share=st.floats(0, 1),
    hidden=st.sampled_from([1, 2, 5, 16, 33]),
    impl=st.sampled_from(["fused", "reference"]),
    seed=st.integers(0, 1000),
)
def test_any_layout(text: int, rows: int, share: float, hidden: int, impl: Any, seed: int) -> None:
    source = plan(text, int(share * rows), 7, rows, seed)
    leaves = tensors(7, rows, hidden)
    found = with_grads(pack_embeddings, leaves, source, impl=impl)
    truth = with_grads(pack_one_by_one, leaves, source, dtype=torch.float64)
    for got, want in zip(found, truth, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize(
    ("text", "heard", "rows"), [(0, 0, 0), (0, 0, 5), (9, 0, 0), (9, 0, 5), (0, 5, 5), (1, 1, 1)]
)
def test_edge_layouts(impl: Any, text: int, heard: int, rows: int) -> None:
    source = plan(text, heard, 7, rows)
    leaves = tensors(7, rows, 24)
    found = with_grads(pack_embeddings, leaves, source, impl=impl)
    truth = with_grads(pack_one_by_one, leaves, source, dtype=torch.float64)
    for got, want in zip(found, truth, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_every_mix_of_dtypes(impl: Any) -> None:
    source = plan(20, 6, 11, 9)
    exact = tensors(11, 9, 32)
    kinds = [torch.float32, torch.bfloat16, torch.float16]
    for table_dtype in kinds:
        for speech_dtype in kinds:
            for dtype in kinds:
                table = exact[0].detach().to(table_dtype)
                others = [t.detach().to(speech_dtype) for t in exact[1:]]
                y = pack_embeddings(
                    table, others[0], source, *others[1:], EPS, dtype=dtype, impl=impl
                )
                truth = pack_one_by_one(
                    table.double(),
                    others[0].double(),
                    source,
                    *(t.double() for t in others[1:]),
                    EPS,
                    dtype=torch.float64,
                )
                assert y.dtype == dtype
                assert worst(y, truth) < 2 * torch.finfo(dtype).eps + 1e-6


def test_gradcheck() -> None:
    source = plan(6, 4, 5, 6)
    leaves = tensors(5, 6, 4)
    assert torch.autograd.gradcheck(
        lambda t, s, w, b: pack_embeddings(t, s, source, w, b, EPS, impl="fused"), leaves
    )


def test_opcheck() -> None:
    source = plan(6, 4, 5, 6)
    table, speech, ln_weight, ln_bias = tensors(5, 6, 8, torch.float32)
    for now in (table, table.detach()):
        torch.library.opcheck(
            torch.ops.hearken.pack_embeddings.default,
            (now, speech, source, ln_weight, ln_bias, EPS, torch.float32),
        )
    frozen = [t.detach() for t in (table, speech, ln_weight, ln_bias)]
    torch.library.opcheck(
        torch.ops.hearken.pack_embeddings_backward.default,
        (torch.randn(10, 8), *frozen[:2], source, *frozen[2:], EPS, True, False, True),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_errs_at_most_twice_as_much_as_pytorch(dtype: torch.dtype) -> None:
    source = plan(200, 150, 50, 160)
    leaves = tensors(50, 160, 96, dtype)
    found = with_grads(pack_embeddings, leaves, source, impl="fused")
    plain = with_grads(pack_one_by_one, leaves, source, dtype=dtype)
    exact = tuple(t.detach().double().requires_grad_() for t in leaves)
    truth = with_grads(pack_one_by_one, exact, source, dtype=torch.float64)
    slack = 4 * torch.finfo(torch.float32).eps
    for name, got, other, want in zip(("y", *NAMES), found, plain, truth, strict=True):
        assert got.dtype == dtype
        assert worst(got, want) <= 2 * worst(other, want) + slack, name


def test_backward_is_the_same_to_the_last_bit_on_any_number_of_threads() -> None:
    source = plan(500, 300, 20, 310)
    leaves = tensors(20, 310, 48, torch.bfloat16)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            runs.append(with_grads(pack_embeddings, leaves, source, impl="fused"))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_unused_speech_rows_get_a_zero_gradient() -> None:
    source = torch.tensor([2, -3, 0])
    leaves = tensors(5, 4, 8)
    grad_speech = with_grads(pack_embeddings, leaves, source, impl="fused")[2]
    assert grad_speech[[0, 1, 3]].eq(0).all()
    assert grad_speech[2].ne(0).any()


def test_a_frozen_table_costs_no_gradient() -> None:
    table, *others = tensors(5, 4, 8)
    table = table.detach()
    y = pack_embeddings(table, others[0], torch.tensor([1, -1]), *others[1:], EPS, impl="fused")
    y.sum().backward()
    assert table.grad is None
    assert all(t.grad is not None for t in others)


def test_not_contiguous() -> None:
    source = plan(20, 6, 11, 9)
    leaves = tensors(11, 9, 8)
    y = with_grads(pack_embeddings, leaves, source, impl="fused")
    turned = tuple(
        t.detach().t().contiguous().t().requires_grad_() if t.dim() == 2 else t for t in leaves
    )
    spread = torch.stack([source, source], 1)[:, 0]
    for got, want in zip(with_grads(pack_embeddings, turned, spread, impl="fused"), y, strict=True):
        assert torch.equal(got, want)


def test_compiles_whole_and_checkpoints() -> None:
    source = plan(6, 4, 5, 6)
    leaves = tensors(5, 6, 8, torch.float32)

    def step(*arguments: Any) -> Tensor:
        return pack_embeddings(*arguments, dtype=torch.bfloat16, impl="fused")

    plain = with_grads(step, leaves, source)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    remade = with_grads(lambda *a: checkpoint(step, *a, use_reentrant=False), leaves, source)
    for run in (with_grads(compiled, leaves, source), remade):
        assert all(torch.equal(a, b) for a, b in zip(run, plain, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.zeros(5)}, r"table must be \[vocabulary, hidden\]"),
        ({"speech": torch.zeros(3, 7)}, r"speech must be \[rows, 8\] .* has shape \[3, 7\]"),
        ({"source": torch.zeros(2)}, "source must be int64 .* is torch.float32"),
        ({"ln_bias": torch.zeros(7)}, r"ln_bias must be \[8\], but has shape \[7\]"),
        ({"ln_weight": torch.zeros(8, dtype=torch.int32)}, "ln_weight must be of .*torch.int32"),
        ({"dtype": torch.int8}, "dtype must be one of .*, but is torch.int8"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "table": torch.zeros(5, 8),
        "speech": torch.zeros(3, 8),
        "source": torch.zeros(2, dtype=torch.int64),
        "ln_weight": torch.zeros(8),
        "ln_bias": torch.zeros(8),
        "eps": EPS,
    }
    with pytest.raises(ValueError, match=message):
        pack_embeddings(**{**arguments, **change})


@pytest.mark.parametrize("value", [5, -4])
def test_a_row_that_does_not_exist_is_named(value: int) -> None:
    leaves = tensors(5, 3, 8)
    with pytest.raises(RuntimeError, match=rf"source\[1\] must be in \[-3, 5\), but is {value}"):
        pack_embeddings(*leaves[:2], torch.tensor([0, value]), *leaves[2:], EPS, impl="fused")


def test_a_speech_row_used_twice_is_named() -> None:
    leaves = tensors(5, 3, 8)
    y = pack_embeddings(*leaves[:2], torch.tensor([-2, 0, -2]), *leaves[2:], EPS, impl="fused")
    with pytest.raises(RuntimeError, match="row 1 stands at positions 0 and 2"):
        y.sum().backward()
