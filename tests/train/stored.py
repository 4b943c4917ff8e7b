"""A checkpoint as a run leaves it, of a model that was made, not trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tests import tiny
from train import checkpoint as ckpt
from train import config as cfg
from train.model.build import build

TURN = 12
"""A token that ends an answer, too."""


def stored(root: Path, tree: dict[str, Any], name: str = "run") -> Path:
    """Random weights for everything that the configuration trains; encoder and LLM lie in `root`.

    Low-rank updates, which begin as zero, are as large as the rest.
    """
    tree["run"] |= {"name": name, "output": str(root / name)}
    config = cfg.parse(tree, name)
    model = build(config.model, config.train.precision, seed=3, losses=config.losses)
    draw = torch.Generator().manual_seed(4)
    weights = {
        n: (p.detach() + 0.2 * torch.randn(p.shape, generator=draw)).float()
        for n, p in model.trained().items()
    }
    state = ckpt.State(
        step=7, epoch=1, epoch_step=2, trained=40, plan="0" * 64, tracker_run="none",
        config=config.resolved(), revision="unknown",
    )  # fmt: skip
    ckpt.write(root / name / "checkpoints" / ckpt.name_of(7), state, weights, {})
    return root / name


def tree_of(root: Path, kind: str = "wav2vec2", llm: str = "llama", **model: Any) -> dict[str, Any]:
    """A configuration over an encoder and an LLM that are made in `root` if they are not there.

    Args:
        kind, llm: of `tiny.encoder` and `tiny.llm`.
        model: `adapter`, or further settings of `encoder` and `decoder`.
    """
    if not (root / kind).exists():
        tiny.encoder(root / kind, kind)
    if not (root / llm).exists():
        _outspoken(tiny.llm(root / llm, llm))
    tree = tiny.config(root)
    tree["model"] = {
        "encoder": {"path": str(root / kind)} | model.get("encoder", {}),
        "adapter": model.get("adapter", {"bottleneck": 8}),
        "decoder": {"path": str(root / llm)} | model.get("decoder", {}),
    }
    return tree


def _outspoken(folder: Path) -> None:
    """A head of its own: with its embeddings for a head, a random LLM repeats its last token.

    And settings of decoding, of which the end of a turn alone counts.
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(5)
    head = torch.randn_like(model.get_output_embeddings().weight)
    model.get_output_embeddings().weight = torch.nn.Parameter(head)
    model.config.tie_word_embeddings = False
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=9.0,
        repetition_penalty=5.0,
        eos_token_id=[2, TURN],
        max_length=5,
    )
    model.save_pretrained(folder)
