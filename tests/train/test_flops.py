"""Operations as `train.flops` counts them, against torch's own counter on real passes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from data.collate import Clip, Sample, collate, dummy_batch
from data.prompts import Speech, Text
from train import config as cfg
from train.flops import Flops, Rows, Work
from train.model import adapters
from train.model.encoder import SpeechEncoder
from train.model.lora import add_lora
from train.ops import Segments

WIDTH, WORDS = 96, 200

DECODERS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32},
    "bloom": {"n_layer": 3, "n_head": 4},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "whisper": {
        "d_model": 64, "encoder_layers": 12, "encoder_attention_heads": 4, "encoder_ffn_dim": 128,
        "decoder_layers": 1, "decoder_attention_heads": 4, "num_mel_bins": 16,
        "max_source_positions": 100,
    },
    "wav2vec2": {
        "hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 4,
        "intermediate_size": 128, "num_conv_pos_embedding_groups": 4,
        "num_conv_pos_embeddings": 17, "conv_dim": (32,) * 3, "conv_kernel": (10, 8, 4),
        "conv_stride": (8, 8, 5), "do_stable_layer_norm": True, "feat_extract_norm": "layer",
    },
}  # fmt: skip


def decoder(kind: str = "llama") -> Any:
    shape = {
        "hidden_size": WIDTH, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 4, "vocab_size": WORDS, "tie_word_embeddings": kind == "bloom",
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **shape | DECODERS[kind])
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return made.requires_grad_(False)


def encoder(kind: str = "whisper", **settings: Any) -> SpeechEncoder:
    config = AutoConfig.for_model(kind, **ENCODERS[kind])
    model = AutoModel.from_config(config, attn_implementation="eager")
    return SpeechEncoder(model, cfg.Encoder(path="random", **settings))


def adapter(kind: str = "conv", **settings: Any) -> nn.Module:
    made = {
        "conv": cfg.ConvAdapter,
        "stack_mlp": cfg.StackMLPAdapter,
        "ebranchformer": cfg.EBranchformerAdapter,
    }[kind]
    return adapters.make(made(kind=kind, **settings), 64, WIDTH, "reference")


def convolved_back(grad: Any, x: Any, weight: Any, *others: Any, **_: Any) -> int:
    """Torch's own count takes a depthwise convolution for a dense one."""
    return 2 * math.prod(grad) * math.prod(weight[1:]) * sum(others[-1][:2])


def counted(forward: Any) -> Work:
    """Operations of a forward and of the backward of its result's sum, by torch's counter."""
    mended = {torch.ops.aten.convolution_backward: convolved_back}
    # Of attention's kernels torch counts the plain one as it is; a CPU's own it does not know.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as first:
        out = forward()
    with FlopCounterMode(display=False, custom_mapping=mended) as second:
        if out.requires_grad:
            out.sum().backward()
    return Work(first.get_total_flops(), second.get_total_flops())


def assert_close(found: Work, real: Work, rel: float = 0.01) -> None:
    assert found.forward == pytest.approx(real.forward, rel=rel)
    assert found.backward == pytest.approx(real.backward, rel=rel)


def whole_square(flops: Flops, length: int) -> Work:
    """Decoder and head of one document whose attention computes every pair, as eager does."""
    alone = flops.of(Rows((), (), (1,) * length, length))
    causal = flops.of(Rows((), (), (length,), length))
    half = causal["decoder"] + alone["decoder"].times(-1)
    return alone["decoder"] + half.times(2) + alone["head"]


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("trained", ["none", "lora", "full"])
def test_decoder(kind: str, trained: str) -> None:
    llm, length = decoder(kind), 64
    if trained == "lora":
        add_lora(llm, cfg.LoRA(rank=8), "model.decoder.lora")
    llm.requires_grad_(trained == "full") if trained != "lora" else None
    inputs = torch.randn(1, length, WIDTH, requires_grad=True)
    real = counted(lambda: llm(inputs_embeds=inputs, use_cache=False).logits)
    assert_close(whole_square(Flops(encoder(), adapter(), llm), length), real)


def test_a_frozen_decoder_costs_four_operations_a_weight() -> None:
    llm = decoder()
    layers = sum(p.numel() for p in llm.get_decoder().layers.parameters() if p.dim() == 2)
    found = Flops(encoder(), adapter(), llm).of(Rows((), (), (1,) * 10, 3))
    pairs = 10 * 3 * WIDTH * 4
    assert found["decoder"] == Work(20 * layers + pairs, 20 * layers + 2 * pairs)
    assert found["head"] == Work(6 * WIDTH * WORDS, 6 * WIDTH * WORDS)


def test_a_window_hides_what_is_far() -> None:
    llm = decoder()
    llm.config.sliding_window, llm.config.layer_types = (
        4,
        ["sliding_attention", "full_attention"] * 2,
    )
    flops = Flops(encoder(), adapter(), llm)
    pairs = flops.of(Rows((), (), (10,), 0))["decoder"].forward
    pairs -= flops.of(Rows((), (), (1,) * 10, 0))["decoder"].forward - 4 * 3 * WIDTH * 10
    seen = [sum(min(i + 1, window) for i in range(10)) for window in (4, 10)]
    assert pairs == pytest.approx(4 * 3 * WIDTH * sum(seen) / 2)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("lora", [None, {"rank": 8}])
def test_encoder(kind: str, lora: dict[str, int] | None) -> None:
    made = encoder(kind, lora=lora)
    frames = 100
    if kind == "whisper":
        features, samples = torch.randn(1, 16, 2 * frames), frames * 320
    else:
        samples = frames * 320 + 200
        features = torch.randn(1, samples)
    found = Flops(made, adapter(), decoder()).of(Rows((frames,), (), (), 0))["encoder"]
    # Of the first layer, what is behind a weight that is not updated gets no gradient.
    real = counted(lambda: made(features, (samples,)))
    assert_close(found, real, rel=0.03)
    assert (real.backward > 0) == (lora is not None)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("conv", {"bottleneck": 16}),
        ("stack_mlp", {"frames": 5}),
        ("ebranchformer", {"inputs": 32, "width": 64, "blocks": 2, "heads": 4, "cgmlp": 128}),
        (
            "ebranchformer",
            {
                "inputs": 32,
                "width": 64,
                "blocks": 2,
                "heads": 4,
                "cgmlp": 128,
                "languages": [f"l{n}" for n in range(200)],
                "language_block": 1,
            },
        ),
    ],
)
@pytest.mark.parametrize("through", [False, True])
def test_adapter(kind: str, settings: dict[str, Any], through: bool) -> None:
    made = adapter(kind, **settings)
    frames = (100, 61)
    rows = torch.randn(sum(frames), 64, requires_grad=through)
    listener = encoder(lora={"rank": 2} if through else None)
    found = Flops(listener, made, decoder()).of(Rows((), frames, (), 0))["adapter"]
    real = counted(lambda: made(rows, Segments.packed(frames)))
    # The E-Branchformer pads clips into groups, and distances count on both sides of zero.
    assert_close(found, real, rel=0.1 if kind == "ebranchformer" else 0.01)


def test_useful_rows_are_the_clips_own() -> None:
    clips = [Clip(np.zeros((16, 2 * n), np.float32), 320 * n, n, n // 8) for n in (60, 40)]
    samples = [
        Sample("a", (Text((1, 2)), Speech(0, clip.slots), Text((3, 4, 5), labelled=True)), clip)
        for clip in clips
    ]
    batch = collate(samples)
    own = Flops(encoder(own_length=True), adapter(), decoder())
    assert own.useful(batch) == Rows((60, 40), (60, 40), (12, 10), 6)
    faithful = Flops(encoder(), adapter(), decoder())
    assert faithful.useful(batch) == Rows((100, 100), (60, 40), (12, 10), 6)
    once = own.useful(collate(samples, share=True))
    assert once == dataclasses.replace(own.useful(batch), shared=(2, 0))
    saved = own.of(own.useful(batch))["decoder"] + own.of(once)["decoder"].times(-1)
    # Two rows of weights, and no pair of positions.
    assert_close(saved, own.of(Rows((), (), (1, 1), 0))["decoder"], rel=0.01)
    text = Sample("t", (Text((1, 2)), Text((3,), labelled=True)))
    assert own.useful(collate([text], silence=clips[0])) == Rows((), (), (3,), 1)
    nothing = own.of(own.useful(dummy_batch(clips[0])))
    assert all(work.total == 0 for work in nothing.values())
    read = dataclasses.replace(batch, read=batch)
    extra = own.of(own.useful(read))["decoder"] + own.of(own.useful(batch))["decoder"].times(-1)
    assert extra == Work(own.of(own.useful(batch))["decoder"].forward)
