"""What no evaluation asks of trained runs: `python -m examples.micro.claims.measure SEED SYSTEM…`.

On the LLM's own continuations of held-out sentences, in float32: how far the LLM that hears is
from itself reading (KL at temperature 1), and what becomes of one batch where every document's
positions jump to the end of the longest clip, as BLSP's padding made them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from data.collate import Batch, Sample, collate
from data.convert import write_text
from data.stream import Stream
from examples.micro.claims.pieces import MEASURED
from examples.micro.claims.prepare import targets_of
from examples.micro.claims.systems import HELD_OUT, run_of
from train import checkpoint as ckpt
from train import config as cfg
from train.feed import open_feed
from train.model.attention import set_packed
from train.model.build import build
from train.model.kernels import Packing
from train.model.respond import load_trained
from train.model.speech_llm import SpeechLLM

_ONE_BATCH = 24
_LOSSES = cfg.Losses(ce=1.0, kl=cfg.ResponseKL(temperature=1.0))


def held_out(found: ckpt.Checkpoint) -> cfg.Config:
    """A run's own configuration, with the held-out continuations as its data."""
    config = cfg.parse(found.state.config, str(found.path))
    data = config.data.model_copy(
        update={
            "shards": (HELD_OUT,),
            "targets": (f"{targets_of('heldout')}/targets-*.tar",),
            "words": (),
            "states": (),
            "interleave": None,
            "workers": 0,
        }
    )
    return config.model_copy(update={"data": data, "losses": _LOSSES})


@torch.no_grad()
def divergence(model: SpeechLLM, stream: Stream) -> dict[str, float]:
    """Mean cross entropy and KL(text‖speech) of a label, over all held-out continuations."""
    sums, labels = torch.zeros(2, dtype=torch.float64), 0
    for batches in stream.steps(0):
        for batch in batches:
            sums += model(batch).double()
            labels += batch.num_labels
    ce, kl = (sums / labels).tolist()
    return {"ce": ce, "kl": kl}


@torch.no_grad()
def position_gap(model: SpeechLLM, samples: list[Sample]) -> dict[str, float]:
    """How far one batch's answers are from each document's alone, in nats per label."""
    alone = torch.cat([label_scores(model, collate([sample])) for sample in samples])
    batch = collate(samples)
    return {
        "packed": (label_scores(model, batch) - alone).abs().mean().item(),
        "gap": (label_scores(model, with_gap(batch)) - alone).abs().mean().item(),
    }


def label_scores(model: SpeechLLM, batch: Batch) -> torch.Tensor:
    """[labels] log probability of each label."""
    slots_RH = model.listen(batch.features, batch.samples, batch.frames, batch.languages)
    inputs_TH = model.embeddings(slots_RH, batch.source)
    extras = set_packed(model.decoder, Packing(batch.lengths, batch.cu_seqlens, batch.shared))
    hidden_TH = model.decoder.get_decoder()(
        inputs_embeds=inputs_TH[None],
        position_ids=batch.positions[None],
        use_cache=False,
        **extras,
    ).last_hidden_state[0]
    logits_LV = model.decoder.get_output_embeddings()(hidden_TH[batch.label_rows])
    return logits_LV.float().log_softmax(-1).gather(1, batch.label_ids[:, None])[:, 0]


def with_gap(batch: Batch) -> Batch:
    """What follows a clip begins where the batch's longest clip would end."""
    positions = batch.positions.clone()
    starts = batch.cu_seqlens.tolist()
    for slots, start, stop in zip(batch.slots, starts, starts[1:], strict=False):
        last = start + int(torch.nonzero(batch.source[start:stop] < 0).max())
        positions[last + 1 : stop] += max(batch.slots) - slots
    return replace(batch, positions=positions)


def main(seed: int, systems: list[str]) -> None:
    found: dict[str, dict[str, float]] = {}
    checkpoints = {name: ckpt.find(Path(run_of(name, seed))) for name in systems}
    config = held_out(checkpoints[systems[0]])
    stream = open_feed(config).stream
    model = build(config.model, "fp32", seed=seed, losses=_LOSSES).eval()
    samples = [stream.read(i, 0, 0) for i in range(_ONE_BATCH)]
    for name, checkpoint in checkpoints.items():
        load_trained(model, checkpoint.weights)
        found[name] = divergence(model, stream) | position_gap(model, samples)
        print(name, found[name], flush=True)
    write_text(MEASURED / f"{seed}.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
