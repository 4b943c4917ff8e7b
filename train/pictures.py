"""Pictures that runs leave in the tracker: of their data when training begins, of what the LLM
hears when it is evaluated.

Shapes: R slots of a clip, H LLM width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.nn.functional import normalize

from data.audio import SAMPLE_RATE, decode
from data.ctc import Aligner, AlignError, Unaligned
from data.words import WordTime
from train import config as cfg
from train.similarity import picture as similarity_picture
from train.similarity import similarity

if TYPE_CHECKING:
    from data.lengths import LengthRule
    from data.shards import ShardSet
    from data.stream import Stream
    from train.model.respond import Responder

_SPEECH, _TEXT = "tab:blue", "tab:orange"
_INPUTS = ("text", "speech", "cascade", "shuffled", "none")  # bounds to either side
_BINS = 24
_SLOTS = 120  # of a clip: more cannot be read
_ROWS = 16_384  # of the table of embeddings at once


def lengths(stream: Stream) -> Figure:
    """How long the samples are in the first epoch, in seconds and in LLM positions."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    seconds = stream.lengths.num_samples(0) / SAMPLE_RATE
    shown = (("seconds of audio", seconds), ("LLM positions", stream.lengths.tokens(0)))
    for axes, (name, values) in zip(figure.subplots(1, 2), shown, strict=True):
        axes.hist(values, bins=60, color=_SPEECH)
        mean = float(np.mean(values))
        axes.axvline(mean, color="black", linewidth=0.8, label=f"mean {mean:.1f}")
        axes.set_xlabel(name)
        axes.set_ylabel("samples")
        axes.legend()
    return figure


def packing(stream: Stream, tokens_per_bin: int) -> Figure:
    """The first bins of the first epoch as the plan packs them: a row each, documents in turn."""
    tokens = stream.lengths.tokens(0)
    samples = stream.lengths.num_samples(0)
    slots = np.where(samples > 0, stream.rule.slots(samples), 0)
    bins = list(islice((b for step in stream.plan.iterate(0) for b in step), _BINS))
    figure = Figure(figsize=(11, 0.22 * len(bins) + 1.5), layout="constrained")
    axes = figure.subplots()
    for row, documents in enumerate(bins):
        whole, heard = tokens[documents], np.minimum(slots[documents], tokens[documents])
        starts = np.cumsum(whole) - whole
        for first, count, colour in (
            (starts, heard, _SPEECH),
            (starts + heard, whole - heard, _TEXT),
        ):
            axes.broken_barh(
                list(zip(first.tolist(), count.tolist(), strict=True)), (row - 0.4, 0.8),
                color=colour, edgecolor="white", linewidth=0.4,
            )  # fmt: skip
    axes.axvline(tokens_per_bin, color="black", linewidth=0.8)
    axes.set_ylim(len(bins) - 0.4, -0.6)
    axes.set_xlabel("LLM positions; the line is data.tokens_per_bin")
    axes.set_ylabel("bin")
    named = [axes.barh(0, 0, color=colour) for colour in (_SPEECH, _TEXT)]
    names = ["slots", "prompt and answer"]
    figure.legend(handles=named, labels=names, loc="outside upper right", ncols=2)
    return figure


def losses(rows: Sequence[dict[str, Any]]) -> Figure | None:
    """Loss of the expected answers by task and input; None where it was not measured."""
    found = {
        (r["task"], r["input"]): r["value"]
        for r in rows
        if r["metric"] == "answer_loss" and r["language"] == "all" and r["wording"] == "all"
    }
    if not found:
        return None
    tasks = list(dict.fromkeys(task for task, _ in found))
    kinds = [kind for kind in _INPUTS if any(of == kind for _, of in found)]
    figure = Figure(figsize=(max(6.0, 0.9 * len(tasks)), 3.4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(kinds)
    for n, kind in enumerate(kinds):
        at = np.arange(len(tasks)) + (n - (len(kinds) - 1) / 2) * width
        axes.bar(at, [found.get((task, kind), np.nan) for task in tasks], width, label=kind)
    axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    axes.set_ylabel("loss per token of the answer")
    axes.set_yscale("log")
    figure.legend(loc="outside upper right", ncols=len(kinds), fontsize=8)
    return figure


def edges_of(rule: LengthRule, samples: int) -> np.ndarray:
    """[R + 1] seconds: where each slot of a clip begins, and the last one ends.

    Half way between the middles of what the slots have heard, which is where `slots_before` counts.
    """
    heard = np.arange(0, samples + 1, 80)
    wanted = np.arange(1, int(rule.slots(samples)) + 1)
    middles = np.append(heard, samples)[np.searchsorted(rule.slots_before(heard), wanted)]
    half = np.diff(middles).mean() / 2 if len(middles) > 1 else samples / 2
    between = (middles[1:] + middles[:-1]) / 2
    ends = max(0.0, middles[0] - half), min(float(samples), middles[-1] + half)
    return np.array([ends[0], *between, ends[1]]) / SAMPLE_RATE


@torch.no_grad()
def nearest_tokens(responder: Responder, slots_RH: torch.Tensor) -> list[str]:
    """[R] the token whose embedding each slot points to, by cosine."""
    model = responder.model
    table_VH = model.embeddings.table
    rows = -1 - torch.arange(len(slots_RH), device=slots_RH.device)
    slots_RH = normalize(model.embeddings(slots_RH, rows).float(), dim=1)
    best = torch.full((len(slots_RH),), -2.0, device=slots_RH.device)
    ids = torch.zeros(len(slots_RH), dtype=torch.long, device=slots_RH.device)
    for first in range(0, len(table_VH), _ROWS):
        part = normalize(table_VH[first : first + _ROWS].float(), dim=1)
        cosine, at = (slots_RH @ part.T).max(1)
        ids = torch.where(cosine > best, at + first, ids)
        best = torch.maximum(best, cosine)
    return [responder.prompt.decode([i]).strip() or "·" for i in ids.tolist()]


def heard(
    wave: np.ndarray, edges: np.ndarray, tokens: Sequence[str], words: Sequence[WordTime]
) -> Figure:
    """A clip's spectrogram, its words where they are spoken, and the slots with what they are near.

    Args:
        wave: float32 [S] at 16 kHz.
        edges: [R + 1] seconds, see `edges_of`; `tokens` [R].
    """
    tokens = tokens[:_SLOTS]
    end = float(edges[len(tokens)])
    figure = Figure(figsize=(min(30.0, max(8.0, 0.25 * len(tokens))), 4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    above.specgram(wave + 1e-6, NFFT=400, Fs=SAMPLE_RATE, noverlap=240, cmap="magma")
    above.set_ylabel("Hz")
    below.set_ylim(0, 2)
    below.set_yticks([0.5, 1.5], ["slots", "words"])
    for n, token in enumerate(tokens):
        _span(below, edges[n], edges[n + 1], 0, token, rotation=90, colour=_SPEECH)
    for word in words:
        start, stop = word.start / SAMPLE_RATE, word.end / SAMPLE_RATE
        if start < end:
            _span(below, start, stop, 1, word.text, rotation=0, colour=_TEXT)
    below.set_xlabel("s")
    below.set_xlim(0, end)
    return figure


def _span(
    axes: Axes, start: float, stop: float, row: int, text: str, rotation: float, colour: str
) -> None:
    axes.axvspan(
        start, stop, row / 2, row / 2 + 0.5, facecolor=colour, alpha=0.25, edgecolor=colour
    )
    # Texts come from the corpus and the tokenizer: a "$" is no formula.
    axes.text(
        (start + stop) / 2, row + 0.5, text, rotation=rotation, ha="center", va="center",
        fontsize=8, clip_on=True, parse_math=False,
    )  # fmt: skip


def of_clips(
    config: cfg.Config, responder: Responder, shards: ShardSet, asked: dict[int, str]
) -> Iterator[tuple[str, Figure]]:
    """Two pictures for each clip: its slots against its words, and speech against text inside.

    Args:
        asked: number of the clip in `shards` → the instruction that it is heard under.
    """
    aligner = _aligner(config, str(responder.device))
    for n, (i, instruction) in enumerate(asked.items()):
        wave = decode(shards.read(i, "flac"), max_seconds=config.data.max_seconds)
        text, language = shards.texts[i].as_py() or "", shards.languages[i].as_py()
        (slots_RH,) = responder.listen([wave], (language,))
        words: list[WordTime] = []
        if aligner is not None:
            with suppress(Unaligned, AlignError):  # the picture has its slots all the same
                words = aligner(wave, text, language)
        edges = edges_of(responder.rule, len(wave))
        yield f"slots-{n:02d}", heard(wave, edges, nearest_tokens(responder, slots_RH), words)
        if text:
            found = similarity(responder, instruction, slots_RH, text)
            yield f"similarity-{n:02d}", similarity_picture(found, len(wave) / SAMPLE_RATE)


def _aligner(config: cfg.Config, device: str) -> Aligner | None:
    """By the encoder's own CTC head, or the recogniser's; None where there is none."""
    encoder = config.model.encoder
    recogniser = config.evaluate.recogniser if config.evaluate else None
    languages = None if recogniser else encoder.languages
    try:
        return Aligner(recogniser or encoder.path, device, languages)
    except AlignError:
        return None
