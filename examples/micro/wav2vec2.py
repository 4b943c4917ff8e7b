"""A tiny speech encoder of the MMS kind: wav2vec 2.0 with a CTC head over letters.

What makes it learn in minutes: its first convolution is not learned but is a bank of band-pass
filters, each in four phases, so that after the GELU their sum is the loudness of a band.
"""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import jiwer
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)

from examples.micro import recordings
from examples.micro.optimizer import OneCycle
from examples.micro.progress import Report
from examples.micro.recordings import Recording
from examples.micro.settings import CorpusSettings, Wav2Vec2Settings
from examples.micro.voices import SAMPLE_RATE

_PHASES = 4
_FILTER_TAPS = 400


def train(
    settings: Wav2Vec2Settings,
    corpus_settings: CorpusSettings,
    corpus: Path,
    out: Path,
    report: Report,
) -> dict:
    """Train, save to `out`, and return the word error rate on held-out voices and sentences."""
    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    training = recordings.load(corpus, corpus_settings, "train")
    processor = build_processor(training)
    model = build(settings, processor, training)
    optimizer = OneCycle(
        model, settings.steps, matrix_lr=settings.matrix_lr, other_lr=settings.other_lr
    )
    stream = recordings.batches(training, settings.seconds_per_batch, rng)
    for step, batch in enumerate(islice(stream, settings.steps), 1):
        loss = _loss(model, processor, batch)
        optimizer.step(loss)
        report(step, settings.steps, f"CTC loss {loss.item():.3f} per letter")
    model.eval()
    model.save_pretrained(out)
    processor.save_pretrained(out)
    heldout = recordings.load(corpus, corpus_settings, "test")
    return {"heldout_wer": word_error_rate(model, processor, heldout)}


def build_processor(training: list[Recording]) -> Wav2Vec2Processor:
    letters = sorted({letter for recording in training for letter in recording.text} - {" "})
    entries = ["<pad>", "<s>", "</s>", "<unk>", "|", *letters]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
        tokenizer = Wav2Vec2CTCTokenizer(str(path), word_delimiter_token="|")
    extractor = Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=SAMPLE_RATE, do_normalize=True, return_attention_mask=True
    )
    return Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer)


def build(
    settings: Wav2Vec2Settings, processor: Wav2Vec2Processor, training: list[Recording]
) -> Wav2Vec2ForCTC:
    config = Wav2Vec2Config(
        vocab_size=len(processor.tokenizer),
        pad_token_id=processor.tokenizer.pad_token_id,
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=settings.inner,
        conv_dim=(_PHASES * settings.bands, settings.width),
        conv_kernel=(_FILTER_TAPS, 4),
        conv_stride=(80, 4),  # 5 ms, then 20 ms
        conv_bias=True,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=17,
        num_conv_pos_embedding_groups=8,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        apply_spec_augment=False,
    )
    # Eager: on CPU the fused attention's backward pass is many times slower at these sizes.
    model = Wav2Vec2ForCTC._from_config(config, attn_implementation="eager").train()
    heard = np.concatenate([_normalised(recording.wave) for recording in training[::50]])
    _set_filters(model, settings.bands, heard)
    return model


@torch.no_grad()
def _set_filters(model: Wav2Vec2ForCTC, bands: int, heard: np.ndarray) -> None:
    """Make the first convolution a filter bank and the second, to begin with, sum its phases."""
    first: Any
    second: Any
    first, second = model.wav2vec2.feature_extractor.conv_layers
    filters = torch.from_numpy(filter_bank(bands))
    response = F.conv1d(torch.from_numpy(heard)[None, None], filters, stride=first.conv.stride)[0]
    loudness = response.unflatten(0, (bands, _PHASES)).square().mean((1, 2)).sqrt()
    nn.init.zeros_(first.conv.bias)
    first.conv.weight.copy_(filters / loudness.repeat_interleave(_PHASES)[:, None, None])
    nn.init.constant_(first.layer_norm.weight, 2.0)  # makes the GELU bend like a rectifier
    first.requires_grad_(False)
    nn.init.zeros_(second.conv.bias)
    nn.init.normal_(second.conv.weight, std=0.01)
    for band in range(min(bands, second.conv.out_channels)):
        second.conv.weight[band, band * _PHASES : (band + 1) * _PHASES] += 1 / 16


def filter_bank(bands: int) -> np.ndarray:
    """Gabor filters on the mel scale [bands * phases, 1, taps], short ones for high bands."""

    def mel(hertz: float) -> float:
        return 2595 * np.log10(1 + hertz / 700)

    edges = 700 * (10 ** (np.linspace(mel(60), mel(7600), bands + 2) / 2595) - 1)
    centre, bandwidth = edges[1:-1, None], (edges[2:] - edges[:-2])[:, None] / 2
    seconds = (np.arange(_FILTER_TAPS) - (_FILTER_TAPS - 1) / 2) / SAMPLE_RATE
    reach = np.clip(1.4 / bandwidth, 0.004, _FILTER_TAPS / 2 / SAMPLE_RATE)
    envelope = np.cos(np.pi * seconds / (2 * reach)) ** 2 * (np.abs(seconds) < reach)
    phases = np.arange(_PHASES) * 2 * np.pi / _PHASES
    waves = np.cos(2 * np.pi * (centre * seconds)[:, None] + phases[:, None])
    return (waves * envelope[:, None]).reshape(-1, 1, _FILTER_TAPS).astype(np.float32)


def _normalised(wave: np.ndarray) -> np.ndarray:
    """As the feature extractor does it."""
    return (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)


def _log_probs(model: Wav2Vec2ForCTC, batch: list[Recording]) -> tuple[torch.Tensor, torch.Tensor]:
    samples_BS, lengths_B = recordings.padded([_normalised(r.wave) for r in batch])
    mask_BS = (torch.arange(samples_BS.shape[1]) < lengths_B[:, None]).long()
    with torch.autocast("cpu", torch.bfloat16):
        logits_BTV = model(samples_BS, attention_mask=mask_BS).logits
    frames_B = cast(Any, model)._get_feat_extract_output_lengths(lengths_B)
    return logits_BTV.float().log_softmax(-1), frames_B


def _loss(
    model: Wav2Vec2ForCTC, processor: Wav2Vec2Processor, batch: list[Recording]
) -> torch.Tensor:
    """Per letter, so that long sentences count for more."""
    log_probs_BTV, frames_B = _log_probs(model, batch)
    letters = [processor.tokenizer(recording.text).input_ids for recording in batch]
    targets = torch.tensor([id_ for ids in letters for id_ in ids])
    counts_B = torch.tensor([len(ids) for ids in letters])
    total = F.ctc_loss(
        log_probs_BTV.transpose(0, 1), targets, frames_B, counts_B, blank=0, reduction="sum"
    )
    return total / len(targets)


@torch.no_grad()
def word_error_rate(
    model: Wav2Vec2ForCTC, processor: Wav2Vec2Processor, heldout: list[Recording]
) -> float:
    said, heard = [], []
    for batch in recordings.cut(sorted(heldout, key=lambda r: len(r.wave)), 64.0):
        log_probs_BTV, frames_B = _log_probs(model, batch)
        for recording, best_T, frames in zip(
            batch, log_probs_BTV.argmax(-1), frames_B.tolist(), strict=True
        ):
            said.append(recording.text)
            heard.append(processor.tokenizer.decode(best_T[:frames]))
    return jiwer.wer(said, heard)
