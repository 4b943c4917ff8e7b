"""Adapters: ragged rows against one clip at a time, the papers' sizes, low-rank updates."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from train import config as cfg
from train.model import adapters
from train.model.adapters import ebranchformer
from train.model.adapters.language_head import LanguageHead
from train.model.adapters.spacing import rows_of, spaced, spread
from train.ops import Segments

CHANNELS, HIDDEN = 12, 20

SMALL: dict[str, dict[str, object]] = {
    "conv": {"kind": "conv", "bottleneck": 8},
    "stack_mlp": {"kind": "stack_mlp", "frames": 3, "hidden": 16},
    "ebranchformer": {
        "kind": "ebranchformer", "inputs": 12, "width": 16, "heads": 2, "blocks": 2,
        "feed_forward": 24, "cgmlp": 32, "kernel": 7,
    },
}  # fmt: skip
SMALL["languages"] = SMALL["ebranchformer"] | {
    "blocks": 3, "languages": ["aa", "bb", "cc|dd"], "language_block": 2,
}  # fmt: skip

# Clips far longer than any kernel, and too short for a slot; some that attention pads to another.
LENGTHS = (97, 11, 64, 5, 0, 31, 80, 12, 13, 14)


def settings(**section: object) -> cfg.Adapter:
    model = {"encoder": {"path": "e"}, "decoder": {"path": "d"}, "adapter": section}
    return cfg.Model.model_validate(model).adapter


@pytest.fixture(params=SMALL)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def weighty(kind: str) -> nn.Module:
    """In float64, with every weight large enough to matter."""
    torch.manual_seed(1)
    made = adapters.make(settings(**SMALL[kind]), CHANNELS, HIDDEN).double()
    for p in made.parameters():
        p.data = torch.randn_like(p) * (0.3 if p.dim() < 2 else p[0].numel() ** -0.5)
    return made


@pytest.fixture
def adapter(kind: str) -> nn.Module:
    return weighty(kind)


def slots_of(kind: str, length: int) -> int:
    for conv in adapters.geometry(settings(**SMALL[kind])):
        length = conv.out(length)
    return length


def padded(lengths: tuple[int, ...], pitch: int = 100) -> tuple[torch.Tensor, Segments]:
    """Encoder rows with nothing of use past a clip's end."""
    torch.manual_seed(2)
    return torch.randn(len(lengths) * pitch, CHANNELS, dtype=torch.float64), Segments.padded(
        lengths, pitch
    )


def alone(x_NC: torch.Tensor, segments: Segments, i: int) -> torch.Tensor:
    start, length = segments.host_starts[i], segments.host_lengths[i]
    return x_NC[start : start + length]


def test_a_clip_is_the_same_whoever_is_beside_it(adapter: nn.Module, kind: str) -> None:
    x_NC, segments = padded(LENGTHS)
    together = adapter(x_NC, segments)
    assert together.shape == (sum(slots_of(kind, n) for n in LENGTHS), HIDDEN)
    parts = together.split([slots_of(kind, n) for n in LENGTHS])
    for i, length in enumerate(LENGTHS):
        found = adapter(alone(x_NC, segments, i), Segments.packed([length]))
        torch.testing.assert_close(found, parts[i], rtol=1e-10, atol=1e-10)
    order = (3, 9, 0, 5, 2)
    again = adapter(
        torch.cat([alone(x_NC, segments, i) for i in order]),
        Segments.packed([LENGTHS[i] for i in order]),
    )
    torch.testing.assert_close(again, torch.cat([parts[i] for i in order]), rtol=1e-10, atol=1e-10)


def test_gradients_are_the_sum_of_the_clips_own(adapter: nn.Module, kind: str) -> None:
    x_NC, segments = padded(LENGTHS)
    x_NC.requires_grad_()
    weights = torch.linspace(-1, 1, HIDDEN, dtype=torch.float64)
    params = list(adapter.parameters())
    together = torch.autograd.grad(
        (adapter(x_NC, segments).tanh() * weights).sum(), [x_NC, *params]
    )
    total = [torch.zeros_like(t) for t in (x_NC, *params)]
    for i, length in enumerate(LENGTHS):
        if slots_of(kind, length):
            own = adapter(alone(x_NC, segments, i), Segments.packed([length]))
            for t, g in zip(
                total,
                torch.autograd.grad((own.tanh() * weights).sum(), [x_NC, *params]),
                strict=True,
            ):
                t += g
    for found, expected in zip(together, total, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    # Every parameter takes part.
    assert all(g.abs().max() > 0 for g in together)


def test_bfloat16_is_float32_rounded(kind: str) -> None:
    torch.manual_seed(1)
    made = adapters.make(settings(**SMALL[kind]), CHANNELS, HIDDEN)
    x_NC, segments = padded(LENGTHS)
    exact = made(x_NC.float(), segments)
    found = made.bfloat16()(x_NC.bfloat16(), segments)
    assert found.dtype == torch.bfloat16
    # Some ten layers, each rounded to 8 bits.
    assert (found.float() - exact).norm() < 0.05 * exact.norm()


class PlainEBranchformer:
    """One clip at a time by torch's own layers, written from the papers and sharing no code.

    [T, C] → [slots, H]; attention scores one query at a time, by the distance to each key.
    """

    def __init__(self, made: ebranchformer.EBranchformer, heads: int, width: int):
        self.made, self.heads, self.width = made, heads, width

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        made = self.made
        x = made.project(x)[None, None]
        for conv in made.front:
            x = F.relu(F.conv2d(x, conv.weight, conv.bias, stride=2))
        x = made.embed(x[0].transpose(0, 1).flatten(1)) * math.sqrt(self.width)
        for number, block in enumerate(made.blocks, 1):
            x = self.block(block, x)
            if made.language is not None and number == made.language_block:
                x = x + self.condition(made.language, x)
        x = F.conv1d(made.norm(x).T[None], made.back.weight, made.back.bias, stride=2)
        return made.out(F.relu(x)[0].T)

    def condition(self, head: LanguageHead, x: torch.Tensor) -> torch.Tensor:
        pairs = [x[at : at + 2].T for at in range(0, len(x) - 1, 2)]
        taps = head.pair.weight, head.pair.bias
        seen = [F.relu((taps[0] * pair).sum((1, 2)) + taps[1]) for pair in pairs]
        self.logits = torch.stack([head.tell(y) for y in seen])
        told = [head.condition(row.softmax(-1)) for row in self.logits]
        return torch.stack([told[min(at // 2, len(told) - 1)] for at in range(len(x))])

    def block(self, block: ebranchformer.Block, x: torch.Tensor) -> torch.Tensor:
        x = x + 0.5 * self.feed_forward(block.before, x)
        a = self.attention(block.attend, block.attend_norm(x))
        gate = block.gate
        left, right = F.gelu(gate.up(block.gate_norm(x))).chunk(2, dim=-1)
        b = gate.down(left * self.depthwise(gate.conv, gate.norm(right)))
        both = torch.cat([a, b], dim=-1)
        x = x + block.merge(both + self.depthwise(block.mix, both))
        return block.norm(x + 0.5 * self.feed_forward(block.after, x))

    @staticmethod
    def feed_forward(layer: ebranchformer.FeedForward, x: torch.Tensor) -> torch.Tensor:
        return layer.down(F.silu(layer.up(layer.norm(x))))

    @staticmethod
    def depthwise(layer: ebranchformer.Depthwise, x: torch.Tensor) -> torch.Tensor:
        channels, _, kernel = layer.weight.shape
        conv = nn.Conv1d(channels, channels, kernel, padding="same", groups=channels)
        conv.weight, conv.bias = layer.weight, layer.bias
        return conv(x.T[None])[0].T

    def attention(self, layer: ebranchformer.Attention, x: torch.Tensor) -> torch.Tensor:
        size = self.width // self.heads
        q, k, v = (
            part(x).view(-1, self.heads, size) for part in (layer.query, layer.key, layer.value)
        )
        out = torch.zeros_like(q)
        for i in range(len(x)):
            wave = torch.zeros(len(x), self.width, dtype=x.dtype)
            for j in range(len(x)):
                for c in range(0, self.width, 2):
                    angle = (i - j) / 10_000 ** (c / self.width)
                    wave[j, c], wave[j, c + 1] = math.sin(angle), math.cos(angle)
            p = layer.distance(wave).view(-1, self.heads, size)
            for h in range(self.heads):
                content = k[:, h] @ (q[i, h] + layer.content_bias[h])
                distance = p[:, h] @ (q[i, h] + layer.distance_bias[h])
                shares = ((content + distance) / math.sqrt(size)).softmax(0)
                out[i, h] = shares @ v[:, h]
        return layer.out(out.flatten(1))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ebranchformer", "languages"])
def test_ebranchformer_is_the_plain_one(kind: str) -> None:
    made = weighty(kind)
    assert isinstance(made, ebranchformer.EBranchformer)
    plain = PlainEBranchformer(made, heads=2, width=16)
    x_NC, segments = padded(LENGTHS)
    slots = [slots_of(kind, n) for n in LENGTHS]
    parts = made(x_NC, segments).split(slots)
    if kind == "languages":
        told = made(x_NC, segments, with_languages=True)[1].split(slots)
    for i in range(len(LENGTHS)):
        if slots[i]:
            expected = plain(alone(x_NC, segments, i))
            # The sinusoids are float32's.
            torch.testing.assert_close(parts[i], expected, rtol=1e-4, atol=1e-5)
            if kind == "languages":
                torch.testing.assert_close(told[i], plain.logits, rtol=1e-4, atol=1e-5)


def test_languages_that_cannot_be_are_refused(tmp_path: Path) -> None:
    small = SMALL["languages"]
    for change, reason in (
        ({"language_block": 4}, "language_block must be at most blocks = 3"),
        ({"languages": ["a", "b|a"]}, "language 'a' is in 'a' already"),
        ({"languages": "none.yaml"}, "no YAML list of languages"),
    ):
        with pytest.raises(ValueError, match=reason):
            settings(**small | change)
    (tmp_path / "two.yaml").write_text("[en, 'no']")
    made = settings(**small | {"languages": str(tmp_path / "two.yaml")})
    assert isinstance(made, cfg.EBranchformerAdapter)
    assert made.languages == ("en", "no")


@torch.no_grad()
def test_stack_mlp_is_the_plain_one() -> None:
    made = adapters.make(settings(**SMALL["stack_mlp"]), CHANNELS, HIDDEN).double()
    x = torch.randn(11, CHANNELS, dtype=torch.float64)
    plain = nn.Sequential(made.up, nn.ReLU(), made.out)
    found = made(x, Segments.packed([11]))
    torch.testing.assert_close(found, plain(x[:9].reshape(3, 3 * CHANNELS)))


def count(adapter: cfg.Adapter, channels: int, hidden: int) -> int:
    with torch.device("meta"):
        made = adapters.make(adapter, channels, hidden)
    return sum(p.numel() for p in made.parameters())


def test_papers_sizes() -> None:
    # BLSP: Whisper-small and Llama-2-7B; BLOOMZMMS: MMS-1B and BLOOMZ-7b1.
    assert count(settings(kind="conv"), 768, 4096) == pytest.approx(47.47e6, rel=0.005)
    assert count(settings(kind="ebranchformer"), 1280, 4096) == pytest.approx(534e6, rel=0.005)
    # AZeroS: four frames of 768 channels, Qwen2.5-7B.
    assert count(settings(kind="stack_mlp", frames=4), 768, 3584) == pytest.approx(
        23.8e6, rel=0.005
    )


def test_ebranchformer_makes_6_slots_a_second() -> None:
    frames, slots = 50 * 30, 50 * 30
    for conv in adapters.geometry(settings(kind="ebranchformer")):
        slots = conv.out(slots)
    assert slots == pytest.approx(frames / 8, abs=1)


def seeded(adapter: nn.Module, seed: int) -> Callable[[torch.Tensor, Segments], torch.Tensor]:
    def run(x: torch.Tensor, segments: Segments) -> torch.Tensor:
        torch.manual_seed(seed)
        return adapter(x, segments)

    return run


def test_dropout_and_layerdrop_are_for_training_alone() -> None:
    x_NC, segments = padded(LENGTHS)
    plain = adapters.make(settings(**SMALL["ebranchformer"]), CHANNELS, HIDDEN).double()
    for extra in ({"dropout": 0.5}, {"layerdrop": 0.5}):
        section = settings(**SMALL["ebranchformer"], **extra)
        made = adapters.make(section, CHANNELS, HIDDEN).double()
        made.load_state_dict(plain.state_dict())
        assert torch.equal(made.eval()(x_NC, segments), plain(x_NC, segments))
        made.train()
        found = [seeded(made, seed)(x_NC, segments) for seed in range(8)]
        assert torch.equal(found[3], seeded(made, 3)(x_NC, segments))
        assert any(not torch.equal(found[0], other) for other in found[1:])
        found[0].sum().backward()
        assert all(p.grad is not None for p in made.parameters())


def test_spacing_keeps_clips_apart() -> None:
    clips = spaced([3, 0, 5], torch.device("cpu"), gap=2)
    assert clips.host_starts == (0, 5, 7)
    assert clips.rows == 14
    strided = spaced([3, 0, 5], torch.device("cpu"), multiple=4)
    assert strided.host_starts == (0, 4, 4)
    rows = spread(torch.ones(8, 1), rows_of(clips), clips.rows)
    assert rows.flatten().tolist() == [1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0]
