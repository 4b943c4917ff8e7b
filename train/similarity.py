"""Where the LLM takes speech for text: the slots of a clip beside the tokens of its transcript.

Shapes: R slots, W tokens of the transcript, H LLM width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from torch.nn.functional import normalize

from train.model.attention import set_packed
from train.model.kernels import Packing

if TYPE_CHECKING:
    from train.model.respond import Responder


@dataclass(frozen=True)
class Layer:
    """Cosines at one depth of the LLM.

    depth   layers that have been passed; 0 for the LLM's input, slots and token embeddings
    cosine  float32 [W, R], on the CPU
    """

    depth: int
    cosine: torch.Tensor


@dataclass(frozen=True)
class Similarity:
    """`layers` from the LLM's input to its last hidden states; `tokens` [W] as text."""

    tokens: list[str]
    layers: list[Layer]


@torch.no_grad()
def similarity(
    responder: Responder, instruction: str, slots_RH: torch.Tensor, transcript: str
) -> Similarity:
    """The states that slots leave, against those of the transcript's tokens in the same prompt.

    States of one LLM all point roughly one way, which says nothing about the two; so the mean of
    all that are compared is taken off first.

    Raises:
        ValueError: the transcript has no tokens.
    """
    prompt, model = responder.prompt, responder.model
    ids = prompt.encode(transcript)
    if not ids:
        raise ValueError("the transcript is empty, there is nothing to compare with")
    prefix, suffix = prompt.parts(instruction)
    count = len(slots_RH)
    heard = [*prefix, *(-1 - i for i in range(count)), *suffix]
    read = [*prefix, *ids, *suffix]
    lengths = (len(heard), len(read))
    inputs_TH = model.embeddings(slots_RH, torch.tensor(heard + read, device=responder.device))
    positions = torch.cat([torch.arange(n) for n in lengths]).to(responder.device)
    extras = set_packed(model.decoder, Packing.of(lengths, responder.device))
    states = model.decoder.get_decoder()(
        inputs_embeds=inputs_TH[None],
        position_ids=positions[None],
        use_cache=False,
        output_hidden_states=True,
        **extras,
    ).hidden_states
    first = len(prefix)
    rows = slice(first, first + count), slice(len(heard) + first, len(heard) + first + len(ids))
    layers = []
    for depth, state in enumerate(states):
        slot_RH, token_WH = (state[0, row].float() for row in rows)
        mean_H = torch.cat([slot_RH, token_WH]).mean(0)
        cosine = normalize(token_WH - mean_H, dim=1) @ normalize(slot_RH - mean_H, dim=1).T
        layers.append(Layer(depth, cosine.cpu()))
    return Similarity([prompt.decode([i]).strip() or "·" for i in ids], layers)


def picture(found: Similarity, seconds: float) -> Figure:
    """The LLM's input, its middle and its end, side by side; slots over `seconds` of audio."""
    last = len(found.layers) - 1
    shown = [found.layers[depth] for depth in dict.fromkeys((0, last // 2, last))]
    height = max(2.5, 0.22 * len(found.tokens) + 1)
    # Not through pyplot, which keeps figures for ever and belongs to the main thread.
    figure = Figure(figsize=(11, height), layout="constrained")
    for axes, layer in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        image = axes.imshow(
            layer.cosine.numpy(), aspect="auto", vmin=-1, vmax=1, cmap="RdBu_r",
            extent=(0, seconds, len(found.tokens), 0), interpolation="nearest",
        )  # fmt: skip
        named = "the LLM's input" if layer.depth == 0 else f"after layer {layer.depth} of {last}"
        axes.set_title(named)
        axes.set_xlabel("slots, s")
        axes.set_yticks([n + 0.5 for n in range(len(found.tokens))], found.tokens, fontsize=8)
    figure.colorbar(image, ax=figure.axes, label="cosine, less the mean")
    return figure
