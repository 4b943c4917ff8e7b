"""Answer an instruction about a recording.

    python train/listen.py runs/micro/blsp question.wav --instruction "repeat the sentence"
    python train/listen.py exported question.wav --instruction "repeat the sentence"
    python train/listen.py runs/micro/blsp --ui

MODEL is a run's output folder, one of its checkpoints, or a folder of `train/export.py`. The
recording may be WAV, FLAC, OGG or MP3, of any sample rate and channel count. `--ui` opens a page on
this machine to record and ask (see `train.talk`); it needs a run or a checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from itertools import takewhile
from pathlib import Path

import numpy as np
from jinja2 import TemplateError

from data.audio import AudioError, decode, is_silent
from train import checkpoint as ckpt
from train import config as cfg
from train.cli import guarded, trusting
from train.model.build import length_rule
from train.model.lengths import LengthRule
from train.model.respond import Question, Responder
from train.serving.model import is_exported, open_model
from train.serving.wording import text


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


def check_language(language: str, known: Collection[str]) -> None:
    """Whether the model can hear a recording in `language`; without adapters of its own, in any.

    Raises:
        ConfigError: it has `known` alone.
    """
    if known and language not in known:
        raise cfg.ConfigError(
            f"--language must be one of {', '.join(known)}, for which the encoder has adapters; "
            f"found {repr(language) if language else 'none'}"
        )


def from_run(args: argparse.Namespace) -> list[str]:
    """The answers of a run's model, or a checkpoint's; none after the page was served."""
    found = ckpt.find(args.model)
    config = cfg.recorded(found.state.config, str(found.path), args.trust_remote_code)
    if args.ui:
        talk(Responder(config, found.weights, args.device), config, args.port)
        return []
    check_language(args.language, config.model.encoder.languages)
    rule = length_rule(config.model)
    waves = [record(path, config.data.max_seconds, rule) for path in args.audio]
    responder = Responder(config, found.weights, args.device)
    try:
        responder.prompt.halves(args.instruction)
    except ValueError as e:
        raise cfg.ConfigError(f"--instruction: {e}") from None
    heard = responder.listen(waves, (args.language,) * len(waves))
    questions = [Question(args.instruction, slots) for slots in heard]
    return responder.answer(questions, max_new_tokens=args.max_new_tokens)


def from_exported(args: argparse.Namespace) -> list[str]:
    """The answers of an exported folder's model."""
    if args.ui:
        raise cfg.ConfigError(f"--ui needs a run or a checkpoint, found an export: {args.model}")
    model, processor = open_model(args.model, args.device, args.trust_remote_code)
    check_language(args.language, processor.languages)
    waves = [record(path, processor.max_seconds, processor.rule) for path in args.audio]
    texts = [args.instruction] * len(waves)
    try:
        inputs = processor(audio=waves, text=texts, languages=[args.language] * len(waves))
    except TemplateError as e:
        raise cfg.ConfigError(f"--instruction: {e}") from None
    tokens = model.generate(**inputs.to(model.device), max_new_tokens=args.max_new_tokens)
    assert model.generation_config is not None
    ends = model.generation_config.eos_token_id
    rows = [takewhile(lambda token: token not in ends, row) for row in tokens.tolist()]
    return [text(processor.tokenizer, list(row)) for row in rows]


def talk(responder: Responder, config: cfg.Config, port: int) -> None:
    """Serve the page until interrupted.

    Raises:
        ConfigError: its library is missing.
    """
    try:
        from train.talk import Talk, serve
    except ModuleNotFoundError as e:
        if e.name != "gradio":
            raise
        raise cfg.ConfigError("--ui needs gradio: pip install -e '.[ui]'") from None
    try:
        serve(Talk(config, responder), port)
    except OSError as e:
        raise cfg.ConfigError(f"--port {port}: {e}; choose another") from None
    except KeyboardInterrupt:
        print("closed", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="run.output, a checkpoint, or an exported folder")
    parser.add_argument("audio", type=Path, nargs="*", help="recordings")
    parser.add_argument("--instruction", help="what to do with what is heard")
    parser.add_argument(
        "--language", default="", help="of the recordings, for model.encoder.languages"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ui", action="store_true", help="serve a page to talk to it instead")
    parser.add_argument("--port", type=int, default=7860, help="of the page (default: %(default)s)")
    trusting(parser)
    args = parser.parse_args(argv)
    if args.ui == bool(args.audio):
        parser.error("give recordings, or --ui without any")
    if args.audio and args.instruction is None:
        parser.error("--instruction is needed: what is to be done with what is heard?")
    answers = from_exported(args) if is_exported(args.model) else from_run(args)
    for answer in answers:
        print(answer)


if __name__ == "__main__":
    sys.exit(guarded(main))
