"""Every decoder family: packed, it says what transformers' own forward says of one document."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from train import config as cfg
from train.model.attention import set_packed
from train.model.build import load_decoder, whole
from train.model.kernels import Packing
from train.model.speech_llm import SpeechEmbeddings

# Longer and shorter than the windows of `tiny.FAMILIES`; a prime; one position.
LENGTHS = (1, 13, 4, 12, 7)

# Two layers of float32 sums of some ten terms, in two orders.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(params=tiny.FAMILIES)
def decoder(request: pytest.FixtureRequest, tmp_path: Path) -> torch.nn.Module:
    tiny.llm(tmp_path / "llm", request.param)
    model = cfg.Model.model_validate(
        {"encoder": {"path": "none"}, "decoder": {"path": str(tmp_path / "llm")}}
    )
    return load_decoder(model, torch.float32)


def documents(decoder: torch.nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randint(3, decoder.config.vocab_size, (n,)) for n in LENGTHS]


def packed_logits(decoder: torch.nn.Module, ids: list[torch.Tensor]) -> list[torch.Tensor]:
    table = SpeechEmbeddings(decoder, whole)  # text rows as training gets them
    inputs = table(torch.zeros(0, table.table.shape[1]), torch.cat(ids))
    positions = torch.cat([torch.arange(len(d)) for d in ids])
    lengths = tuple(len(d) for d in ids)
    extras = set_packed(decoder, Packing.of(lengths))
    out = decoder(
        inputs_embeds=inputs[None], position_ids=positions[None], use_cache=False, **extras
    )
    set_packed(decoder, None)
    return list(out.logits[0].split(lengths))


@torch.no_grad()
def test_packed_is_transformers_own_forward(decoder: torch.nn.Module) -> None:
    ids = documents(decoder)
    decoder.set_attn_implementation("eager")
    for document, found in zip(ids, packed_logits(decoder, ids), strict=True):
        alone = decoder(input_ids=document[None], use_cache=False).logits[0]
        torch.testing.assert_close(found, alone, **TOLERANCE)


@torch.no_grad()
def test_a_document_does_not_see_its_neighbours(decoder: torch.nn.Module) -> None:
    ids = documents(decoder)
    before = packed_logits(decoder, ids)
    ids[1] = (ids[1] + 1) % decoder.config.vocab_size
    after = packed_logits(decoder, ids)
    for i in (0, 2, 3, 4):
        assert torch.equal(before[i], after[i])
    assert not torch.equal(before[1], after[1])
