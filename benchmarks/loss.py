"""Times the losses at a head of 250,880 words, and the memory they take, against plain logits.

    python -m benchmarks.loss [--json FILE] [--device cuda] [--quick] [--case TEXT]

Names: `hearken` ours, in chunks; `one_piece`: logits at all labels at once, by autograd;
`full_logits`: logits at every position, of which the labels' rows are used, as transformers'
models compute their loss; `floor`: the two matrix products with the head alone.

Everything of one case is measured in turn, in one run; times are medians. `full_logits` does not
fit most machines, so it is measured at a share of the positions and of the labels, beside the
others at the same share. Its `peak_bytes` at full size are scaled: they grow linearly with the
positions, and two shares give the line.

Here the bars of the loss are measured, at 8,192 positions with 1,500 labels: `peak_ratio` of
`one_piece` at least 4, of `full_logits` at least 20, and `forward_backward_seconds` of neither
below ours; of `full_logits` at its share.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import Run, _leaf, _peak_bytes, measure, recycle_memory
from benchmarks.report import Report
from train.loss import Divergence, Head, chunked, plain

VOCABULARY, POSITIONS, LABELS = 250_880, 8_192, 1_500
HIDDEN = {"cpu": 256, "cuda": 4_096}
SHARES = (1 / 16, 1 / 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    if options.device == "cpu":
        recycle_memory()
    report = Report("loss")
    rounds, words = (1 if options.quick else 5), VOCABULARY
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    head = Head(
        _leaf(words, HIDDEN[options.device], scale=0.02, dtype=dtype, device=options.device)
    )
    head.weight.requires_grad_(False)
    for name, kl in {"cross entropy": None, "response KL": Divergence(2.0)}.items():
        tail = f"{words} words {str(dtype).removeprefix('torch.')} {options.device}"
        if options.case in (case := f"{name}, {LABELS} of {POSITIONS} positions, {tail}"):
            runs = loss_runs(head, 1.0, kl, options.device)
            del runs["full_logits"]
            measure(report, case, runs, rounds, options.device)
            del runs
            scale_up(report, case, head, kl, options.device)
        share = SHARES[-1]
        if options.case in (case := f"{name}, {share:.3g} of that, {tail}"):
            measure(
                report, case, loss_runs(head, share, kl, options.device), rounds, options.device
            )
        if options.json:
            report.write(options.json)
    print(report.markdown())


def loss_runs(head: Head, share: float, kl: Divergence | None, device: str) -> dict[str, Run]:
    """The same loss of the same hidden states in every way, at a share of the positions."""
    positions, labels = round(POSITIONS * share), round(LABELS * share)
    hidden, dtype = head.weight.shape[1], head.weight.dtype
    x_TH = _leaf(positions, hidden, dtype=dtype, device=device)
    teacher_TH = _leaf(positions, hidden, dtype=dtype, device=device).detach()
    rows = torch.arange(labels, device=device) * positions // labels
    ids = torch.randint(len(head.weight), (labels,), device=device)
    which = {"ce": kl is None, "kl": kl}

    def hearken() -> tuple[Tensor, tuple[Tensor]]:
        x_LH, teacher_LH = x_TH[rows], teacher_TH[rows]
        known = chunked(x_LH, head, ids, teacher_LH=teacher_LH, **which)  # type: ignore[arg-type]
        return known.attach(x_LH), (x_TH,)

    def one_piece() -> tuple[Tensor, tuple[Tensor]]:
        teacher = head.raw(teacher_TH[rows]) if kl else None
        return plain(head.raw(x_TH[rows]), ids, teacher_LV=teacher, **which), (x_TH,)  # type: ignore[arg-type]

    def full_logits() -> tuple[Tensor, tuple[Tensor]]:
        teacher = head.raw(teacher_TH).float()[rows] if kl else None
        logits = head.raw(x_TH).float()[rows]
        return plain(logits, ids, teacher_LV=teacher, **which), (x_TH,)  # type: ignore[arg-type]

    def floor() -> tuple[Tensor, tuple[Tensor]]:
        if kl:
            head.raw(teacher_TH[rows])
        return F.linear(x_TH[rows], head.weight), (x_TH,)

    return {"hearken": hearken, "one_piece": one_piece, "full_logits": full_logits, "floor": floor}


def scale_up(report: Report, case: str, head: Head, kl: Divergence | None, device: str) -> None:
    """Adds the memory of full logits at full size, and how many times ours each rival takes."""
    less, more = (
        _peak_bytes(loss_runs(head, share, kl, device)["full_logits"], device) for share in SHARES
    )
    slope = (more - less) / (SHARES[1] - SHARES[0])
    report.add(case, "full_logits", "peak_bytes", less + slope * (1 - SHARES[0]), "B")
    peaks = {
        row["name"]: row["value"]
        for row in report.rows
        if row["case"] == case and row["metric"] == "peak_bytes"
    }
    for name in ("one_piece", "full_logits"):
        report.add(case, name, "peak_ratio", peaks[name] / peaks["hearken"], "x ours")


if __name__ == "__main__":
    main()
