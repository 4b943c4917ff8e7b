"""Make the micro world: a spoken corpus in three languages, tasks on it, and tiny models.

    python -m examples.micro.world [OUT] [--models wav2vec2,llama]

What is there and was made by the same sources with the same settings is not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import Any

import yaml

from examples.micro import corpus, tasks
from examples.micro.progress import Board
from examples.micro.settings import (
    CorpusSettings,
    LanguageModelSettings,
    Wav2Vec2Settings,
    WhisperSettings,
)

CORPUS = CorpusSettings()

_WORDS = ("lexicon", "grammar")
_SPEECH = (*_WORDS, "voices", "corpus")
_TEXT = (*_WORDS, "tasks", "vocabulary", "optimizer", "language_model")


@dataclass(frozen=True)
class Part:
    """What lies in one folder of the world and is made in one go."""

    folder: str
    sources: tuple[str, ...]  # the modules that make it
    settings: Any = None
    trainer: str = ""  # of these, the one whose `train` makes the model

    def stamp(self) -> str:
        digest = hashlib.sha256(repr((self.settings, CORPUS)).encode())
        for source in self.sources:
            digest.update(Path(__file__).with_name(f"{source}.py").read_bytes())
        return digest.hexdigest()


SPEECH = Part("corpus", _SPEECH, CORPUS)
MODELS = {
    "wav2vec2": Part(
        "encoder-wav2vec2",
        (*_SPEECH, "recordings", "optimizer", "wav2vec2"),
        Wav2Vec2Settings(),
        "wav2vec2",
    ),
    "whisper": Part(
        "encoder-whisper",
        (*_SPEECH, "recordings", "optimizer", "whisper"),
        WhisperSettings(),
        "whisper",
    ),
    "llama": Part("llm-llama", _TEXT, LanguageModelSettings("llama"), "language_model"),
    "bloom": Part("llm-bloom", _TEXT, LanguageModelSettings("bloom"), "language_model"),
}


def make(out: Path, models: list[str], processes: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    # One thread for each process: the work is split by process, and libraries that start a
    # thread for every core would only fight.
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    write_tasks(out)
    with Board() as board:
        if not is_made(out, SPEECH):
            make_corpus(out, processes, board)
        missing = [name for name in models if not is_made(out, MODELS[name])]
        train_models(out, missing, processes, board)
    write_summary(out)


def write_tasks(out: Path) -> None:
    """The wordings, what is asked about each test utterance, and instructions with answers to
    train an LLM on (`configs/micro/blsp_prepare.yaml`): quick, so never cached."""
    text = yaml.safe_dump(tasks.prompt_rows(), allow_unicode=True, sort_keys=False)
    (out / "prompts.yaml").write_text(text, encoding="utf-8")
    rows = [
        row
        for index, utterance in enumerate(corpus.plan(CORPUS, "test"))
        for row in tasks.evaluation_rows(
            utterance.key, utterance.meaning, utterance.language, index
        )
    ]
    _write_rows(out / "tasks.jsonl", rows)
    spoken = corpus.plan(CORPUS, "train")
    pairs = ((utterance.meaning, utterance.language) for utterance in spoken)
    _write_rows(out / "instructions.jsonl", tasks.instruction_rows(pairs))


def _write_rows(path: Path, rows: Iterable[dict]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def make_corpus(out: Path, processes: int, board: Board) -> None:
    started = time.monotonic()
    _unmake(out, SPEECH)
    total, done = sum(len(corpus.plan(CORPUS, split)) for split in ("train", "test")), 0

    def spoken(count: int) -> None:
        nonlocal done
        done += count
        board.show("corpus", done, total, "utterances spoken")

    corpus.write(CORPUS, out / SPEECH.folder, processes, spoken)
    _stamp(out, SPEECH, {"utterances": total, "seconds": round(time.monotonic() - started)})


def train_models(out: Path, names: list[str], processes: int, board: Board) -> None:
    """Each model in a process of its own, as many at once as there are cores."""
    if not names:
        return
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with ProcessPoolExecutor(processes, context, _remember, (queue,)) as pool:
        running = {pool.submit(_train, out, name) for name in names}
        while running:
            done, running = wait(running, timeout=0.5)
            for future in done:
                future.result()  # raises what the training raised
            while True:
                try:
                    board.show(*queue.get_nowait())
                except Empty:
                    break


_queue: Queue


def _remember(queue: Queue) -> None:
    global _queue
    _queue = queue


def _train(out: Path, name: str) -> None:
    from transformers.utils import logging  # slow to import, so not where nothing is trained

    logging.disable_progress_bar()
    started = time.monotonic()
    part = MODELS[name]
    _unmake(out, part)
    trainer = import_module(f"examples.micro.{part.trainer}")
    report = trainer.train(
        part.settings,
        CORPUS,
        out / SPEECH.folder,
        out / part.folder,
        lambda done, total, text: _queue.put((name, done, total, text)),
    )
    _stamp(out, part, report | {"seconds": round(time.monotonic() - started)})


def write_summary(out: Path) -> None:
    """What the world is, and how good its models are."""
    made = [part for part in (SPEECH, *MODELS.values()) if is_made(out, part)]
    summary: dict[str, Any] = {
        "prompt_template": tasks.PROMPT_TEMPLATE,
        "corpus_settings": asdict(CORPUS),
        "parts": {
            part.folder: {"settings": asdict(part.settings)} | _read_stamp(out, part)["report"]
            for part in made
        },
    }
    (out / "world.json").write_text(json.dumps(summary, indent=2) + "\n")
    for folder, facts in summary["parts"].items():
        figures = {key: value for key, value in facts.items() if key != "settings"}
        print(f"{folder:<18} {json.dumps(figures)}")


def is_made(out: Path, part: Part) -> bool:
    return _read_stamp(out, part).get("stamp") == part.stamp()


def _stamp_path(out: Path, part: Part) -> Path:
    return out / f".{part.folder}.json"


def _read_stamp(out: Path, part: Part) -> dict:
    path = _stamp_path(out, part)
    return json.loads(path.read_text()) if path.exists() and (out / part.folder).exists() else {}


def _stamp(out: Path, part: Part, report: dict) -> None:
    """Written last: a part that was left half made has none."""
    path = _stamp_path(out, part)
    path.write_text(json.dumps({"stamp": part.stamp(), "report": report}))


def _unmake(out: Path, part: Part) -> None:
    _stamp_path(out, part).unlink(missing_ok=True)
    shutil.rmtree(out / part.folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("build/micro"))
    parser.add_argument(
        "--models", default="wav2vec2,llama", help=f"of {','.join(MODELS)} (default: %(default)s)"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at once")
    args = parser.parse_args()
    models = [name for name in args.models.split(",") if name]
    if unknown := set(models) - set(MODELS):
        parser.error(f"no model {', '.join(sorted(unknown))}: there are {', '.join(MODELS)}")
    make(args.out, models, args.processes)


if __name__ == "__main__":
    main()
