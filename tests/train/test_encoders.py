"""Every family of encoder: its lengths, and a clip's frames whoever is beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, Wav2Vec2ForCTC

from tests import tiny
from train import config as cfg
from train.model.encoder import Featurize, LayerSum, SpeechEncoder, front_end

KINDS = ("whisper", *tiny.ENCODERS)

# Two layers of float32 sums of some ten terms, in two orders.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def load(folder: Path, kind: str, **settings: object) -> SpeechEncoder:
    tiny.encoder(folder, kind)
    section = cfg.Encoder.model_validate({"path": str(folder), **settings})
    return SpeechEncoder.load(section, torch.float32)


def batch(folder: Path, sizes: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Padded features, and each clip's own. Waveforms that begin with the same noise."""
    noise = np.random.default_rng(0).normal(size=max(sizes)).astype(np.float32)
    featurize = Featurize(str(folder))
    features = [torch.from_numpy(featurize(noise[:n])) for n in sizes]
    longest = max(f.shape[-1] for f in features)
    return (
        torch.stack([torch.nn.functional.pad(f, (0, longest - f.shape[-1])) for f in features]),
        features,
    )


def lengths(folder: Path, sizes: list[int]) -> list[int]:
    for conv in front_end(str(folder)):
        sizes = [conv.out(n) for n in sizes]
    return sizes


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_clip_alone_in_transformers(tmp_path: Path, kind: str) -> None:
    encoder = load(tmp_path, kind)
    plain = AutoModel.from_pretrained(tmp_path).eval()
    plain = plain.get_encoder() if kind == "whisper" else plain
    sizes = [16_000, 4_801, 11_119, 31_999]
    padded, features = batch(tmp_path, sizes)
    found = encoder(padded, tuple(sizes))
    for i, count in enumerate(lengths(tmp_path, sizes)):
        own = features[i].T if kind == "wav2vec2-bert" else features[i]
        alone = plain(own[None]).last_hidden_state[0]
        if kind != "whisper":  # its window is always full
            assert alone.shape[0] == count
        assert alone.shape[0] >= count
        torch.testing.assert_close(found[i, :count], alone[:count], **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_frames_of_every_length(tmp_path: Path, kind: str) -> None:
    # All remainders of the strides, from the shortest clip that has a frame at all.
    encoder = load(tmp_path, kind)
    sizes = [n for n in range(700, 1_400, 13) if lengths(tmp_path, [n])[0] > 0]
    if kind == "whisper":
        assert lengths(tmp_path, [160, 161, 320, 321, 32_000]) == [1, 1, 1, 2, 100]
        return
    for n in sizes:
        features = Featurize(str(tmp_path))(np.ones(n, np.float32) + np.arange(n) % 7)
        shape = encoder(torch.from_numpy(features)[None], (n,)).shape
        assert shape[1] == lengths(tmp_path, [n])[0], n


@torch.no_grad()
def test_the_comparison_sees_padding_that_is_normalised(tmp_path: Path) -> None:
    encoder = load(tmp_path, "hubert-base")
    sizes = [4_801, 31_999]
    padded, features = batch(tmp_path, sizes)
    right = encoder(features[0][None], (sizes[0],))
    wrong = encoder(padded, (sizes[1], sizes[1]))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong[0, : right.shape[1]], right[0], **TOLERANCE)


def test_layers_are_transformers_own(tmp_path: Path) -> None:
    for kind in KINDS:
        folder = tmp_path / kind
        encoder = load(folder, kind)
        padded, _ = batch(folder, [16_000])
        layers = encoder.layers(padded, (16_000,))
        assert len(layers) == encoder.num_layers == 3
        torch.testing.assert_close(layers[-1], encoder(padded, (16_000,)), **TOLERANCE)
        assert not torch.equal(layers[0], layers[1])


def test_layer_sum_is_the_softmax_mean() -> None:
    torch.manual_seed(0)
    layers = torch.randn(5, 2, 7, 3, dtype=torch.float64)
    layer_sum = LayerSum(5).double()
    torch.testing.assert_close(layer_sum(*layers), layers.mean(0))
    layer_sum.weight.data = torch.randn(5, dtype=torch.float64)
    expected = torch.einsum("l,lcfe->cfe", layer_sum.weight.softmax(0), layers)
    torch.testing.assert_close(layer_sum(*layers), expected)
    layer_sum(*layers).sum().backward()
    assert layer_sum.weight.grad is not None
    assert layer_sum.weight.grad.abs().min() > 0


@torch.no_grad()
def test_languages_of_one_batch_are_load_adapter_of_each(tmp_path: Path) -> None:
    tiny.language_adapters(tiny.encoder(tmp_path, "mms"), ["eng", "deu", "lug"])
    codes = {"en": "eng", "de": "deu", "lg": "lug"}
    settings = {"path": str(tmp_path), "languages": codes}
    encoder = SpeechEncoder.load(cfg.Encoder.model_validate(settings), torch.float32)
    clips = ("de", "en", "lg", "en", "de")
    sizes = [16_000, 4_801, 11_119, 31_999, 8_000]
    padded, features = batch(tmp_path, sizes)
    found = encoder(padded, tuple(sizes), clips)
    plain = Wav2Vec2ForCTC.from_pretrained(tmp_path).eval()
    seen = []
    for i, count in enumerate(lengths(tmp_path, sizes)):
        plain.load_adapter(codes[clips[i]])
        alone = plain.wav2vec2(features[i][None]).last_hidden_state[0]
        torch.testing.assert_close(found[i, :count], alone, **TOLERANCE)
        seen.append(alone)
    # The comparison can fail: another language is another result.
    plain.load_adapter("eng")
    other = plain.wav2vec2(features[0][None]).last_hidden_state[0]
    assert (other - seen[0]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("kind", "languages", "said"),
    [
        ("wav2vec2", {"en": "eng"}, "has no per-language adapters"),
        ("mms", {"en": "eng", "fr": "fra"}, "no adapter.fra.safetensors"),
    ],
)
def test_a_language_that_cannot_be_had_is_named(
    tmp_path: Path, kind: str, languages: dict[str, str], said: str
) -> None:
    tiny.encoder(tmp_path, kind)
    if kind == "mms":
        tiny.language_adapters(tmp_path, ["eng"])
    with pytest.raises(cfg.ConfigError, match=said):
        SpeechEncoder.load(
            cfg.Encoder.model_validate({"path": str(tmp_path), "languages": languages}),
            torch.float32,
        )


def test_a_clip_of_an_unknown_language_is_named(tmp_path: Path) -> None:
    tiny.language_adapters(tiny.encoder(tmp_path, "mms"), ["eng"])
    settings = {"path": str(tmp_path), "languages": {"en": "eng"}}
    encoder = SpeechEncoder.load(cfg.Encoder.model_validate(settings), torch.float32)
    padded, _ = batch(tmp_path, [8_000])
    encoder(padded, (8_000,), ("",))  # silence has no language
    with pytest.raises(ValueError, match="a clip is in 'de'"):
        encoder(padded, (8_000,), ("de",))


@torch.no_grad()
def test_whisper_on_each_clips_own_length(tmp_path: Path) -> None:
    encoder = load(tmp_path, "whisper", own_length=True)
    plain = AutoModel.from_pretrained(tmp_path).eval().get_encoder()
    window = 32_000
    sizes = [window, 161, 4_801, 31_999]
    noise = np.random.default_rng(0).normal(size=window).astype(np.float32)
    features = [
        torch.from_numpy(Featurize(str(tmp_path), own_length=True)(noise[:n])) for n in sizes
    ]
    assert [f.shape[1] for f in features] == [2 * n for n in lengths(tmp_path, sizes)]
    found = encoder(torch.nested.nested_tensor(features).to_padded_tensor(0), tuple(sizes))
    for i, own in enumerate(features):
        # Transformers' own layers on this clip alone, nothing masked.
        state = torch.nn.functional.gelu(plain.conv1(own[None]))
        state = torch.nn.functional.gelu(plain.conv2(state)).transpose(1, 2)
        state = state + plain.embed_positions.weight[: state.shape[1]]
        for layer in plain.layers:
            state = layer(state, None)
        state = plain.layer_norm(state)[0]
        torch.testing.assert_close(found[i, : len(state)], state, **TOLERANCE)
    # A clip that fills the window is what transformers makes of it.
    full = plain(features[0][None]).last_hidden_state[0]
    torch.testing.assert_close(found[0], full, **TOLERANCE)
    hidden = encoder.layers(features[0][None], (window,))
    assert len(hidden) == encoder.num_layers


def test_own_length_is_whispers(tmp_path: Path) -> None:
    with pytest.raises(cfg.ConfigError, match="own_length is for Whisper; wav2vec2"):
        load(tmp_path, "wav2vec2", own_length=True)
