"""The encoder's own transcript: the first half of the cascade that evaluation compares with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCTC, AutoModelForSpeechSeq2Seq, AutoProcessor

from train import config as cfg
from train.model.encoder import SAMPLE_RATE


class Transcriber:
    """Greedy transcripts by the CTC head (Wav2Vec2/MMS) or the decoder (Whisper) of `path`.

    Args:
        languages: MMS: corpus's code → the language of its adapter, head and letters.
    Raises:
        ConfigError: the model has nothing to transcribe with.
    """

    def __init__(
        self,
        path: str,
        device: torch.device,
        languages: Mapping[str, str] | None = None,
        trust_remote_code: bool = False,
    ):
        self.device, self.languages = device, languages or {}
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        self.whisper = config.model_type == "whisper"
        if not self.whisper and not any("ForCTC" in name for name in config.architectures or ()):
            raise cfg.ConfigError(
                f"evaluate.inputs: 'cascade' needs a recogniser, but {path!r} was saved as "
                f"{config.architectures}, without a CTC head; name one in evaluate.recogniser, or "
                "leave 'cascade' out"
            )
        self.processor = AutoProcessor.from_pretrained(path)
        kind = AutoModelForSpeechSeq2Seq if self.whisper else AutoModelForCTC
        model = kind.from_pretrained(path, dtype=torch.float32, trust_remote_code=trust_remote_code)
        self.model = model.to(device).eval()

    @torch.no_grad()
    def __call__(self, waves: list[np.ndarray], languages: Sequence[str] = ()) -> list[str]:
        """One transcript per waveform (float32 mono 16 kHz).

        Args:
            languages: each clip's, where the recogniser has languages.
        """
        if not self.languages:
            return self._transcribe(waves)
        of: dict[str, list[int]] = defaultdict(list)
        for i, language in enumerate(languages):
            of[self.languages[language]].append(i)
        texts = [""] * len(waves)
        for name, clips in of.items():
            # The adapter's file brings the language's own CTC head; the letters are its own, too.
            if isinstance(self.processor.tokenizer.vocab.get(name), dict):
                self.processor.tokenizer.set_target_lang(name)
            self.model.load_adapter(name, force_load=True)
            self.model.to(self.device)
            for i, text in zip(clips, self._transcribe([waves[i] for i in clips]), strict=True):
                texts[i] = text
        return texts

    def _transcribe(self, waves: list[np.ndarray]) -> list[str]:
        if not waves:
            return []
        extractor = self.processor.feature_extractor
        name = extractor.model_input_names[0]
        features = [
            torch.from_numpy(extractor(w, sampling_rate=SAMPLE_RATE, return_tensors="np")[name][0])
            for w in waves
        ]
        if self.whisper:
            ids = self.model.generate(torch.stack(features).to(self.device))
            return [t.strip() for t in self.processor.batch_decode(ids, skip_special_tokens=True)]
        sizes = torch.tensor([len(f) for f in features], device=self.device)
        inputs = pad_sequence(features, batch_first=True).to(self.device)
        mask = (torch.arange(inputs.shape[1], device=self.device) < sizes[:, None]).long()
        best = self.model(inputs, attention_mask=mask).logits.argmax(-1).cpu()
        frames = self.model._get_feat_extract_output_lengths(sizes).tolist()
        # The tokenizer applies CTC's rule; done before it, "e, blank, e" would become one letter.
        return [
            self.processor.tokenizer.decode(row[:n].tolist()).strip()
            for row, n in zip(best, frames, strict=True)
        ]
