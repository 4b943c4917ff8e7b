"""docs/claims.md, docs/claims.json and the plots, from whatever seeds are complete."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

from examples.micro.claims import figures as f
from examples.micro.claims import systems as s
from examples.micro.claims.figures import Outcome
from examples.micro.claims.reasons import REASONS, SPREAD
from examples.micro.claims.table import CLAIMS, FIXED, Claim, Finding, Side, verdict
from examples.micro.settings import CorpusSettings
from train.compare import over_seeds
from train.tracking import Tracker, run_tags

IMAGES = "img"


def write(docs: Path, seeds: s.Seeds, minutes: float) -> None:
    """Everything under `docs`, and a run in the tracker.

    Args:
        minutes: of all jobs, one after another.
    """
    found = [
        (claim, [Finding(c, seeds.of(c.left.system, c.right.system)) for c in claim.comparisons])
        for claim in CLAIMS
    ]
    (docs / IMAGES).mkdir(parents=True, exist_ok=True)
    rows = [_row(claim, finding) for claim, findings in found for finding in findings]
    (docs / "claims.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    _plot_scores(docs / IMAGES / "claims_scores.png", seeds)
    _plot_losses(docs / IMAGES / "claims_losses.png", seeds)
    text = _page(found, seeds, minutes)
    (docs / "claims.md").write_text(text, encoding="utf-8")
    _track(docs, found)
    for claim, findings in found:
        print(f"{claim.number:>3}  {verdict(findings):<14} {claim.says}")


def _row(claim: Claim, finding: Finding) -> dict[str, object]:
    comparison = finding.comparison
    steps = _trained(finding, lambda system: str(system.steps))
    utterances = _trained(finding, lambda system: _utterances(system.shards))
    return {
        "claim": claim.number,
        "source": claim.source,
        "must_hold": claim.must,
        "inequality": comparison.says,
        "left": _side(comparison.left, finding.left),
        "right": _side(comparison.right, finding.right),
        "difference": finding.differences,
        "steps": steps,
        "utterances": utterances,
        "seeds": len(finding.seeds),
        "holds": finding.verdict == "holds",
        "verdict": finding.verdict,
        "note": claim.says if finding.verdict == "holds" else REASONS.get(claim.number, SPREAD),
    }


def _side(side: Side, values: list[float]) -> dict[str, object]:
    value, low, high = over_seeds(values)
    named = {"system": side.system, "figure": side.figure.name, "unit": side.figure.unit}
    return named | {"value": value, "low": low, "high": high, "per_seed": values}


def _page(found: list[tuple[Claim, list[Finding]]], seeds: s.Seeds, minutes: float) -> str:
    took = f"Its jobs take {minutes:.0f} minutes in all, two at a time half of that. "
    parts = [
        "# The papers' claims in the micro world",
        "",
        f"Written by `make claims`. {took}{_numbers(seeds)}, each trained by "
        "`deepspeed train/main.py` under ZeRO-3; all runs are in MLflow, experiment `claims`. "
        f"Evaluated on {3 * s.HELD_OUT_PER_LANGUAGE} held-out sentences in three languages by "
        "held-out voices. Figures are means over seeds with Student's 95 % interval; a comparison "
        "**holds** where the interval of the seeds' paired differences lies on the claimed side, "
        "does **not** where it lies on the other, else it is *parity*. A claim holds where all its "
        f"comparisons do. With {len(seeds.every)} seeds intervals are wide: parity often means "
        "not known. Claim E's systems got more seeds before any of them was run, claim C's after "
        "three had left it open.",
        "",
        "The micro world has sentences of a small grammar, an LLM of 0.6 M and an encoder of 1 M "
        "parameters: what fails here need not fail at size, nor the reverse.",
        "",
        "## Systems",
        "",
        "| system | what | recipe | utterances | steps | WER | BLEU | unseen SLU | agrees |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
        *(_system(system, seeds) for system in s.SYSTEMS),
        *(_bound(name) for name in ("cascade", "text")),
        "",
        "All have one adapter (three convolutions, 0.53 M) and one schedule; "
        f"{_utterances(s.FULL)} utterances or fewer, batches of up to 48 s. `BLEU` is the mean of "
        "three languages, `unseen SLU` of sentiment, what, when and summarise, which no system is "
        "trained on; translation is trained in the multi-task systems alone. `agrees`: "
        "continuations from speech that are word for word the text's.",
        "",
        f"![scores of the systems]({IMAGES}/claims_scores.png)",
        f"![losses]({IMAGES}/claims_losses.png)",
        "",
        "## Claims",
        "",
        "| # | source | claim | comparison | left | right | | steps | utterances |",
        "|---|---|---|---|---:|---:|---|---:|---:|",
    ]
    for claim, findings in found:
        head = [claim.number, claim.source, f"{claim.says}: **{verdict(findings)}**"]
        for finding in findings:
            parts.append(_line(head, finding))
            head = ["", "", ""]
    parts += ["", "## What does not hold, or not clearly", ""]
    for claim, findings in found:
        if verdict(findings) != "holds":
            parts.append(
                f"- **{claim.number}** ({verdict(findings)}): {REASONS.get(claim.number, SPREAD)}"
            )
    return "\n".join(parts) + "\n"


def _numbers(seeds: s.Seeds) -> str:
    parts = [f"{len(seeds.every)} seeds of every system"]
    named = [f"{len(seeds.of(name))} of `{name}`" for name in seeds.more]
    return ", ".join(parts + named)


def _line(head: list[str], finding: Finding) -> str:
    left, right = finding.comparison.left, finding.comparison.right
    cells = [
        *head,
        finding.comparison.says,
        _figure(left, finding.left),
        _figure(right, finding.right),
        {"holds": "holds", "does not hold": "**not**", "parity": "*parity*"}[finding.verdict],
        _trained(finding, lambda system: str(system.steps)),
        _trained(finding, lambda system: _utterances(system.shards)),
    ]
    return "| " + " | ".join(cells) + " |"


def _trained(finding: Finding, of: Callable[[s.System], str]) -> str:
    """What both sides were trained with, where they were."""
    sides = (finding.comparison.left, finding.comparison.right)
    names = [side.system.partition("/")[0] for side in sides]
    known = {system.name: system for system in s.SYSTEMS if system.name != "untrained"}
    return " / ".join(dict.fromkeys(of(known[name]) for name in names if name in known))


def _figure(side: Side, values: list[float]) -> str:
    value, low, high = over_seeds(values)
    if side.system in FIXED or low is None or high is None:
        return _digits(value)
    return f"{_digits(value)} ± {_digits((high - low) / 2)}"


def _digits(value: float) -> str:
    if abs(value) >= 2 or value == int(value):
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.05 else f"{value:.2g}"


_SHOWN = (f.WER, f.BLEU, f.SLU, f.AGREEMENT)


def _system(system: s.System, seeds: s.Seeds) -> str:
    cells = [f"`{system.name}`", system.says, system.config, _utterances(system.shards)]
    cells.append("0" if system.name == "untrained" else str(system.steps))
    for figure in _SHOWN:
        side = Side(system.name, figure)
        cells.append(_figure(side, side.values(seeds.of(system.name))) if system.inputs else "")
    return "| " + " | ".join(cells) + " |"


def _bound(name: str) -> str:
    o = Outcome("bounds", 0, name)
    cells = [
        f"`{name}`",
        {"text": "the transcript", "cascade": "the encoder's own transcript"}[name],
    ]
    cells += ["", "", "", *(_digits(figure.of(o)) for figure in _SHOWN)]
    return "| " + " | ".join(cells) + " |"


def _utterances(shards: str) -> str:
    each = s.FEW_PER_LANGUAGE if shards == s.FEW else CorpusSettings().train_per_language
    return str(each * (1 if shards == s.ENGLISH else 3))


def _plot_scores(path: Path, seeds: s.Seeds) -> None:
    shown = [system for system in s.SYSTEMS if system.inputs]
    groups = (f.BLEU, f.SLU, f.OWN)
    figure, axes = plt.subplots(figsize=(8, 3.4), dpi=80)
    for n, group in enumerate(groups):
        values = [Side(system.name, group).values(seeds.of(system.name)) for system in shown]
        at = [i + 0.26 * (n - 1) for i in range(len(shown))]
        axes.bar(at, [mean(v) for v in values], 0.24, label=group.name)
        across = [x for x, found in zip(at, values, strict=True) for _ in found]
        axes.scatter(across, [v for found in values for v in found], s=5, c="black")
    axes.set_xticks(range(len(shown)), [system.name for system in shown], rotation=40, ha="right")
    axes.set_ylim(0, 100)
    axes.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _plot_losses(path: Path, seeds: s.Seeds) -> None:
    figure, axes = plt.subplots(figsize=(5, 3), dpi=80)
    for number, name in enumerate(("cont", "cont_ctc", "cont_few", "multi")):
        for seed in seeds.every:
            losses = f.smoothed(Outcome(name, seed).losses)
            label = name if seed == seeds.every[0] else None
            axes.plot(losses, color=f"C{number}", linewidth=0.8, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy per token")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _track(docs: Path, found: list[tuple[Claim, list[Finding]]]) -> None:
    tracker = Tracker("sqlite:///mlflow.db", "claims", "claims", tags=run_tags("claims"))
    verdicts = [verdict(findings) for _, findings in found]
    tracker.values(
        {f"claims/{v.replace(' ', '_')}": float(verdicts.count(v)) for v in sorted(set(verdicts))}
    )
    for path in (
        docs / "claims.md",
        docs / "claims.json",
        *sorted((docs / IMAGES).glob("claims_*")),
    ):
        tracker.file(path, "claims")
    tracker.close()
