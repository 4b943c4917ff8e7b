"""The layout of a bin against a plain reading of its documents, position by position."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.collate import Clip, Sample, Skip, collate, dummy_batch
from data.prompts import Speech, Text


def clip(samples: int, slots: int) -> Clip:
    return Clip(np.full(samples, samples, np.float32), samples, samples // 2, slots)


texts = st.builds(Text, st.lists(st.integers(0, 99), max_size=5).map(tuple), st.booleans())


@st.composite
def documents(draw):
    slots = draw(st.integers(0, 7))
    start = draw(st.integers(0, slots))
    speech = Speech(start, draw(st.integers(0, slots - start)))
    parts = draw(st.lists(st.one_of(texts, st.just(speech)), max_size=5))
    prompt = Text(draw(st.sampled_from([(7,), (7, 8, 9), (5, 6)])))
    return (prompt, *parts), clip(draw(st.integers(1, 9)), slots)


@given(st.lists(documents(), max_size=6))
def test_against_a_plain_reading(made) -> None:
    batch = collate([Sample(str(n), *pair) for n, pair in enumerate(made)], bin=3)
    source, positions, starts, label_rows, label_ids = [], [], [0], [], []
    first_row = 0
    for document, its_clip in made:
        position = 0
        for part in document:
            if isinstance(part, Speech):
                new = [-(first_row + part.start + k) - 1 for k in range(part.count)]
            else:
                new = list(part.ids)
            for entry in new:
                if isinstance(part, Text) and part.labelled:
                    label_rows.append(len(source) - 1)
                    label_ids.append(entry)
                source.append(entry)
                positions.append(position)
                position += 1
        starts.append(len(source))
        first_row += its_clip.slots
    assert batch.source.tolist() == source
    assert batch.positions.tolist() == positions
    assert batch.cu_seqlens.tolist() == starts
    assert batch.label_rows.tolist() == label_rows
    assert batch.label_ids.tolist() == label_ids
    assert batch.num_labels == len(label_ids)
    assert list(batch.lengths) == np.diff(starts).tolist()
    assert batch.max_seqlen == max(batch.lengths, default=0)
    dtypes = [batch.source.dtype, batch.positions.dtype, batch.label_rows.dtype]
    assert dtypes == [torch.int64] * 3
    assert (batch.label_ids.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int32)
    assert batch.features.dtype == torch.float32
    clips = [its_clip for _, its_clip in made]
    assert batch.samples == tuple(c.samples for c in clips)
    for n, c in enumerate(clips):
        assert (batch.features[n, : c.samples] == c.samples).all()
        assert not batch.features[n, c.samples :].any()


@given(st.lists(documents(), max_size=6))
def test_prompts_are_shared_and_nothing_else_changes(made) -> None:
    samples = [Sample(str(n), *pair) for n, pair in enumerate(made)]
    plain, batch = collate(samples), collate(samples, share=True)
    prompts = [document[0].ids for document, _ in made]
    often = {ids: prompts.count(ids) for ids in prompts if prompts.count(ids) > 1}
    assert batch.num_shared == sum(len(ids) * (count - 1) for ids, count in often.items())
    if not often:
        assert batch.shared is None
        return
    rows, first, uses = vars(batch.shared).values()
    assert torch.equal(batch.source[rows], plain.source)
    assert torch.equal(batch.positions[rows], plain.positions)
    assert torch.equal(rows[plain.label_rows], batch.label_rows)
    assert torch.equal(batch.label_ids, plain.label_ids)
    assert (batch.lengths, batch.num_labels) == (plain.lengths, plain.num_labels)
    for row, at in enumerate(first.tolist()):
        places = torch.nonzero(rows == row)[:, 0].tolist()
        assert at == places[0]
        if row < len(uses):
            assert [place for place in uses[row].tolist() if place >= 0] == places
            assert len(places) > 1
        else:
            assert places == [at]


def test_all_text_keeps_its_clip_and_log_mel_is_padded_at_the_end() -> None:
    mel = [np.ones((4, 3), np.float32), np.ones((4, 5), np.float32)]
    clips = [Clip(m, m.shape[1] * 160, m.shape[1], 1) for m in mel]
    batch = collate([Sample("a", (Text((1, 2)),), clips[0]), Sample("b", (Text((3,)),), clips[1])])
    assert batch.features.shape == (2, 4, 5)
    assert batch.features.sum() == 4 * 8
    assert batch.slots == (1, 1)
    assert (batch.source >= 0).all()


def test_a_label_needs_something_before_it() -> None:
    for document in ((Text((1,), True),), (Text(()), Speech(0, 0), Text((1,), True))):
        with pytest.raises(ValueError, match=r"k: .*begins with a label"):
            collate([Sample("k", document, clip(2, 1))])
    batch = collate([Sample("k", (Speech(0, 1), Text((1,), True)), clip(2, 1))])
    assert batch.label_rows.tolist() == [0]


@pytest.mark.parametrize("speech", [Speech(0, 3), Speech(2, 1), Speech(-1, 1), Speech(0, -1)])
def test_slots_beyond_the_clip(speech: Speech) -> None:
    with pytest.raises(ValueError, match=r"k: slots .* but its clip has 2"):
        collate([Sample("k", (speech,), clip(2, 2))])


def test_dummy_runs_everything_and_weighs_nothing() -> None:
    batch = dummy_batch(clip(8, 2), epoch=1, step=2, bin=-1, skipped=[Skip("k", "why")])
    assert (batch.weight, batch.num_labels, batch.keys) == (0.0, 0, ())
    assert len(batch.label_rows) == 1
    assert sorted(-batch.source[batch.source < 0] - 1) == [0, 1]
    assert (batch.epoch, batch.step, batch.bin, batch.skipped[0].key) == (1, 2, -1, "k")


def test_moving_keeps_everything_else() -> None:
    batch = collate([Sample("k", (Text((1,)), Speech(0, 2)), clip(8, 2))], epoch=4)
    moved = batch.to("meta")
    assert moved.source.device.type == "meta"
    assert batch.source.device.type == "cpu"
    assert (moved.keys, moved.epoch, moved.slots) == (("k",), 4, (2,))
