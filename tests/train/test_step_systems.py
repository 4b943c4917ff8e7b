"""The four systems that `benchmarks.step` times train the same thing."""

from __future__ import annotations

import random
from itertools import islice
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from benchmarks.step_cases import (
    RATE,
    WINDOW_SECONDS,
    Size,
    Utterance,
    length_rule,
    make_model,
    seconds_of,
    utterances,
)
from benchmarks.step_systems import SYSTEMS, System

WORDS = 50


def wav2vec2() -> PretrainedConfig:
    return AutoConfig.for_model(
        "wav2vec2", hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=32, conv_dim=(16,) * 3, conv_kernel=(10, 8, 4), conv_stride=(8, 8, 5),
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, do_stable_layer_norm=True,
        feat_extract_norm="layer",
    )  # fmt: skip


def whisper() -> PretrainedConfig:
    return AutoConfig.for_model(
        "whisper", d_model=24, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=32,
        decoder_layers=1, decoder_attention_heads=4, num_mel_bins=16,
    )  # fmt: skip


def llama() -> PretrainedConfig:
    return AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=WORDS, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip


SIZES = {"wav2vec2": Size(wav2vec2, llama, 8), "whisper": Size(whisper, llama, 8)}


def trained(name: str, size: Size, sounds: list[Utterance]) -> tuple[float, torch.Tensor, System]:
    """Loss of a step, the gradient of the last LayerNorm, and the system."""
    kind = SYSTEMS[name]
    model = make_model(size, kind.own_length, torch.float32, "cpu").train()
    system = kind(model, length_rule(size), "cpu")
    labels = sum(len(u.answer) for u in sounds)
    batches = system.batches(sounds, 3 if kind.unit == "utterances" else 300)
    assert len(batches) > 1
    losses = [system.loss(batch, labels) for batch in batches]
    sum(losses).backward()  # type: ignore[union-attr]
    grad = model.embeddings.weight.grad
    assert grad is not None
    return float(sum(loss.detach() for loss in losses)), grad, system


@pytest.mark.parametrize("encoder", SIZES)
def test_all_systems_train_the_same(encoder: str) -> None:
    size = SIZES[encoder]
    sounds = utterances("blsp", 7, size.encoder(), WORDS)
    loss, grad, _ = trained("hearken", size, sounds)
    for name in ("grouped", "greedy", "padded_30s"):
        # Whisper hears the silence behind a clip, so in its window of 30 s it is another encoder.
        if (encoder, name) != ("whisper", "padded_30s"):
            other_loss, other_grad, _ = trained(name, size, sounds)
            assert other_loss == pytest.approx(loss, rel=1e-5)
            torch.testing.assert_close(other_grad, grad, rtol=1e-3, atol=1e-5)


def encoded(system: System, batches: list[Any]) -> int:
    """Frames that the encoder's layers are given, padding included."""
    model: Any = getattr(system, "encoder", system.model.encoder)
    layers = getattr(model.model, "layers", None) or model.model.encoder.layers
    seen: list[int] = []
    hook = layers[0].register_forward_pre_hook(
        lambda _, given: seen.append(given[0].shape[0] * given[0].shape[1])
    )
    with torch.no_grad():
        for batch in batches:
            system.loss(batch, 1)
    hook.remove()
    return sum(seen)


@pytest.mark.parametrize("encoder", SIZES)
def test_what_each_system_pads(encoder: str) -> None:
    size, rows = SIZES[encoder], {}
    sounds = utterances("blsp", 7, size.encoder(), WORDS)
    for name in SYSTEMS:
        system = trained(name, size, sounds)[2]
        batches = system.batches(sounds, 3 if system.unit == "utterances" else 300)
        found = [system.rows(batch) for batch in batches]
        rows[name] = {
            part: sum(sum(getattr(r, part)) for r in found) for part in ("encoder", "documents")
        } | {"head": sum(r.head for r in found)}
        assert encoded(system, batches) == rows[name]["encoder"], name
    rule = length_rule(size)
    window = int(rule.frames(round(WINDOW_SECONDS * RATE)))
    assert rows["hearken"]["encoder"] == sum(int(rule.frames(u.samples)) for u in sounds)
    assert rows["hearken"]["head"] == sum(len(u.answer) for u in sounds)
    assert rows["padded_30s"]["encoder"] == 7 * window
    assert rows["greedy"]["documents"] == rows["hearken"]["documents"] == rows["greedy"]["head"]
    order = [rows[n]["encoder"] for n in ("hearken", "grouped", "greedy", "padded_30s")]
    assert order == sorted(order)
    # Which of the two pads more is chance here: groups are by the audio, answers have any length.
    assert rows["hearken"]["documents"] < min(
        rows[n]["documents"] for n in ("grouped", "padded_30s")
    )


@pytest.mark.parametrize(("mix", "mean"), [("librispeech", 12.0), ("blsp", 5.0)])
def test_lengths_are_as_the_mix_says(mix: str, mean: float) -> None:
    seconds = list(islice(seconds_of(mix, random.Random(0)), 2000))
    assert sum(seconds) / len(seconds) == pytest.approx(mean, rel=0.1)
    assert min(seconds) >= 1
    assert max(seconds) <= 30
    if mix == "blsp":
        assert sum(s < 10 for s in seconds) > 0.9 * len(seconds)
