"""Scores of answers against references, by the field's own libraries."""

from __future__ import annotations

import jiwer
import sacrebleu


def score(metric: str, answers: list[str], references: list[str]) -> float:
    """Percent, over a whole set.

    Args:
        metric: `wer` (jiwer, lower-cased, white space folded), `bleu` (sacrebleu's corpus BLEU,
            default signature) or `exact` (whole answer, lower-cased).
    Raises:
        ValueError: unknown metric, or lists of unlike length.
    """
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers for {len(references)} references")
    if metric == "bleu":
        return float(sacrebleu.corpus_bleu(answers, [references]).score)
    said, meant = [_plain(a) for a in answers], [_plain(r) for r in references]
    if metric == "wer":
        return 100.0 * float(jiwer.wer(meant, said))
    if metric == "exact":
        return 100.0 * sum(a == b for a, b in zip(said, meant, strict=True)) / max(1, len(said))
    raise ValueError(f"unknown metric {metric!r}; known are wer, bleu, exact")


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
