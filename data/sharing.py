"""Prompts that several documents of a bin begin with: run once, seen by all of them.

A causal LLM's states at a prompt hang on nothing behind it, so all documents that begin with the
same tokens have the same states there. Only attention needs them once for each document; all else,
most of what a position costs, is done once. Gradients add up over the documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data.prompts import Document, Text
from data.tensors import Tensors


@dataclass
class Shared(Tensors):
    """Which of T rows stand at S positions of documents; the first U rows are shared.

    rows   int64 [S]: the row of every position, one document after another
    first  int64 [T]: the first of the positions where each row stands
    uses   int64 [U, M]: all positions where each shared row stands, -1 behind the last of them
    """

    rows: torch.Tensor
    first: torch.Tensor
    uses: torch.Tensor


def share_prompts(documents: Sequence[Document], starts: np.ndarray) -> Shared | None:
    """Share equal first parts of text among `documents`, which begin at `starts` [D + 1].

    None where no two of them begin alike.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for document, start in zip(documents, starts[:-1].tolist(), strict=True):
        if document and isinstance(document[0], Text) and document[0].ids:
            alike.setdefault(document[0].ids, []).append(start)
    alike = {ids: at for ids, at in alike.items() if len(at) > 1}
    if not alike:
        return None
    most = max(map(len, alike.values()))
    uses = np.full((sum(map(len, alike)), most), -1)
    rows = np.full(int(starts[-1]), -1)
    row = 0
    for ids, at in alike.items():
        positions = np.array(at) + np.arange(len(ids))[:, None]
        own = slice(row, row + len(ids))
        uses[own, : len(at)] = positions
        rows[positions] = np.arange(row, row + len(ids))[:, None]
        row += len(ids)
    alone = rows < 0
    rows[alone] = row + np.arange(np.count_nonzero(alone))
    _, first = np.unique(rows, return_index=True)
    return Shared(*map(torch.from_numpy, (rows, first, uses)))
