"""What is frozen stays as it was: digests of every frozen weight, before a run and after it.

What ought to be frozen is read from the configuration, not from `requires_grad`: a weight that was
unfrozen by mistake is exactly what this is to find.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from data.convert import write_text
from train import config as cfg
from train.model.speech_llm import Gathered, SpeechLLM


class FrozenError(RuntimeError):
    """A weight that was to be frozen has changed."""


def frozen(model: SpeechLLM, settings: cfg.Model) -> dict[str, torch.Tensor]:
    """Name → every weight and buffer of the encoder and the LLM that no training may change."""
    modules: dict[str, torch.nn.Module] = {"encoder": model.encoder}
    found: dict[str, torch.Tensor] = {}
    if settings.decoder.train == "none":
        modules["decoder"] = model.decoder
        found["embeddings.table"] = model.embeddings.table
    for part, module in modules.items():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            found[f"{part}.{name}"] = tensor
    return {name: tensor for name, tensor in found.items() if "lora_" not in name}


@torch.no_grad()
def digests(tensors: dict[str, torch.Tensor], gathered: Gathered) -> dict[str, str]:
    """Name → SHA-256 of the bytes; the same on any number of ranks. A collective.

    Args:
        gathered: see `Gathered`; the partitioned ones are made whole one at a time.
    """
    found = {}
    for name, tensor in tensors.items():
        with gathered([tensor] if isinstance(tensor, torch.nn.Parameter) else []):
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found[name] = hashlib.sha256(raw.numpy().tobytes()).hexdigest()
    return found


@contextmanager
def unchanged(
    model: SpeechLLM, settings: cfg.Model, gathered: Gathered, record: Path | None
) -> Iterator[None]:
    """The frozen weights are the same to the last bit when the context ends. A collective.

    Args:
        record: JSON file to leave, {tensors, before, after, changed}; None on all ranks but one.
    Raises:
        FrozenError: some are not; the message names them.
    """
    before = digests(frozen(model, settings), gathered)
    yield
    after = digests(frozen(model, settings), gathered)
    changed = [name for name in before if before[name] != after[name]]
    if record is not None:
        facts = {
            "tensors": len(before),
            "before": _whole(before),
            "after": _whole(after),
            "changed": changed,
        }
        write_text(record, json.dumps(facts, indent=1) + "\n")
    if changed:
        raise FrozenError(
            f"{len(changed)} of {len(before)} frozen weights have changed in this run, the first "
            f"is {changed[0]}; whatever was trained is not what the configuration says"
        )


def _whole(found: dict[str, str]) -> str:
    """One digest of them all."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(found.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
