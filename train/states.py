"""How alike speech and text leave the LLM: its last hidden state where it is to answer.

BLSP (2309.00916) shows that an adapter trained on transcription alone drives the LLM into the
same state whatever the instruction, and that one trained on continuations keeps instructions apart
and speech beside text. Three of these figures compare with the text of the same utterance:

    state_cosine        cosine of the two states under the same instruction
    state_l2            their distance, over the length of the text's state
    instruction_match   whether, among the utterance's instructions, the text's state that is
                        nearest (by cosine) is that of the same instruction, in percent

one is about the instructions themselves, for text as for any other input:

    instruction_cosine  mean cosine of an utterance's states under instructions of unlike tasks

and one about the answer (`train.evaluation` asks for it):

    answer_loss         cross entropy of the expected answer and its end, per token

States of one LLM all point roughly one way, so cosines near 1 mean little by themselves; compare
inputs and adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from data.tasks import Item
from train.metrics import Mean

_SCORER = "last hidden state at the prompt's end"
METRICS = {
    metric.name: metric
    for metric in (
        Mean("state_cosine", _SCORER),
        Mean("state_l2", _SCORER, higher_is_better=False),
        Mean("instruction_match", _SCORER),
        Mean("instruction_cosine", _SCORER, higher_is_better=False),
        Mean("answer_loss", "mean over the answer's tokens", higher_is_better=False),
    )
}


@dataclass(frozen=True)
class Measured:
    """One number about one question with one kind of input."""

    item: Item
    input: str
    metric: str
    value: float


def measure(items: list[Item], states: dict[str, torch.Tensor]) -> list[Measured]:
    """The figures of one utterance.

    Args:
        items: what was asked about it, [N].
        states: kind of input → [N, H] float32 states, `text` among them.
    """
    found = []
    for kind, state_NH in states.items():
        if kind != "text":
            found += _beside_text(items, kind, state_NH, states["text"])
        found += [
            Measured(item, kind, "instruction_cosine", value)
            for item, value in zip(items, _spread(items, state_NH), strict=True)
            if value is not None
        ]
    return found


def _beside_text(
    items: list[Item], kind: str, state_NH: torch.Tensor, text_NH: torch.Tensor
) -> list[Measured]:
    cosine_NN = normalize(state_NH, dim=1) @ normalize(text_NH, dim=1).T
    l2_N = (state_NH - text_NH).norm(dim=1) / text_NH.norm(dim=1)
    columns = {"state_cosine": cosine_NN.diagonal().tolist(), "state_l2": l2_N.tolist()}
    if len(items) > 1:
        nearest = cosine_NN.argmax(1).tolist()
        columns["instruction_match"] = [100.0 * (n == j) for n, j in enumerate(nearest)]
    return [
        Measured(item, kind, name, value)
        for name, values in columns.items()
        for item, value in zip(items, values, strict=True)
    ]


def _spread(items: list[Item], state_NH: torch.Tensor) -> list[float | None]:
    """[N] each state's mean cosine with those under other tasks; None where there are none."""
    cosine_NN = normalize(state_NH, dim=1) @ normalize(state_NH, dim=1).T
    tasks = [item.task for item in items]
    unlike_NN = torch.tensor([[a != b for b in tasks] for a in tasks])
    counts = unlike_NN.sum(1).tolist()
    sums = (cosine_NN * unlike_NN).sum(1).tolist()
    return [s / c if c else None for s, c in zip(sums, counts, strict=True)]
