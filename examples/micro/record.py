"""Speak one sentence that nothing was trained on, by a voice that nothing was trained on.

python -m examples.micro.record OUT.wav [--language es] [--seed 7] [--text "…"]
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import soundfile

from examples.micro import grammar, voices
from examples.micro.lexicon import LANGUAGES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--language", choices=LANGUAGES, default="en")
    parser.add_argument("--seed", type=int, default=None, help="of sentence and voice")
    parser.add_argument("--text", help="say this, instead of a held-out sentence of the grammar")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    speaker = rng.choice(voices.speakers(args.language, heldout=True))
    if args.text:
        print(f"said: {args.text}")
        text = args.text
    else:
        meaning = next(grammar.meanings(rng, heldout=True))
        text = grammar.sentence(meaning, args.language)
        for language in LANGUAGES:
            role = "said" if language == args.language else "translation"
            print(f"{role} ({language}): {grammar.sentence(meaning, language)}")
    wave = voices.speak(text, speaker, voices.delivery(speaker, rng))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(args.out, wave, voices.SAMPLE_RATE)
    print(f"by voice {speaker.voice}, {len(wave) / voices.SAMPLE_RATE:.1f} s, in {args.out}")


if __name__ == "__main__":
    main()
