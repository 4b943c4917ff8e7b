"""Pictures say what the data and the model hold, checked on what is drawn."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection

from data.audio import SAMPLE_RATE
from data.words import WordTime
from tests.train.conftest import Workspace
from train import config as cfg
from train import pictures
from train.feed import Feed, open_feed
from train.model.respond import Responder


@pytest.fixture(scope="module")
def config(workspace: Workspace) -> cfg.Config:
    return cfg.load(workspace.config("pictures"))


@pytest.fixture(scope="module")
def feed(config: cfg.Config) -> Feed:
    return open_feed(config)


def test_bins_are_drawn_as_they_are_packed(config: cfg.Config, feed: Feed) -> None:
    figure = pictures.packing(feed.stream, config.data.tokens_per_bin)
    tokens = feed.stream.lengths.tokens(0)
    bins = [b for step in feed.stream.plan.iterate(0) for b in step][:24]
    drawn = [c for c in figure.axes[0].collections if isinstance(c, PolyCollection)]
    assert len(drawn) == 2 * len(bins) > 2
    for row, documents in enumerate(bins):
        heard, around = (c.get_paths() for c in drawn[2 * row : 2 * row + 2])
        assert len(heard) == len(around) == len(documents)
        # Each document's slots, then the rest of it, where the one before has ended.
        at = 0.0
        for i, slots, rest in zip(documents, heard, around, strict=True):
            for part in (slots, rest):
                xs = part.vertices[:, 0]
                assert xs.min() == at
                at = xs.max()
            expected = int(feed.stream.rule.slots(int(feed.stream.shards.num_samples[i])))
            assert np.ptp(slots.vertices[:, 0]) == expected > 0
        assert at == tokens[documents].sum()


def test_lengths_of_all_samples_are_counted(feed: Feed) -> None:
    figure = pictures.lengths(feed.stream)
    for axes in figure.axes:
        assert sum(bar.get_height() for bar in axes.patches) == len(feed.stream.shards)


def test_slots_follow_the_clip_to_its_end(config: cfg.Config, feed: Feed) -> None:
    rule = feed.stream.rule
    for samples in (4_000, 7_919, 32_000):
        edges = pictures.edges_of(rule, samples)
        assert len(edges) == rule.slots(samples) + 1
        assert edges[0] >= 0
        assert (np.diff(edges) > 0).all()
        assert edges[-1] <= samples / SAMPLE_RATE
        for slot, edge in enumerate(edges[:-1]):  # the middles of all before it have passed
            assert rule.slots_before(round(edge * SAMPLE_RATE)) == slot


def test_slots_that_are_tokens_are_named_after_them(config: cfg.Config) -> None:
    responder = Responder(config, None)
    embeddings = responder.model.embeddings
    ids = responder.prompt.encode("the red cat sees a house")
    with torch.no_grad():
        table = embeddings.table
        table.copy_(torch.nn.functional.layer_norm(table, table.shape[1:]))
        embeddings.weight.fill_(1.0)
        embeddings.bias.zero_()
    found = pictures.nearest_tokens(responder, 3.0 * table[ids])
    assert found == ["the", "red", "cat", "sees", "a", "house"]
    whole = pictures._ROWS
    pictures._ROWS = 2  # the table in many parts
    try:
        assert pictures.nearest_tokens(responder, table[ids]) == found
    finally:
        pictures._ROWS = whole


def test_words_and_slots_stand_where_they_are() -> None:
    words = [WordTime("one", 1_600, 8_000, 0.9), WordTime("$two$", 9_600, 14_400, 0.9)]
    edges = np.linspace(0, 1, 11)
    figure = pictures.heard(np.zeros(SAMPLE_RATE, np.float32), edges, list("abcdefghij"), words)
    below = figure.axes[1]
    assert [t.get_text() for t in below.texts] == [*"abcdefghij", "one", "$two$"]
    one, two = below.patches[-2:]
    assert (one.get_x(), one.get_width()) == pytest.approx((0.1, 0.4))
    assert (two.get_x(), two.get_width()) == pytest.approx((0.6, 0.3))
    figure.savefig(io.BytesIO())  # a lone "$" would be no formula


def test_a_bar_for_each_task_and_input() -> None:
    def row(task: str, kind: str, value: float, **changes: str) -> dict:
        made = {"metric": "answer_loss", "language": "all", "wording": "all"}
        return made | {"task": task, "input": kind, "value": value} | changes

    rows = [
        row("a", "speech", 1.5),
        row("a", "text", 0.5),
        row("b", "speech", 2.5),
        row("a", "speech", 9.0, language="en"),
        row("a", "speech", 9.0, metric="wer"),
    ]
    figure = pictures.losses(rows)
    assert figure is not None
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights[0] == 0.5  # text
    assert np.isnan(heights[1])
    assert heights[2:] == [1.5, 2.5]
    assert pictures.losses(rows[-1:]) is None


def test_a_clip_has_both_pictures_and_one_without_words_has_its_slots(
    config: cfg.Config, feed: Feed, tmp_path: Path
) -> None:
    shards = feed.stream.shards
    found = list(pictures.of_clips(config, Responder(config, None), shards, {0: "repeat this"}))
    assert [name for name, _ in found] == ["slots-00", "similarity-00"]
    for name, figure in found:
        figure.savefig(tmp_path / f"{name}.png")
