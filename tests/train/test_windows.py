"""Long clips in windows: every frame once, and each as its window alone gives it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from train import config as cfg
from train.model.encoder import Featurize, SpeechEncoder
from train.model.windows import OVERLAP, kept, starts

from .test_encoders import TOLERANCE, lengths

SECONDS = 5
FRAMES = 50 * SECONDS


@given(st.integers(0, 5_000), st.integers(2 * OVERLAP + 1, 1_500))
def test_windows_cover_every_frame_once(count: int, window: int) -> None:
    begins, takes = starts(count, window), kept(count, window)
    taken = [b + f for b, at in zip(begins, takes, strict=True) for f in range(at.start, at.stop)]
    assert taken == list(range(count))
    assert all(0 <= at.start <= at.stop <= window for at in takes)
    assert (len(begins) == 1) == (count <= window)
    # Half of what is shared lies between a cut and its window's end.
    inner = zip(begins[1:], takes[1:], strict=True)
    assert all(at.start == OVERLAP // 2 and begin + at.start < count for begin, at in inner)


@pytest.mark.parametrize(
    "kind",
    ["whisper", "whisper, own length", "wav2vec2", "mms", "hubert-base", "wavlm", "wav2vec2-bert"],
)
@torch.no_grad()
def test_a_long_clip_is_its_windows(tmp_path: Path, kind: str) -> None:
    own_length = kind == "whisper, own length"
    whisper, kind = "whisper" in kind, kind.split(",")[0]
    tiny.encoder(tmp_path, kind, window=SECONDS)
    section: dict[str, object] = {"path": str(tmp_path), "own_length": own_length}
    whole = SpeechEncoder.load(cfg.Encoder.model_validate(section), torch.float32)
    if not whisper:
        section["window_seconds"] = SECONDS
    encoder = SpeechEncoder.load(cfg.Encoder.model_validate(section), torch.float32)
    featurize = Featurize(str(tmp_path), own_length)
    sizes = [320 * FRAMES * 5 // 2 + 123, 16_001, 320 * FRAMES + 80]
    rng = np.random.default_rng(0)
    waves = [rng.normal(size=n).astype(np.float32) for n in sizes]
    features = [torch.from_numpy(featurize(wave)) for wave in waves]
    longest = max(f.shape[-1] for f in features)
    padded = torch.stack([torch.nn.functional.pad(f, (0, longest - f.shape[-1])) for f in features])
    found = encoder(padded, tuple(sizes))
    for i, count in enumerate(lengths(tmp_path, sizes)):
        assert count <= found.shape[1]
        alone = encoder(features[i][None], (sizes[i],))[0, :count]
        torch.testing.assert_close(found[i, :count], alone, **TOLERANCE)
        begins = starts(count, FRAMES)
        assert len(begins) == (4, 1, 2 if count > FRAMES else 1)[i]
        for begin, at in zip(begins, kept(count, FRAMES), strict=True):
            # What the window hears, through an encoder that knows of none.
            if whisper:
                piece = torch.from_numpy(featurize(waves[i][320 * begin :][: 320 * FRAMES]))
                size = len(waves[i][320 * begin :][: 320 * FRAMES])
            elif kind == "wav2vec2-bert":
                piece = features[i][:, begin : begin + FRAMES]
                size = min(sizes[i] - 320 * begin, 320 * FRAMES + 240)
            else:
                piece = features[i][320 * begin :][: 320 * FRAMES + 80]
                size = piece.shape[-1]
            expected = whole(piece[None], (size,))[0, at]
            torch.testing.assert_close(found[i, begin:][at], expected, **TOLERANCE)


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    tiny.encoder(tmp_path / "a", "whisper")
    tiny.encoder(tmp_path / "b", "wav2vec2")
    for name, seconds, said in (("a", 20, "always 30 s"), ("b", 4, "above 4")):
        section = {"path": str(tmp_path / name), "window_seconds": seconds}
        with pytest.raises(cfg.ConfigError, match=said):
            SpeechEncoder.load(cfg.Encoder.model_validate(section), torch.float32)
