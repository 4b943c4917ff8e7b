"""Packed attention's kernels against the plain one, and the choice among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.prompts import Text
from data.sharing import share_prompts
from tests.train.test_packing import World
from train.model import kernels
from train.model.kernels import Packing, Scores, attend

LENGTHS = (1, 7, 131, 64, 2, 300)
HEADS, KV_HEADS, WIDTH = 4, 2, 32
SLOPES = torch.tensor([0.5, 0.25, 0.0625, 0.004])
WANTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "alibi": {"slopes": SLOPES},
    "window": {"window": 33},
    "softcap": {"softcap": 5.0},
    "both ways": {"causal": False},
    "alibi in a window": {"slopes": SLOPES, "window": 50},
}


def inputs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    made = [torch.randn(1, h, total, WIDTH, generator=draw) for h in (HEADS, KV_HEADS, KV_HEADS)]
    return [t.to(device, dtype).requires_grad_() for t in made]


def scores(wanted: str, device: str = "cpu") -> Scores:
    found = dict(WANTED[wanted])
    if "slopes" in found:
        found["slopes"] = found["slopes"].to(device)
    return Scores(0.2, **found)


def one_by_one(q: Any, k: Any, v: Any, asked: Scores) -> torch.Tensor:
    """Every document on its own, every score written out."""
    outs = []
    for q_, k_, v_ in zip(*(t[0].split(LENGTHS, dim=1) for t in (q, k, v)), strict=True):
        k_, v_ = (t.repeat_interleave(HEADS // KV_HEADS, dim=0) for t in (k_, v_))
        score = q_ @ k_.mT * asked.scale
        if asked.softcap:
            score = asked.softcap * torch.tanh(score / asked.softcap)
        at = torch.arange(q_.shape[1], device=q.device)
        behind = at[:, None] - at
        if asked.slopes is not None:
            score = score - asked.slopes[:, None, None].to(score.dtype) * behind
        seen = (behind >= 0) & (behind < (asked.window or len(at)))
        if not asked.causal:
            seen = torch.ones_like(seen)
        outs.append(score.masked_fill(~seen, float("-inf")).softmax(-1) @ v_)
    return torch.cat(outs, dim=1)[None]


def with_grads(function: Any, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, weights)]


@pytest.mark.parametrize("wanted", WANTED)
def test_the_plain_kernel_is_right(wanted: str) -> None:
    asked, packing = scores(wanted), Packing.of(LENGTHS)
    found = with_grads(lambda *t: attend(*t, packing, asked, "sdpa"), inputs())
    for got, want in zip(
        found, with_grads(lambda *t: one_by_one(*t, asked), inputs()), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", WANTED)
def test_flex_attention_is_asked_for_the_same(wanted: str) -> None:
    # On a CPU forward alone, and not compiled: what is tested is the mask and the scores.
    asked, packing = scores(wanted), Packing.of(LENGTHS)
    given = [t.detach() for t in inputs()]
    found = attend(*given, packing, asked, "flex")
    torch.testing.assert_close(found, one_by_one(*given, asked), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", WANTED)
def test_documents_share_what_they_begin_with(wanted: str) -> None:
    # Two of them, and two others, begin alike; one is nothing but that.
    begin = {131: 5, 64: 5, 7: 2, 2: 2}
    texts = [Text(tuple(range(begin.get(n, n)))) for n in LENGTHS]
    starts = np.cumsum([0, *LENGTHS])
    shared = share_prompts([(text,) for text in texts], starts)
    assert shared is not None
    packing = Packing(LENGTHS, torch.from_numpy(starts).int(), shared)
    leaves = [t.detach()[:, :, shared.first].requires_grad_() for t in inputs()]
    assert leaves[0].shape[2] == sum(LENGTHS) - 5 - 2

    def plain(*few: torch.Tensor) -> torch.Tensor:
        out = one_by_one(*(t[:, :, shared.rows] for t in few), scores(wanted))
        return out[:, :, shared.first]

    found = with_grads(lambda *t: attend(*t, packing, scores(wanted), "sdpa"), leaves)
    for got, want in zip(found, with_grads(plain, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_kernel_that_cannot_says_why(tmp_path: Path) -> None:
    packing = Packing.of(LENGTHS)
    for name, why in (("flash_attn", "cuda, not on cpu"), ("varlen", "cuda, not on cpu")):
        with pytest.raises(RuntimeError, match=f"attention: {name} was asked for.*{why}"):
            attend(*inputs(), packing, scores("plain"), name)
    with pytest.raises(RuntimeError, match="flex was asked for, but it has no backward on cpu"):
        attend(*inputs(), packing, scores("plain"), "flex")
    for name in ("alibi", "softcap"):
        with pytest.raises(RuntimeError, match="varlen was asked for, but it has no"):
            attend(*inputs(), packing, scores(name), "varlen")


@pytest.mark.parametrize("llm", ["llama", "bloom"])
def test_the_config_chooses(tmp_path: Path, llm: str) -> None:
    world = World(tmp_path, "wav2vec2", llm, decoder={"attention": "varlen"})
    with pytest.raises(RuntimeError, match="attention: varlen was asked for"):
        world.model(world.pack([2, 3]))


def test_a_cpu_takes_the_plain_kernel() -> None:
    assert kernels.choose(inputs()[0], scores("alibi")) == "sdpa"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("name", ["flash_attn", "varlen", "flex", "sdpa", "auto"])
def test_on_a_gpu_each_errs_at_most_twice_as_much_as_pytorch(
    name: kernels.Name, wanted: str, dtype: torch.dtype
) -> None:
    asked, packing = scores(wanted, "cuda"), Packing.of(LENGTHS, "cuda")
    leaves = inputs(dtype, "cuda")
    if name != "auto" and (why := kernels.KERNELS[name][1](leaves[0], asked)):
        with pytest.raises(RuntimeError, match=why.split(",")[0]):
            attend(*leaves, packing, asked, name)
        return
    found, again = (
        with_grads(lambda *t: attend(*t, packing, asked, name), leaves) for _ in range(2)
    )
    plain = with_grads(lambda *t: one_by_one(*t, asked), leaves)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    truth = with_grads(lambda *t: one_by_one(*t, asked), exact)
    slack = 8 * torch.finfo(torch.float32).eps
    for got, other, want in zip(found, plain, truth, strict=True):
        worst, allowed = ((t.double() - want).abs().max() / want.abs().max() for t in (got, other))
        assert worst <= 2 * allowed + slack
    if name == "flash_attn":  # exact resume rests on it
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.gpu
def test_torch_chooses_flash_attention_where_flash_attn_is_missing() -> None:
    q = inputs(torch.bfloat16, "cuda")[0]
    assert kernels.choose(q, scores("plain", "cuda")) in ("flash_attn", "varlen")
    assert kernels.choose(q, scores("softcap", "cuda")) in ("flash_attn", "flex")
