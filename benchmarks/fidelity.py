"""What Whisper loses when it hears a clip at its own length instead of its window of 30 s.

    python -m benchmarks.fidelity ENCODER SHARDS [--clips N] [--json FILE]

Names: `own_length` the option `model.encoder.own_length`; `padded_30s` the window, as it was
trained. Metrics: `cosine` of the two encodings' frames, mean over frames; `wer` of the model's own
greedy transcript from each encoding, against the shards' texts.
"""

from __future__ import annotations

import argparse

import jiwer
import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.report import Report
from data.audio import decode
from data.shards import ShardSet
from train import config as cfg
from train.model.encoder import Featurize, SpeechEncoder, front_end

_WINDOW_SECONDS = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoder")
    parser.add_argument("shards")
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    shards = ShardSet.open([options.shards])
    numbers = range(0, len(shards), max(1, len(shards) // options.clips))[: options.clips]
    waves = [decode(shards.read(i, "flac"), max_seconds=_WINDOW_SECONDS) for i in numbers]
    texts = [shards.texts[i].as_py() for i in numbers]

    states: dict[str, list[torch.Tensor]] = {}
    heard: dict[str, list[str]] = {}
    recogniser = AutoModelForSpeechSeq2Seq.from_pretrained(options.encoder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(options.encoder)
    for name in ("padded_30s", "own_length"):
        settings = cfg.Encoder(path=options.encoder, own_length=name == "own_length")
        encoder, featurize = SpeechEncoder.load(settings, torch.float32), Featurize.of(settings)
        states[name], heard[name] = [], []
        for wave in waves:
            features = torch.from_numpy(featurize(wave))[None]
            frames = len(wave)
            for conv in front_end(options.encoder):
                frames = conv.out(frames)
            with torch.no_grad():
                out = encoder(features, (len(wave),))
                # The decoder was trained to see the whole window.
                seen = out if name == "padded_30s" else out[:, :frames]
                ids = recogniser.generate(encoder_outputs=BaseModelOutput(seen))
            states[name].append(out[0, :frames])
            heard[name] += processor.batch_decode(ids, skip_special_tokens=True)
    pairs = zip(states["padded_30s"], states["own_length"], strict=True)
    cosine = torch.cat([torch.cosine_similarity(a, b, dim=-1) for a, b in pairs])
    report = Report("fidelity")
    case = f"{len(waves)} clips"
    report.add(case, "own_length", "cosine", float(cosine.mean()), "")
    for name, said in heard.items():
        wer = jiwer.wer([t.lower() for t in texts], [t.lower().strip() or "-" for t in said])
        report.add(case, name, "wer", 100 * wer, "%")
    print(report.markdown())
    if options.json:
        report.write(options.json)


if __name__ == "__main__":
    main()
