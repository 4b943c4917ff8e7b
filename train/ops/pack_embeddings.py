"""One packed batch of decoder inputs: text rows from the table, speech rows through LayerNorm.

Shapes: T positions, V rows of the embedding table, R speech rows, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train.ops import library
from train.ops.library import Impl

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def pack_embeddings(
    table: Tensor,
    speech: Tensor,
    source: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Fills every position of a packed batch with its text or its speech row.

    table: [V, H], any floating dtype; gets a gradient only if it asks for one
    speech: [R, H]; LayerNorm over H is applied on the way, in float32 (float64)
    source: int64 [T]; v >= 0 is row v of `table`, v < 0 is row -v - 1 of `speech`. Every speech
        row stands at one position at most (the collator's plan holds this; it is not checked
        here, as that would need the device); a row that stands nowhere gets a zero gradient.
    ln_weight, ln_bias: [H]
    dtype: of the result, the decoder's; `table`'s where None

    Returns [T, H]. Raises ValueError for shapes, dtypes and devices that do not fit,
    RuntimeError when `impl="fused"` is asked for and not built.
    """
    _check(table, speech, source, ln_weight, ln_bias, dtype)
    dtype = table.dtype if dtype is None else dtype
    if not library.use_fused("pack_embeddings", impl, table.device.type):
        return pack_embeddings_reference(
            table, speech, source, ln_weight, ln_bias, eps, dtype=dtype
        )
    packed: Tensor = torch.ops.hearken.pack_embeddings(
        table, speech, source, ln_weight, ln_bias, eps, dtype
    )
    return packed


def pack_embeddings_reference(
    table: Tensor,
    speech: Tensor,
    source: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The plain twin: both rows for every position, then one of them."""
    dtype = table.dtype if dtype is None else dtype
    text_TH = table.index_select(0, source.clamp(min=0)).to(dtype)
    exact = torch.promote_types(speech.dtype, torch.float32)
    normed = F.layer_norm(
        speech.to(exact), speech.shape[1:], ln_weight.to(exact), ln_bias.to(exact), eps
    )
    # One more row, so that there is one to look up even where there is no speech.
    normed = torch.cat([normed, normed.new_zeros(1, speech.shape[1])])
    speech_TH = normed.index_select(0, (-source - 1).clamp(min=0)).to(dtype)
    return torch.where((source >= 0)[:, None], text_TH, speech_TH)


def _check(
    table: Tensor,
    speech: Tensor,
    source: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    dtype: torch.dtype | None,
) -> None:
    if table.dim() != 2:
        raise ValueError(f"table must be [vocabulary, hidden], but has shape {list(table.shape)}.")
    hidden = table.shape[1]
    if speech.dim() != 2 or speech.shape[1] != hidden:
        raise ValueError(
            f"speech must be [rows, {hidden}] as table has {hidden} columns, "
            f"but has shape {list(speech.shape)}."
        )
    if source.dim() != 1 or source.dtype != torch.int64:
        raise ValueError(
            f"source must be int64 [positions], but is {source.dtype} {list(source.shape)}."
        )
    for name, tensor in (("ln_weight", ln_weight), ("ln_bias", ln_bias)):
        if tensor.shape != (hidden,):
            raise ValueError(f"{name} must be [{hidden}], but has shape {list(tensor.shape)}.")
    for name, tensor in (
        ("table", table),
        ("speech", speech),
        ("ln_weight", ln_weight),
        ("ln_bias", ln_bias),
    ):
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be of {', '.join(map(str, DTYPES))}, not {tensor.dtype}."
            )
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, but is {dtype}.")
    for name, tensor in (
        ("speech", speech),
        ("source", source),
        ("ln_weight", ln_weight),
        ("ln_bias", ln_bias),
    ):
        if tensor.device != table.device:
            raise ValueError(f"{name} must be on table's {table.device}, not on {tensor.device}.")


def _fake(
    table: Tensor,
    speech: Tensor,
    source: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    return table.new_empty(source.shape[0], table.shape[1], dtype=dtype)


def _fake_backward(
    grad: Tensor,
    table: Tensor,
    speech: Tensor,
    source: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    need_table: bool,
    need_speech: bool,
    need_ln: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        table.new_empty(table.shape if need_table else (0,)),
        speech.new_empty(speech.shape if need_speech else (0,)),
        ln_weight.new_empty(ln_weight.shape if need_ln else (0,)),
        ln_bias.new_empty(ln_bias.shape if need_ln else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.eps = inputs[5]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    table, speech, _, weight, bias = ctx.needs_input_grad[:5]
    grad_table, grad_speech, grad_weight, grad_bias = torch.ops.hearken.pack_embeddings_backward(
        grad, *ctx.saved_tensors, ctx.eps, table, speech, weight or bias
    )
    return (
        grad_table if table else None,
        grad_speech if speech else None,
        None,
        grad_weight if weight else None,
        grad_bias if bias else None,
        None,
        None,
    )


if library.missing("cpu") is None:
    torch.library.register_fake("hearken::pack_embeddings", _fake)
    torch.library.register_fake("hearken::pack_embeddings_backward", _fake_backward)
    torch.library.register_autograd(
        "hearken::pack_embeddings", _backward, setup_context=_setup_context
    )
