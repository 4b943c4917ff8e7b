"""Answer an instruction about a recording.

    python train/listen.py runs/micro/blsp question.wav --instruction "repeat the sentence"

MODEL is a run's output folder or one of its checkpoints. The recording may be WAV, FLAC, OGG or
MP3, of any sample rate and channel count.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from data.audio import AudioError, decode, is_silent
from train import checkpoint as ckpt
from train import config as cfg
from train.cli import guarded
from train.model.build import length_rule
from train.model.lengths import LengthRule
from train.model.respond import Question, Responder


def record(path: Path, max_seconds: float, rule: LengthRule) -> np.ndarray:
    """A recording as the model hears it.

    Raises:
        AudioError: it cannot be heard, naming the file.
    """
    try:
        wave = decode(path, max_seconds=max_seconds)
    except FileNotFoundError:
        raise AudioError(f"{path} does not exist") from None
    except AudioError as e:
        raise AudioError(f"{path}: {e}") from None
    if rule.slots(len(wave)) == 0:
        raise AudioError(f"{path}: {len(wave) / 16:.0f} ms is too short for the encoder")
    if is_silent(wave):
        print(f"warning: {path} is silent", file=sys.stderr)
    return wave


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="run.output, or a checkpoint in it")
    parser.add_argument("audio", type=Path, nargs="+", help="recordings")
    parser.add_argument("--instruction", required=True, help="what to do with what is heard")
    parser.add_argument(
        "--language", default="", help="of the recordings, for model.encoder.languages"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    found = ckpt.find(args.model)
    config = cfg.parse(found.state.config, str(found.path))
    rule = length_rule(config.model)
    waves = [record(path, config.data.max_seconds, rule) for path in args.audio]
    responder = Responder(config, found.weights, args.device)
    heard = responder.listen(waves, (args.language,) * len(waves))
    questions = [Question(args.instruction, slots) for slots in heard]
    for answer in responder.answer(questions, max_new_tokens=args.max_new_tokens):
        print(answer)


if __name__ == "__main__":
    sys.exit(guarded(main))
