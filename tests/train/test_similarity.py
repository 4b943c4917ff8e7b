"""Slots beside the transcript's tokens: slots that are the tokens are like them at every depth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from train import config as cfg
from train.model.respond import Responder
from train.similarity import picture, similarity

SAID = "the red cat sees a house"


@pytest.fixture(scope="module")
def responder(tmp_path_factory: pytest.TempPathFactory) -> Responder:
    """A tiny model whose last LayerNorm leaves its own text embeddings as they are."""
    root = tmp_path_factory.mktemp("similarity")
    tiny.encoder(root / "encoder")
    tiny.llm(root / "llm")
    made = Responder(cfg.parse(tiny.config(root, train__precision="fp32"), "test"), None)
    embeddings = made.model.embeddings
    with torch.no_grad():
        table = embeddings.table
        table.copy_(torch.nn.functional.layer_norm(table, table.shape[1:]))
        embeddings.weight.fill_(1.0)
        embeddings.bias.zero_()
    return made


def test_slots_that_are_the_tokens_are_like_them_at_every_depth(responder: Responder) -> None:
    ids = responder.prompt.encode(SAID)
    found = similarity(responder, "repeat this", responder.model.embeddings.table[ids], SAID)
    assert found.tokens == SAID.split()
    assert [layer.depth for layer in found.layers] == [0, 1, 2]
    for layer in found.layers:
        # eps of the LayerNorm alone parts the two.
        assert layer.cosine.diagonal() == pytest.approx(1.0, abs=1e-3)
        others = layer.cosine - torch.eye(len(ids))
        assert float(others.max()) < 0.99  # so the diagonal says something


def test_rows_and_columns_are_the_tokens_and_the_slots_and_nothing_around_them(
    responder: Responder,
) -> None:
    """The LLM's input, worked out by hand from the table: no row of the prompt is among them."""
    table = responder.model.embeddings.table
    slots_RH = table[responder.prompt.encode(SAID)]
    tokens_WH = table[responder.prompt.encode("old dog")]
    mean_H = torch.cat([slots_RH, tokens_WH]).mean(0)
    expected = torch.cosine_similarity(
        (tokens_WH - mean_H)[:, None], (slots_RH - mean_H)[None], dim=2
    )
    found = similarity(responder, "repeat this", slots_RH, "old dog")
    torch.testing.assert_close(found.layers[0].cosine, expected, atol=1e-3, rtol=0)


def test_it_has_a_row_for_each_token_and_a_column_for_each_slot(responder: Responder) -> None:
    found = similarity(responder, "", torch.randn(9, 32), "old dog")
    assert {tuple(layer.cosine.shape) for layer in found.layers} == {(2, 9)}
    assert max(float(layer.cosine.abs().max()) for layer in found.layers) <= 1.0001


def test_an_empty_transcript_is_refused(responder: Responder) -> None:
    with pytest.raises(ValueError, match="transcript is empty"):
        similarity(responder, "", torch.randn(4, 32), "")


def test_the_picture_has_the_tokens_and_the_time(responder: Responder, tmp_path: Path) -> None:
    figure = picture(similarity(responder, "", torch.randn(9, 32), "old dog"), seconds=1.5)
    *panels, _ = figure.axes
    assert [axes.get_xlim() for axes in panels] == [(0.0, 1.5)] * 3
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["old", "dog"]
    figure.savefig(tmp_path / "similarity.png")
