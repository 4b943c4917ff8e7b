"""The stream: exactly the plan, whatever the ranks, workers and starts; faults are named."""

import hashlib
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from data import retry
from data.archive import ShardError, write_shard
from data.collate import Batch
from data.lengths import LengthTable
from data.prompts import Prompt
from data.retry import ReadError
from data.shards import Overlay, ShardSet, write_overlay
from data.stream import Stream
from tests.data import made


def build(base: ShardSet, overlay: Overlay, workers: int = 0, **more) -> Stream:
    budgets = {"tokens_per_bin": 120, "seconds_per_bin": 4.0, "bins_per_step": 3} | more
    prompt = Prompt(made.ByteTokenizer(), "U {instruction} : {input} A")
    return Stream.build(
        base, overlay, prompt, made.Rule(), made.waveform, seed=3, workers=workers, **budgets
    )


def fingerprint(batch: Batch) -> str:
    whole = hashlib.sha256()
    for name, value in sorted(vars(batch).items()):
        whole.update(name.encode())
        whole.update(value.numpy().tobytes() if hasattr(value, "numpy") else repr(value).encode())
    return whole.hexdigest()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[ShardSet, Overlay]:
    folder = tmp_path_factory.mktemp("stream")
    base = made.shards(folder / "s", [7, 5, 0, 9])
    return base, made.targets(folder / "t", base, per_sample=2)


def test_every_sample_once_and_within_budget(data) -> None:
    stream = build(*data)
    steps = list(stream.steps(0))
    assert len(steps) == stream.steps_in_epoch(0) > 1
    batches = [batch for step in steps for batch in step]
    keys = [key for batch in batches for key in batch.keys]
    assert sorted(keys) == sorted(data[0].keys.to_pylist())
    assert stream.skipped(0) == []
    for batch in batches:
        assert len(batch.source) <= 120
        assert sum(batch.samples) <= 4 * 16_000
        assert batch.weight == (1.0 if batch.keys else 0.0)
    assert stream.wait_seconds > 0


def test_length_table_is_what_collation_finds(data) -> None:
    stream = build(*data)
    for epoch in (0, 1):
        planned = dict(zip(data[0].keys.to_pylist(), stream.lengths.tokens(epoch), strict=True))
        for step in stream.steps(epoch):
            for batch in step:
                assert list(batch.lengths) == [planned[k] for k in batch.keys] or not batch.keys


def test_targets_take_turns(data) -> None:
    lengths = build(*data).lengths
    first, second, third = (lengths.target_of(epoch) for epoch in range(3))
    assert ((first + second) == 1).all()
    assert (first == third).all()
    assert 0 < first.sum() < len(first)


def test_batches_are_bit_identical_on_any_ranks_workers_and_starts(data) -> None:
    whole = [[fingerprint(b) for b in step] for step in build(*data).steps(1)]
    parallel = build(*data, workers=2)
    assert [[fingerprint(b) for b in step] for step in parallel.steps(1, 1)] == whole[1:]
    for world in (2, 3, 5):
        ranks = [list(build(*data).steps(1, 1, rank=r, world=world)) for r in range(world)]
        for number in range(len(whole) - 1):
            shares = [rank[number] for rank in ranks]
            assert {len(share) for share in shares} == {-(-3 // world)}
            real = {b.bin: fingerprint(b) for share in shares for b in share if b.bin >= 0}
            assert [real[n] for n in range(3)] == whole[number + 1]
            assert all(b.weight == 0 for share in shares for b in share if b.bin < 0)


def test_content_faults_are_skipped_and_named(tmp_path) -> None:
    good = made.row("good", 8000)
    rows = [
        good,
        made.row("cut", 8000, flac=made.row("cut", 8000).members["flac"][:3000]),
        made.row("short", 8000, flac=made.row("x", 7999).members["flac"]),
    ]
    write_shard(tmp_path / "s.tar", rows, made.FIELDS, {})
    base = ShardSet.open(tmp_path / "s.tar")
    stream = build(base, made.targets(tmp_path / "t", base))
    (batch, *others) = next(stream.steps(0))
    assert batch.keys == ("good",)
    reasons = {skip.key: skip.reason for skip in batch.skipped}
    assert reasons["cut"].startswith("truncated")
    assert reasons["short"] == "7999 samples decoded, but its index says 8000"
    assert all(other.weight == 0 for other in others)


def test_a_bin_whose_samples_all_failed_is_a_dummy(tmp_path) -> None:
    write_shard(tmp_path / "s.tar", [made.row("bad", 8000, flac=b"x")], made.FIELDS, {})
    base = ShardSet.open(tmp_path / "s.tar")
    batch = next(build(base, made.targets(tmp_path / "t", base)).steps(0))[0]
    assert (batch.weight, batch.num_labels, batch.skipped[0].key) == (0.0, 0, "bad")
    assert sum(batch.slots) > 0


def test_too_long_and_too_short_are_known_before(tmp_path) -> None:
    rows = [made.row("long", 70_000), made.row("short", 2000), made.row("fine", 8000)]
    write_shard(tmp_path / "s.tar", rows, made.FIELDS, {})
    base = ShardSet.open(tmp_path / "s.tar")
    stream = build(base, made.targets(tmp_path / "t", base))
    assert [(s.key, s.reason.split(":")[0].split()[0]) for s in stream.skipped(0)] == [
        ("long", "seconds"),
        ("short", "too"),
    ]
    assert [b.keys for b in next(stream.steps(0))] == [("fine",), (), ()]


@pytest.mark.parametrize("failures", [2, 99])
def test_refused_reads_are_tried_again_and_then_stop(data, monkeypatch, failures) -> None:
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.0, 0.0))
    left = [failures]
    read = ShardSet.read

    def refusing(self, i, member):
        if member == "flac" and left[0] > 0:
            left[0] -= 1
            raise OSError(5, "Input/output error")
        return read(self, i, member)

    monkeypatch.setattr(ShardSet, "read", refusing)
    steps = build(*data).steps(0)
    if failures < 4:
        assert next(steps)[0].keys
    else:
        with pytest.raises(OSError, match=r"train-0.*tar: sample 'k\d-\d' .* in 4 tries"):
            next(steps)


def test_records_that_lie_about_their_targets(tmp_path) -> None:
    base = made.shards(tmp_path / "s", [1])
    record = {"targets": [made.target(), made.target()]}
    write_overlay(tmp_path / "t.tar", [(base.key(0), record)], base=base)
    overlay = Overlay.open(tmp_path / "t.tar", base)
    overlay.record = lambda i: {"targets": [made.target()]}  # type: ignore[method-assign]
    stream = build(base, overlay)
    epoch = int(stream.lengths.target_of(0)[0] == 0)
    assert "1 targets" in next(stream.steps(epoch))[0].skipped[0].reason


def test_empty_answers_are_refused_or_passed_over(tmp_path) -> None:
    base = made.shards(tmp_path / "s", [3], longest=8000)
    silent, heard = made.target(tokens=0), made.target(tokens=2)
    records = [[silent], [silent, heard, silent, heard], [heard]]
    items = zip(base.keys.to_pylist(), records, strict=True)
    write_overlay(tmp_path / "t.tar", ((k, {"targets": r}) for k, r in items), base=base)
    stream = build(base, Overlay.open(tmp_path / "t.tar", base))
    assert [(s.key, s.reason) for s in stream.skipped(0)] == [
        (base.key(0), "stage 1 left nothing to train: empty or filtered")
    ]
    assert {int(stream.lengths.target_of(epoch)[1]) for epoch in range(4)} == {1, 3}
    for epoch in range(2):
        batches = [batch for step in stream.steps(epoch) for batch in step]
        assert sorted(k for b in batches for k in b.keys) == base.keys.to_pylist()[1:]
        planned = dict(zip(base.keys.to_pylist(), stream.lengths.tokens(epoch), strict=True))
        for batch in batches:
            assert list(batch.lengths) == [planned[k] for k in batch.keys] or not batch.keys


def test_length_table_reads_each_instruction_once(data) -> None:
    class Counting(Prompt):
        asked = 0

        def parts(self, instruction):
            self.asked += 1
            return super().parts(instruction)

    prompt = Counting(made.ByteTokenizer(), "{instruction}{input}")
    table = LengthTable(*data, prompt, made.Rule(), seed=0)
    assert prompt.asked == 2
    assert table.tokens(0).dtype == np.int64


def test_truncated_tars_are_trained_on_what_is_left(tmp_path) -> None:
    base = made.shards(tmp_path / "s", [3, 4], longest=8000)
    overlay = made.targets(tmp_path / "t", base)
    os.truncate(base.addresses[1], base.place(5, "flac")[0] + 100)
    os.truncate(overlay.shards.addresses[1], overlay.shards.place(5, "targets.json")[0])
    short = ShardSet.open(tmp_path / "s")
    stream = build(short, Overlay.open(tmp_path / "t", short))
    trained = [key for step in stream.steps(0) for batch in step for key in batch.keys]
    skipped = {skip.key: skip.reason for skip in stream.skipped(0)}
    assert sorted([*trained, *skipped]) == sorted(base.keys.to_pylist())
    assert len(skipped) == 4
    assert all(reason.startswith("truncated tar") for reason in skipped.values())
    assert not any(batch.skipped for step in stream.steps(0) for batch in step)


class Killing:
    """Kills its worker at clips of certain lengths, as often as there are files in a folder."""

    def __init__(self, folders: dict[int, Path]):
        self.folders = folders

    def __call__(self, wave: np.ndarray) -> np.ndarray:
        if len(wave) in self.folders:
            for life in self.folders[len(wave)].iterdir():
                life.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return wave


@pytest.mark.parametrize("deaths", [1, 2, 99])
def test_killed_workers_are_replaced_or_stop_the_run(data, tmp_path, monkeypatch, deaths) -> None:
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.0))
    whole = list(build(*data).steps(0))
    stream = build(*data, workers=2)
    folders = {}
    for step in (0, -1):
        folder = tmp_path / str(step)
        folder.mkdir()
        folders[next(b.samples[0] for b in whole[step] if b.keys)] = folder
        for number in range(deaths):
            (folder / str(number)).touch()
    stream.featurize = Killing(folders)
    handler = signal.getsignal(signal.SIGCHLD)
    if deaths < 99:
        found = [[fingerprint(b) for b in step] for step in stream.steps(0)]
        assert found == [[fingerprint(b) for b in step] for step in whole]
        assert not list(tmp_path.glob("*/*"))
    else:
        with pytest.raises(ReadError, match=r"data workers died 3 times .* resume") as caught:
            list(stream.steps(0))
        assert "\n" not in str(caught.value)
    assert signal.getsignal(signal.SIGCHLD) == handler


class Broken(Prompt):
    def with_speech(self, instruction, slots):
        raise self.error


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_leave_a_worker_as_they_are(data, workers) -> None:
    class Local(Exception):  # which does not pickle
        pass

    stream = build(*data, workers=workers)
    stream.prompt = broken = Broken(made.ByteTokenizer(), "{input}")
    for error, kind in (
        (ShardError("one line"), ShardError),
        (ReadError("one line"), ReadError),
        (KeyError("one line"), KeyError),
        (Local("one line"), RuntimeError),
    ):
        broken.error = error
        with pytest.raises(kind, match="one line") as caught:
            next(stream.steps(0))
        assert str(caught.value).count("\n") == 0
        assert hasattr(caught.value, "__notes__") == (kind is KeyError)
