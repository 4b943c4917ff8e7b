"""The model card of an exported folder: README.md with data, targets, scores and limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from train import checkpoint as ckpt
from train import config as cfg
from train.provenance import targets_say
from train.states import METRICS as STATES

_INPUTS = ("speech", "text", "cascade", "shuffled", "none")

_USE = """\
```python
from transformers import AutoModel, AutoProcessor

processor = AutoProcessor.from_pretrained("{folder}", trust_remote_code=True)
model = AutoModel.from_pretrained("{folder}", trust_remote_code=True)
inputs = processor(audio=wave, text="{instruction}")  # wave: float32 [samples], 16 kHz, mono
print(processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0])
```"""


def model_card(found: ckpt.Checkpoint, config: cfg.Config, folder: str, merged: bool) -> str:
    """README.md of the export of a checkpoint.

    Scores are those of `evaluation.json` (rows of `train/evaluate.py --json`) in the checkpoint, or
    else in its run's folder, where it is there.
    """
    model, state = config.model, found.state
    targets = _targets(config)
    front = {
        "library_name": "transformers",
        "pipeline_tag": "audio-text-to-text",
        "base_model": [model.decoder.path, model.encoder.path],
        "tags": ["speech", "hearken"],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {config.run.name}\n",
        f"A speech LLM: `{model.decoder.path}` hears through `{model.encoder.path}` and a trained "
        f"adapter (`{model.adapter.kind}`"
        + (", low-rank updates" if model.encoder.lora or model.decoder.lora else "")
        + "). "
        + (
            "Everything is in this folder, low-rank updates merged."
            if merged
            else "This folder has what was trained alone: encoder and LLM are loaded by their "
            "names, and must have the hashes that `config.json` has of them."
        )
        + "\n",
        "## Use\n",
        _USE.format(folder=folder, instruction="What is said?") + "\n",
        "Needs transformers and torch. The code that `trust_remote_code` runs is in this folder "
        "(`hearken_*.py`). Several texts with a clip each are one batch; `num_beams`, `streamer` "
        "and the rest of `generate` work; for conversations see `apply_chat_template`.\n",
        "## Training\n",
        _table(
            ("", ""),
            [
                ("data", ", ".join(f"`{s}`" for s in config.data.shards)),
                ("targets", ", ".join(f"`{t}`" for t in config.data.targets)),
                ("targets' tasks", ", ".join(targets.get("tasks", ())) or "not known"),
                ("teacher", str(targets.get("teacher") or "not known")),
                ("losses", ", ".join(f"{n} × {w:g}" for n, w in config.losses.weights.items())),
                ("steps", f"{state.step:,}, {state.trained:,} samples, epoch {state.epoch}"),
                ("skipped samples", str(len(state.skipped))),
                ("precision", config.train.precision),
                ("prompt", f"`{json.dumps(config.prompt, ensure_ascii=False)}`"),
                ("code", f"`{state.revision}`"),
                ("order of data", f"`{state.plan}`"),
            ],
        ),
        "## Scores\n",
        _scores(found.path),
        "## Limits\n",
        "\n".join(f"- {line}" for line in _limits(config)) + "\n",
    ]
    return "\n".join(parts)


def _targets(config: cfg.Config) -> dict[str, Any]:
    """What the target shards say of themselves; empty where they are gone."""
    metas = targets_say(config.data.targets)
    if not metas:
        return {}
    return {
        "tasks": sorted({str(task) for meta in metas for task in meta.get("tasks", ())}),
        "teacher": ", ".join(sorted({str(m["teacher"]) for m in metas if m.get("teacher")})),
    }


def _scores(checkpoint: Path) -> str:
    places = (checkpoint / "evaluation.json", checkpoint.parents[1] / "evaluation.json")
    path = next((p for p in places if p.exists()), None)
    if path is None:
        return "Not evaluated: there was no `evaluation.json` in the checkpoint or its run.\n"
    of = "this checkpoint" if path == places[0] else "its run, of the checkpoint evaluated last"
    tree = json.loads(path.read_text(encoding="utf-8"))
    rows = tree["rows"] if isinstance(tree, dict) else tree
    cells: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        everywhere = row["language"] == "all" and row.get("wording", "all") == "all"
        if everywhere and row["metric"] not in STATES:
            cells.setdefault((row["task"], row["metric"]), {})[row["input"]] = row
    kinds = [k for k in _INPUTS if any(k in found for found in cells.values())]
    lines = [
        (
            *names,
            str(next(iter(found.values()))["count"]),
            *(f"{found[k]['value']:.2f}" if k in found else "" for k in kinds),
        )
        for names, found in sorted(cells.items())
    ]
    return (
        _table(("task", "metric", "count", *kinds), lines)
        + f"\nFrom the `evaluation.json` of {of}. `text` reads the transcript (upper bound), "
        "`cascade` the encoder's own; `shuffled` hears another clip, `none` nothing (floors).\n"
    )


def _limits(config: cfg.Config) -> list[str]:
    limits = [
        f"Recordings of up to {config.data.max_seconds:g} s, 16 kHz, one channel; longer ones are "
        "refused.",
        "One turn about one recording is what it was trained on; several turns or recordings are "
        "beyond that.",
        "What the LLM gets wrong when it reads, it gets wrong when it hears.",
    ]
    if config.model.encoder.languages:
        limits.append(f"Languages: {', '.join(sorted(config.model.encoder.languages))}.")
    return limits


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
