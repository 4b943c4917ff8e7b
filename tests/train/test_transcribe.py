"""The cascade's first half: a batch's transcripts against transformers' own of each clip."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor, Wav2Vec2CTCTokenizer, Wav2Vec2ForCTC

from tests import tiny
from train import config as cfg
from train.model.transcribe import Transcriber

CPU = torch.device("cpu")


def waves(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [0.3 * rng.normal(size=n).astype(np.float32) for n in rng.integers(8000, 20000, count)]


def plain(folder: Path, wave: np.ndarray, language: str | None = None) -> str:
    """As transformers' documentation transcribes one clip."""
    processor = AutoProcessor.from_pretrained(folder)
    model = Wav2Vec2ForCTC.from_pretrained(folder).eval()
    if language:
        processor.tokenizer.set_target_lang(language)
        model.load_adapter(language)
    inputs = processor(wave, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        ids = model(inputs.input_values).logits.argmax(-1)
    return str(processor.batch_decode(ids)[0]).strip()


def test_a_batch_is_transcribed_as_each_clip_alone(tmp_path: Path) -> None:
    folder = tiny.encoder(tmp_path)
    clips = waves(12)
    found = Transcriber(str(folder), CPU)(clips)
    assert found == [plain(folder, wave) for wave in clips]
    assert len(set(found)) == 12


def test_every_language_has_its_own_adapter_head_and_letters(tmp_path: Path) -> None:
    folder = tiny.language_adapters(tiny.encoder(tmp_path, "mms"), ["eng", "deu"])
    letters = json.loads((folder / "vocab.json").read_text())
    turned = {c: (i if i < 3 else 31 - i) for c, i in letters.items()}
    (folder / "vocab.json").write_text(json.dumps({"eng": letters, "deu": turned}))
    Wav2Vec2CTCTokenizer(
        folder / "vocab.json", pad_token="<pad>", unk_token="<unk>", target_lang="eng"
    ).save_pretrained(folder)
    clips = waves(3)
    recogniser = Transcriber(str(folder), CPU, {"en": "eng", "de": "deu"})
    found = recogniser(clips, ["de", "en", "de"])
    expected = [
        plain(folder, w, name) for w, name in zip(clips, ["deu", "eng", "deu"], strict=True)
    ]
    assert found == expected
    # Letters that stand twice, with a blank between them, stay two.
    assert any(a == b for text in found for a, b in pairwise(text))
    assert recogniser(clips, ["en", "en", "en"])[0] != found[0]


def test_an_encoder_without_a_head_is_refused(tmp_path: Path) -> None:
    whole = tiny.encoder(tmp_path / "whole")
    AutoModel.from_pretrained(whole).save_pretrained(tmp_path / "headless")
    with pytest.raises(cfg.ConfigError, match=r"without a CTC head; name one in evaluate\.recog"):
        Transcriber(str(tmp_path / "headless"), CPU)
