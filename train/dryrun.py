"""`--dry-run`: what a run trains, holds, moves and computes, from configs, without weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.table import Table
from torch import nn

from train import config as cfg
from train.blueprint import Blueprint
from train.engine import policy
from train.flops import Flops
from train.footprint import ANSWER, PROMPT, SECONDS, Planned, Typical
from train.memory import Counts, Plan, total
from train.progress import console

# Of a GPU's memory, what its context, the libraries and the allocator's gaps take.
_SPARE = 0.08
_STEP = 256  # token budgets are suggested in multiples of this


def groups(parts: Blueprint) -> dict[str, dict[str, int]]:
    """Parameter counts: {"trained": {part: count}, "frozen": {part: count}}."""
    modules = {"adapter": parts.adapter, "encoder": parts.encoder, "decoder": parts.decoder}
    modules |= parts.others
    trained = {name: _count(part, trained=True) for name, part in modules.items()}
    if trained["adapter"]:
        trained["layer norm"] = 2 * parts.decoder.config.hidden_size
    frozen = {name: _count(part, trained=False) for name, part in modules.items()}
    return {
        "trained": {name: count for name, count in trained.items() if count},
        "frozen": {
            name: count for name, count in frozen.items() if count or name in ("encoder", "decoder")
        },
    }


def counts(parts: Blueprint) -> Counts:
    """What `train.memory` asks for."""
    found = groups(parts)
    table: Any = parts.decoder.get_input_embeddings().weight
    head = parts.decoder.get_output_embeddings()
    linear = [m for m in parts.decoder.modules() if isinstance(m, nn.Linear) and m is not head]
    return Counts(
        trained=sum(found["trained"].values()),
        encoder=found["frozen"]["encoder"],
        decoder=found["frozen"]["decoder"],
        table=table.numel(),
        linear=sum(m.weight.numel() for m in linear if not m.weight.requires_grad),
    )


def planned(config: cfg.Config, ranks: int, gpu_memory: float | None) -> dict[str, Any]:
    """The plan of one rank of `ranks`, as `--json` writes it; sizes in bytes.

    Args:
        gpu_memory: GB of one device; given, also what a micro-batch of `data.tokens_per_bin`
            positions takes, and the largest budget that fits. That runs the model on fake tensors,
            which takes some seconds.
    """
    parts = Blueprint.of(config.model, config.losses)
    plan = Plan(config, policy(config.train), counts(parts), ranks)
    tokens = config.data.tokens_per_bin
    batch = Typical(config, parts.encoder).batch(tokens)
    flops = Flops(parts.encoder, parts.adapter, parts.decoder)
    positions = sum(batch.lengths)
    work = flops.of(flops.useful(batch))
    if config.model.decoder.checkpointing:
        work["decoder, again"] = flops.again(flops.useful(batch))
    memory: dict[str, Any] = {**plan.held(), "communication": plan.buffers()}
    found: dict[str, Any] = {
        "parameters": groups(parts),
        "ranks": ranks,
        "memory": memory,
        "moved_per_step": plan.moved(math.ceil(config.data.bins_per_step / ranks)),
        "flops_per_token": {part: done.total / positions for part, done in work.items()},
    }
    if gpu_memory is None:
        return found
    room = gpu_memory * 1e9 * (1 - _SPARE) - total(memory)
    try:
        model = Planned(config)
        memory["activations"] = {"at most": model.peak(tokens)}
        found["largest_tokens_per_bin"] = largest(model, room)
    except RuntimeError as e:  # what fake tensors cannot do: the rest of the plan stands
        found["activations_unknown"] = f"{type(e).__name__}: {e}".splitlines()[0]
    return found


def largest(model: Planned, room: float) -> int:
    """The largest token budget whose activations fit into `room` bytes; 0 if none does.

    Activations grow with the positions in a straight line, but for what a single bin takes in any
    case: two budgets give it.
    """
    small, large = ((n, model.peak(n)) for n in (2048, 8192))
    lengths = [sum(model.typical.batch(n).lengths) for n, _ in (small, large)]
    slope = (large[1] - small[1]) / (lengths[1] - lengths[0])
    base = small[1] - slope * lengths[0]
    return max(0, int((room - base) / slope) // _STEP * _STEP)


def dry_run(
    config: cfg.Config,
    json_path: Path | None,
    ranks: int = 1,
    gpu_memory: float | None = None,
) -> None:
    """Print the resolved config and its plan (see `planned`); optionally write them as JSON."""
    found = planned(config, ranks, gpu_memory)
    console.print(yaml.safe_dump(config.shown(), sort_keys=False))
    _show("parameters", found["parameters"], "count", 1)
    _show(f"memory of each of {ranks} ranks", found["memory"], "MB", 1e6)
    moved = {"received": found["moved_per_step"]}
    _show("communication of a step, per rank", moved, "MB", 1e6)
    _show("operations per LLM position", {"": found["flops_per_token"]}, "GFLOP", 1e9)
    console.print(
        f"planned with utterances of {SECONDS:g} s, {PROMPT} tokens of prompt and {ANSWER} of "
        f"answer; data.tokens_per_bin is {config.data.tokens_per_bin}"
    )
    if "activations_unknown" in found:
        console.print(f"activations are not known: {found['activations_unknown']}")
    elif gpu_memory is not None:
        fits = found["largest_tokens_per_bin"]
        console.print(
            f"largest data.tokens_per_bin that fits {gpu_memory:g} GB: {fits}"
            if fits
            else f"does not fit {gpu_memory:g} GB: see memory; more ranks, ZeRO-3 or offload"
        )
    if json_path is not None:
        tree = {"config": config.shown(), **found}
        json_path.write_text(json.dumps(tree, indent=1) + "\n")


def _show(title: str, groups: dict[str, dict[str, float]], unit: str, scale: float) -> None:
    table = Table(title=title)
    for name, justify in (("part", "left"), ("what", "left"), (unit, "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for group, members in groups.items():
        for what, value in members.items():
            table.add_row(group, what, f"{value / scale:,.{0 if scale == 1 else 1}f}")
    if len(groups) > 1 and scale != 1:
        table.add_row("all", "", f"{sum(sum(m.values()) for m in groups.values()) / scale:,.1f}")
    console.print(table)


def _count(module: torch.nn.Module, trained: bool) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad == trained)
