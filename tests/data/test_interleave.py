"""Interleaving: every word once, heard or read; counted to the position; the same anywhere."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.archive import Row, ShardError, write_shard
from data.audio import encode_flac
from data.augment import Augment
from data.interleave import Interleave, InterleaveError
from data.prompts import Prompt, Speech, Text
from data.shards import Overlay, ShardSet, write_overlay
from data.stream import Stream
from data.words import WordTime, parse_words, split_words, words_record
from tests.data import made
from tests.data.test_stream import fingerprint
from train.model.lengths import Conv, LengthRule

WORDS = "a the old cat sees, dog! bird's house — today 1984".split()
RULE = LengthRule((Conv(400, 320),), (Conv(5, 2, 2), Conv(5, 2, 2)))
STACKED = LengthRule((Conv(1, 160), Conv(3, 2, 1)), (Conv(4, 4),))
EACH = (1.0, 0.9, 1.1)
SETTINGS = [
    Interleave((1, 3), pure_speech=0.3),
    Interleave((2, 4), "random", 0.3, 0.0),
    Interleave((3, 10), pure_speech=0.5),
]


def times(text: str, samples: int, seed: int) -> list[WordTime]:
    """Random times in order; some words take none, some have no pause between."""
    words = split_words(text)
    draws = np.random.default_rng(seed)
    edges = np.sort(draws.integers(0, samples + 1, 2 * len(words)))
    edges[1::5] = edges[0::5][: len(edges[1::5])]
    return [
        WordTime(text[a:b], int(start), int(end), 0.5)
        for (a, b), start, end in zip(words, edges[::2], edges[1::2], strict=True)
    ]


def corpus(folder: Path, texts: list[str], unaligned: tuple[int, ...] = (), per_shard: int = 20):
    """Shards, targets and word times of `texts`."""
    draws = np.random.default_rng(len(texts))
    records = []
    for first in range(0, len(texts), per_shard):
        rows = []
        for n, text in enumerate(texts[first : first + per_shard], first):
            samples = int(draws.integers(3000, 40_000))
            about = {"text": text, "language": "en", "speaker": "s"}
            members = {"flac": encode_flac(made.noise(samples, n)), "json": b"{}"}
            rows.append(Row(f"k{n}", members, {"num_samples": samples, **about}))
            record = {"words": [], "unaligned": "too short"}
            if n not in unaligned:
                record = words_record(times(text, samples, n))
            records.append((f"k{n}", record))
        write_shard(folder / "s" / f"train-{first:06d}.tar", rows, made.FIELDS, {})
    base = ShardSet.open(folder / "s")
    write_overlay(folder / "w" / "words.tar", records[::-1], "words.json", base=base)
    words = Overlay.open(folder / "w", base, "words.json")
    return base, made.targets(folder / "t", base, per_sample=2), words


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    draws = np.random.default_rng(0)
    texts = [" ".join(draws.choice(WORDS, size=size)) for size in draws.integers(1, 25, 57)]
    texts += ["cat", "", "我 love 東京です, ok 7"]
    return corpus(tmp_path_factory.mktemp("interleave"), texts, unaligned=(3, 20, 58))


def build(data, interleave, *, rule=RULE, seed=3, workers=0, speeds=(1.0,), tokenizer=None):
    base, targets, words = data
    prompt = Prompt(tokenizer or made.ByteTokenizer(), "U {instruction} : {input} A")
    return Stream.build(
        base, targets, prompt, rule, made.waveform, seed=seed, tokens_per_bin=400,
        seconds_per_bin=6.0, bins_per_step=3, workers=workers, augment=Augment(speeds),
        words=words, interleave=interleave,
    )  # fmt: skip


def samples_of(stream: Stream, epoch: int):
    targets = stream.lengths.target_of(epoch)
    for i in range(len(stream.shards)):
        yield i, stream.read(i, int(targets[i]), epoch)


def inputs(sample) -> list[Text | Speech]:
    """What stands between the prompt's two parts."""
    return list(sample.document[1:-2])


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("rule", [RULE, STACKED])
def test_positions_are_what_collation_finds(data, settings, rule) -> None:
    stream = build(data, settings, rule=rule, speeds=EACH)
    keys = data[0].keys.to_pylist()
    for epoch in (0, 1):
        planned = dict(zip(keys, stream.lengths.tokens(epoch), strict=True))
        seen = []
        for step in stream.steps(epoch):
            for batch in step:
                assert len(batch.source) <= 400
                assert list(batch.lengths) == [planned[k] for k in batch.keys] or not batch.keys
                assert not batch.skipped
                seen += batch.keys
        assert sorted([*seen, *(skip.key for skip in stream.skipped(epoch))]) == sorted(keys)
        assert len(seen) > 40


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_word_is_heard_or_read_once(data, settings) -> None:
    base = data[0]
    stream = build(data, settings, speeds=EACH)
    plain = build((*data[:2], None), None, speeds=EACH)
    targets = stream.lengths.target_of(1)
    interleaved = 0
    for i, sample in samples_of(stream, 1):
        heard_only = plain.read(i, int(targets[i]), 1)
        assert sample.document[-2:] == heard_only.document[-2:]  # the suffix, and the labels
        assert sample.document[0] == heard_only.document[0]
        parts = inputs(sample)
        if parts == [Speech(0, sample.clip.slots)]:
            continue
        interleaved += 1
        words = stream.lengths.words
        spelling = words.tokens(i)
        slot_ends = words.slot_ends(1)[words.first[i] : words.first[i + 1]].tolist()
        assert slot_ends[-1] == sample.clip.slots
        # After each part, the words that may have been told so far: some lie in no slot.
        told = {0}
        for part in parts:
            told = {
                last + 1
                for first in told
                for last in range(first, len(slot_ends))
                if part == part_of(first, last, part, spelling, slot_ends)
            }
        assert len(split_words(base.texts[i].as_py())) in told
        slots = [p for p in parts if isinstance(p, Speech)]
        assert all(p.count > 0 for p in slots)
        assert 0 < sum(p.count for p in slots) <= sample.clip.slots
    assert interleaved > 10


def part_of(first: int, last: int, like: Text | Speech, spelling, slot_ends) -> Text | Speech:
    """The words `first` to `last`, heard or read."""
    if isinstance(like, Speech):
        start = slot_ends[first - 1] if first else 0
        return Speech(start, slot_ends[last] - start)
    ends = [0, *spelling.word_ends.tolist()]
    assert min(ends[first], ends[last + 1]) >= 0
    return Text(tuple(spelling.ids[ends[first] : ends[last + 1]]))


def test_spans_are_as_long_as_asked_and_alternate(data) -> None:
    stream = build(data, Interleave((2, 4), pure_speech=0.0))
    interleaver = stream.lengths.interleaver
    lengths = []
    chosen = np.flatnonzero(np.diff(stream.lengths.words.first) > 0)
    draws = np.random.default_rng(0).integers(0, 2**63, len(stream.lengths.words.token_ends))
    sample, start, stop, number = interleaver._cut(chosen, draws.astype(np.uint64))
    for i in chosen:
        own = sample == i
        assert list(number[own]) == list(range(own.sum()))
        assert start[own][0] == stream.lengths.words.first[i]
        assert stop[own][-1] == stream.lengths.words.first[i + 1]
        assert (start[own][1:] == stop[own][:-1]).all()
        lengths += (stop - start)[own][:-1].tolist()
    assert set(lengths) == {2, 3, 4}
    kinds = [[isinstance(p, Text) for p in inputs(s)] for _, s in samples_of(stream, 0)]
    # Speech in which no slot lies is read, so text may follow text; speech never follows speech.
    assert not any(not (a or b) for some in kinds for a, b in pairwise(some))
    both = [some for some in kinds if len(some) > 1]
    assert {some[0] for some in both} == {True, False}


def test_shares_hold_and_change_with_epoch_and_seed(tmp_path) -> None:
    data = corpus(tmp_path, ["the old cat sees a dog today"] * 300, per_shard=300)

    def drawn(settings: Interleave, seed: int, epoch: int) -> list[tuple]:
        stream = build(data, settings, seed=seed)
        tokens = [stream.lengths.words.tokens(i).ids for i in range(300)]
        return [stream.lengths.interleaver.parts(i, epoch, tokens[i]) for i in range(300)]

    settings = Interleave((1, 1), "random", 0.3, 0.25)
    found = drawn(settings, 1, 0)
    pure = sum(not parts for parts in found) / 300
    # Plus those whose seven words all fell on one side, and what little has no slot.
    assert 0.25 < pure < 0.45
    kinds = [isinstance(p, Text) for parts in found for p in parts]
    assert 0.25 < np.mean(kinds) < 0.55
    assert drawn(settings, 1, 0) == found
    assert drawn(settings, 1, 1) != found
    # Where spans alternate, the samples that stay whole are told by their own draw alone.
    in_turn = replace(settings, span_words=(4, 4), order="alternate")
    whole = [[not parts for parts in drawn(in_turn, 1, epoch)] for epoch in (0, 1)]
    assert whole[0] != whole[1]
    assert drawn(settings, 2, 0) != found
    assert not any(drawn(replace(settings, pure_speech=1.0), 1, 0))
    everything = build(data, replace(settings, pure_speech=1.0))
    assert (everything.lengths.tokens(0) == build(data, None).lengths.tokens(0)).all()


def test_exact_on_resume_and_on_any_ranks_and_workers(data) -> None:
    def prints(stream: Stream, start: int = 0, **where) -> list[list[str]]:
        return [[fingerprint(b) for b in step] for step in stream.steps(1, start, **where)]

    settings = SETTINGS[0]
    whole = prints(build(data, settings, speeds=EACH))
    assert prints(build(data, settings, speeds=EACH, workers=2), 1) == whole[1:]
    late = build(data, settings, speeds=EACH)
    late.lengths.tokens(0)  # another epoch has been looked at
    assert prints(late, 2) == whole[2:]
    ranks = [prints(build(data, settings, speeds=EACH), rank=r, world=3) for r in range(3)]
    assert [[rank[n][0] for rank in ranks] for n in range(len(whole))] == whole


def test_off_unless_asked_for(data) -> None:
    plain, with_words = build((*data[:2], None), None), build(data, None)
    for (_, one), (i, other) in zip(samples_of(plain, 0), samples_of(with_words, 0), strict=True):
        assert one.document == other.document
        assert one.words == ()
        assert bool(other.words) == (i not in (3, 20, 58))


@pytest.mark.parametrize("speeds", [(1.0,), EACH])
def test_words_have_slots_of_their_own(data, speeds) -> None:
    stream = build(data, None, speeds=speeds)
    for i, sample in samples_of(stream, 0):
        if not sample.words:
            continue
        used = [s for word in sample.words for s in range(word.start, word.start + word.count)]
        assert used == sorted(set(used))
        assert all(0 <= slot < sample.clip.slots for slot in used)
        text = data[0].texts[i].as_py()
        assert [t for word in sample.words for t in word.ids] == stream.prompt.encode(text)
        assert len(sample.words) == len(split_words(text))
        # The middle of each of its slots is heard within the word.
        spoken = parse_words(data[2].record(i))
        speed = int(data[0].num_samples[i]) / sample.clip.samples
        for word, time in zip(sample.words, spoken, strict=True):
            for slot in range(word.start, word.start + word.count):
                middle = (slot * 4 * 320 + 199.5) * speed
                assert time.start - 2 <= middle <= time.end + 2


def test_slots_stand_for_the_middle_of_what_they_see() -> None:
    for rule in (RULE, STACKED, LengthRule((Conv(10, 5), Conv(8, 4)), (Conv(3, 2), Conv(4, 1, 3)))):
        convs = (*rule.front_end, *rule.adapter)
        for slot in range(20):
            low = high = slot
            for conv in reversed(convs):
                low = low * conv.stride - conv.padding
                high = high * conv.stride - conv.padding + conv.kernel - 1
            middle = (low + high) / 2
            assert rule.slots_before(max(0, math.floor(middle))) <= slot or middle < 0
            assert rule.slots_before(max(0, math.floor(middle) + 1)) == slot + 1 or middle < 0
        at = np.arange(0, 30_000, 7)
        found = rule.slots_before(at)
        assert (np.diff(found) >= 0).all()
        assert found.tolist() == [rule.slots_before(int(a)) for a in at]


def test_an_utterance_of_few_words_is_heard(tmp_path) -> None:
    texts = ["cat", "the old cat", "", "the old cat sees a dog today"]
    stream = build(corpus(tmp_path, texts), Interleave((3, 3), pure_speech=0.0))
    for epoch in range(4):
        found = [inputs(sample) for _, sample in samples_of(stream, epoch)]
        assert [len(parts) for parts in found[:3]] == [1, 1, 1]
        assert all(isinstance(parts[0], Speech) for parts in found[:3])
    assert (stream.lengths.tokens(0) > 0).all()


def test_settings_and_words_that_do_not_fit(data, tmp_path) -> None:
    for wrong in ({"span_words": (0, 3)}, {"span_words": (4, 3)}, {"pure_speech": 1.5},
                  {"text_share": -0.1}):  # fmt: skip
        with pytest.raises(InterleaveError, match=next(iter(wrong))):
            Interleave(**wrong)
    with pytest.raises(ValueError, match="needs word times"):
        build((*data[:2], None), Interleave())
    base, targets, _ = corpus(tmp_path, ["the old cat"])
    record = words_record([WordTime("the", 0, 100, 0.5)])
    write_overlay(tmp_path / "x.tar", [(base.key(0), record)], "words.json", base=base)
    wrong_words = Overlay.open(tmp_path / "x.tar", base, "words.json")
    with pytest.raises(ShardError, match=r"x\.tar: 1 word times for the 3 words of 'k0'"):
        build((base, targets, wrong_words), None)
    late = words_record([WordTime("the", 100, 200, 0.5), WordTime("cat", 150, 300, 0.5)])
    with pytest.raises(ValueError, match="word 1: begins before"):
        write_overlay(tmp_path / "y.tar", [(base.key(0), late)], "words.json", base=base)


LINES = ["the old cat sees a dog today", "a bird's house, the green house", "我 love 東京です"] * 5


def byte_level() -> Tokenizer:
    made_ = Tokenizer(models.BPE())
    made_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made_.decoder = decoders.ByteLevel()
    made_.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=350, initial_alphabet=(
        pre_tokenizers.ByteLevel.alphabet())))  # fmt: skip
    return made_


def unigram() -> Tokenizer:
    made_ = Tokenizer(models.Unigram())
    made_.pre_tokenizer = pre_tokenizers.Metaspace()
    made_.decoder = decoders.Metaspace()
    made_.train_from_iterator(LINES, trainers.UnigramTrainer(
        vocab_size=80, unk_token="<unk>", special_tokens=["<unk>"]))  # fmt: skip
    return made_


def across_words() -> Tokenizer:
    """Merges that run over spaces, as SentencePiece may be told to make them."""
    made_ = Tokenizer(models.BPE())
    made_.normalizer = normalizers.Replace(" ", "▁")
    made_.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=120))
    return made_


@pytest.mark.parametrize("kind", [byte_level, unigram, across_words])
def test_spans_are_spelled_as_in_the_whole_text(kind) -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=kind(), eos_token="</s>", unk_token="<unk>")
    prompt = Prompt(fast, "{input}")
    texts = [*LINES[:3], "x", "  cat  dog ", "the old cat sees"]
    words = [split_words(text) for text in texts]
    parted = 0
    for text, spans, spelling in zip(texts, words, prompt.encode_words(texts, words), strict=True):
        assert spelling.ids == prompt.encode(text)
        ends = spelling.word_ends.tolist()
        assert ends[-1] == len(spelling.ids)
        slowly = prompt._encode_by_beginnings(text, spans)
        certain = [e for e in ends if e >= 0]
        assert certain == sorted(certain)
        parted += len(certain)
        for (_, stop), end, slow in zip(spans, ends, slowly.word_ends.tolist(), strict=True):
            if end >= 0 and kind is not across_words:
                assert end == slow
                begun = fast.decode(spelling.ids[:end]).replace("▁", " ")
                assert begun.split() == text[:stop].split() or "x" in text
    assert parted > len(texts)
    if kind is across_words:
        assert any((s.word_ends < 0).any() for s in prompt.encode_words(texts, words))


def test_words_that_share_a_token_stay_together(data, tmp_path) -> None:
    data = corpus(tmp_path, LINES)
    fast = PreTrainedTokenizerFast(tokenizer_object=across_words(), eos_token="</s>")
    stream = build(data, Interleave((1, 2), pure_speech=0.0), tokenizer=fast)
    keys = data[0].keys.to_pylist()
    planned = dict(zip(keys, stream.lengths.tokens(0), strict=True))
    for i, sample in samples_of(stream, 0):
        count = sum(p.count if isinstance(p, Speech) else len(p.ids) for p in sample.document)
        assert count == planned[keys[i]]
        merged = [t for word in sample.words for t in word.ids]
        assert merged == stream.prompt.encode(LINES[i])
