"""Out of memory, in one line: in which batch, at what, and which budget to lower."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from data.collate import Batch

SAMPLE_RATE = 16_000
_SAID = ("out of memory", "can't allocate memory", "ALLOC_FAILED")


class OutOfMemory(RuntimeError):
    """A micro-batch does not fit into memory."""


@contextmanager
def blamed_on(batch: Batch, rank: int) -> Iterator[None]:
    """Whatever runs out of memory inside did so because of `batch`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_it(error):
            raise
        raise OutOfMemory(describe(batch, rank, error)) from None


def describe(batch: Batch, rank: int, error: BaseException) -> str:
    """The line; audio is heard before text is read, so the trace tells which was too much."""
    tokens, seconds = sum(batch.lengths), sum(batch.samples) / SAMPLE_RATE
    names = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    audio = f"data.seconds_per_bin below {seconds:.0f}"
    text = f"data.tokens_per_bin below {tokens}"
    # Of no help to the encoder, which keeps nothing as it is.
    other = "set model.decoder.checkpointing if it is off, "
    if "listen" in names:
        at, fix, other = "while it was heard", audio, ""
    elif "backward" in names:
        at, fix = "in the backward pass", f"{text}, or {audio}"
    else:
        at, fix = "in the LLM", text
    return (
        f"out of memory on rank {rank} {at}, in bin {batch.bin} of step {batch.step} of epoch "
        f"{batch.epoch}: {len(batch.lengths)} documents, {tokens} positions, {seconds:.0f} s of "
        f"audio, the longest {max(batch.samples, default=0) / SAMPLE_RATE:.0f} s; lower {fix} (for "
        f"a new run: the order of the data follows from it), {other}or give each rank less of the "
        "model"
    )


def _is_it(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(said in str(error) for said in _SAID)
