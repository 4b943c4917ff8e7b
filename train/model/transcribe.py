"""The encoder's own transcript: the first half of the cascade that evaluation compares with."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCTC, AutoModelForSpeechSeq2Seq, AutoProcessor

from train.model.encoder import SAMPLE_RATE


class Transcriber:
    """Greedy transcripts by the CTC head (Wav2Vec2/MMS) or the decoder (Whisper) of `path`."""

    def __init__(self, path: str, device: torch.device, trust_remote_code: bool = False):
        self.device = device
        self.processor = AutoProcessor.from_pretrained(path)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        self.whisper = config.model_type == "whisper"
        kind = AutoModelForSpeechSeq2Seq if self.whisper else AutoModelForCTC
        model = kind.from_pretrained(path, dtype=torch.float32, trust_remote_code=trust_remote_code)
        self.model = model.to(device).eval()

    @torch.no_grad()
    def __call__(self, waves: list[np.ndarray]) -> list[str]:
        """One transcript per waveform (float32 mono 16 kHz)."""
        if not waves:
            return []
        extractor = self.processor.feature_extractor
        features = [
            torch.from_numpy(extractor(w, sampling_rate=SAMPLE_RATE, return_tensors="np")[name][0])
            for w in waves
            for name in extractor.model_input_names[:1]
        ]
        if self.whisper:
            ids = self.model.generate(torch.stack(features).to(self.device))
            return [t.strip() for t in self.processor.batch_decode(ids, skip_special_tokens=True)]
        sizes = torch.tensor([len(f) for f in features], device=self.device)
        inputs = pad_sequence(features, batch_first=True).to(self.device)
        mask = (torch.arange(inputs.shape[1], device=self.device) < sizes[:, None]).long()
        best = self.model(inputs, attention_mask=mask).logits.argmax(-1).cpu()
        frames = self.model._get_feat_extract_output_lengths(sizes).tolist()
        blank = self.processor.tokenizer.pad_token_id
        return [
            self.processor.tokenizer.decode(_collapse(row[:n].tolist(), blank)).strip()
            for row, n in zip(best, frames, strict=True)
        ]


def _collapse(ids: list[int], blank: int) -> list[int]:
    """CTC's rule: runs count once, blanks not at all."""
    return [b for a, b in pairwise([blank, *ids]) if b not in (a, blank)]
