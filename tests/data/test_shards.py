"""Shards: what was written is read back by seek, and what does not fit together is named."""

import json
import os
import pickle
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from data.archive import ContentError, ShardError, index_path, write_shard
from data.shards import Overlay, ShardSet, write_overlay
from tests.data import made


@pytest.fixture
def base(tmp_path) -> ShardSet:
    return made.shards(tmp_path / "s", [3, 0, 5, 1])


def test_members_are_read_by_seek(base) -> None:
    assert len(base) == 9
    assert base.shard_of.tolist() == [0, 0, 0, 2, 2, 2, 2, 2, 3]
    with tarfile.open(base.addresses[2]) as tar:
        for i in range(3, 8):
            for member in ("flac", "json"):
                whole = tar.extractfile(f"{base.key(i)}.{member}").read()
                assert base.read(i, member) == whole
    assert base.read_json(4)["text"] == base.texts[4].as_py() == f"text of {base.key(4)}"


def test_webdataset_reads_them_in_order(base) -> None:
    found = webdataset.WebDataset(base.addresses, shardshuffle=False, empty_check=False)
    samples = list(found)
    assert [sample["__key__"] for sample in samples] == base.keys.to_pylist()
    assert samples[5]["flac"] == base.read(5, "flac")


def test_same_rows_same_bytes(tmp_path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / name / "t.tar", [made.row("k", 4000)], made.FIELDS, {"x": 1})
    for suffix in ("tar", "parquet"):
        a, b = ((tmp_path / name / f"t.{suffix}").read_bytes() for name in ("a", "b"))
        assert a == b


def test_patterns(base, tmp_path) -> None:
    folder = tmp_path / "s"
    for pattern in (folder, f"{folder}/train-*.tar", f"{folder}/train-{{000000..000003}}.tar"):
        assert ShardSet.open(pattern).digest == base.digest
    twice = [f"{folder}/train-000002.tar", f"{folder}/train-00000[12].tar"]
    assert len(ShardSet.open(twice)) == 5
    for pattern in (f"{folder}/none-*.tar", f"{folder}/train-{{000000..000004}}.tar"):
        with pytest.raises(ShardError, match=r"none|train-000004"):
            ShardSet.open(pattern)


def test_digest_follows_contents_not_places(base, tmp_path) -> None:
    assert made.shards(tmp_path / "moved", [3, 0, 5, 1]).digest == base.digest
    assert made.shards(tmp_path / "other", [3, 0, 5, 2]).digest != base.digest


def test_it_pickles_and_survives_a_fork(base) -> None:
    expected = base.read(3, "flac")
    assert pickle.loads(pickle.dumps(base)).read(3, "flac") == expected
    child = os.fork()
    if not child:
        os._exit(0 if base.read(3, "flac") == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_index_and_tar_must_agree(base, tmp_path) -> None:
    tar = tmp_path / "s" / "train-000002.tar"
    with tar.open("ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(ShardError, match=r"train-000002.parquet.*train-000002.tar"):
        ShardSet.open(tmp_path / "s")
    index_path(tar).unlink()
    with pytest.raises(ShardError, match=r"train-000002.parquet"):
        ShardSet.open(tmp_path / "s")


def test_swapped_tar_of_the_same_size_is_noticed(base, tmp_path) -> None:
    tar = tmp_path / "s" / "train-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"k0-1.flac", b"k9-1.flac"))
    again = ShardSet.open(tmp_path / "s")
    assert again.read(0, "flac") == base.read(0, "flac")
    with pytest.raises(ContentError, match="does not match"):
        again.read(1, "flac")


def test_no_index_of_ours(base, tmp_path) -> None:
    index = tmp_path / "s" / "train-000000.parquet"
    pq.write_table(pq.read_table(index).replace_schema_metadata({}), index)
    with pytest.raises(ShardError, match="format"):
        ShardSet.open(tmp_path / "s")
    index.write_bytes(b"no parquet")
    with pytest.raises(ShardError, match="not a shard index"):
        ShardSet.open(tmp_path / "s")


def test_same_key_in_two_shards(tmp_path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.tar", [made.row("k", 4000)], made.FIELDS, {})
    with pytest.raises(ShardError, match=r"'k' is in .*a.tar and in .*b.tar"):
        _ = ShardSet.open(tmp_path).keys


@pytest.mark.parametrize("key", ["", "a.b", "/a", "a/", "a\nb"])
def test_keys_that_no_tar_can_hold(tmp_path, key: str) -> None:
    with pytest.raises(ShardError, match="key"):
        write_shard(tmp_path / "t.tar", [made.row(key, 4000)], made.FIELDS, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["a/b c", "ü" * 40, "x" * 300, "-"])
def test_keys_that_a_tar_holds(tmp_path, key: str) -> None:
    write_shard(tmp_path / "t.tar", [made.row(key, 4000)], made.FIELDS, {})
    assert ShardSet.open(tmp_path).read_json(0)["text"] == f"text of {key}"


def test_failed_write_leaves_nothing(tmp_path) -> None:
    def rows():
        yield made.row("a", 4000)
        yield made.row("a", 4000)

    with pytest.raises(ShardError, match="twice"):
        write_shard(tmp_path / "t.tar", rows(), made.FIELDS, {})
    assert not list(tmp_path.iterdir())


def test_overlay_is_joined_by_key(base, tmp_path) -> None:
    overlay = made.targets(tmp_path / "t", base, per_sample=2)
    for i in range(len(base)):
        records = overlay.record(i)["targets"]
        assert [len(r["ids"]) for r in records] == [len(base.key(i)), len(base.key(i)) + 1]
        assert overlay.column("num_tokens")[i].as_py() == [len(r["ids"]) + 1 for r in records]
        assert overlay.column("instruction")[i].as_py() == ["say 0", "say 1"]
    assert overlay.metas[0]["teacher"] == "t"
    assert overlay.metas[0]["base_digest"] == base.digest


def test_overlay_of_more_than_the_base(base, tmp_path) -> None:
    made.targets(tmp_path / "t", base)
    part = ShardSet.open(tmp_path / "s" / "train-000002.tar")
    overlay = Overlay.open(tmp_path / "t", part)
    assert [overlay.record(i)["targets"][0]["template"] for i in range(5)] == ["t"] * 5


def test_missing_and_stale_overlays_name_both_files(base, tmp_path) -> None:
    made.targets(tmp_path / "t", base)
    with pytest.raises(ShardError, match=r"targets-000000.tar: no .*'k\d-\d' of .*train-00000"):
        Overlay.open(tmp_path / "t" / "targets-000000.tar", base)
    changed = made.row(base.key(4), 4001)
    rows = [changed if i == 4 else made.row(base.key(i), 4000) for i in range(3, 8)]
    write_shard(tmp_path / "s" / "train-000002.tar", rows, made.FIELDS, {})
    with pytest.raises(ShardError, match=r"targets-00000\d.tar: stale.*train-000002.tar"):
        Overlay.open(tmp_path / "t", ShardSet.open(tmp_path / "s"))


def test_overlay_of_an_unknown_key(base, tmp_path) -> None:
    items = [("nobody", {"targets": [made.target()]})]
    with pytest.raises(ShardError, match="'nobody'"):
        write_overlay(tmp_path / "t.tar", items, base=base)


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"targets": []},
        {"targets": ["x"]},
        {"targets": [{**made.target(), "ids": [1, -1]}]},
        {"targets": [{**made.target(), "ids": [1, True]}]},
        {"targets": [{**made.target(), "finished": "yes"}]},
    ],
)
def test_wrong_targets_are_not_written(base, tmp_path, record) -> None:
    with pytest.raises(ContentError, match="target"):
        write_overlay(tmp_path / "t.tar", [(base.key(0), record)], base=base)


def test_wrong_json(tmp_path) -> None:
    rows = [made.row("a", 4000), made.row("b", 4000)]
    rows[0].members["json"] = b"{no json"
    rows[1].members["json"] = json.dumps([1]).encode()
    write_shard(tmp_path / "t.tar", rows, made.FIELDS, {})
    shards = ShardSet.open(tmp_path)
    for i, reason in ((0, "not JSON"), (1, "is list")):
        with pytest.raises(ContentError, match=reason):
            shards.read_json(i)


def test_columns(base) -> None:
    assert base.num_samples.dtype == np.int64
    assert base.languages.to_pylist() == ["en"] * 9
    with pytest.raises(ShardError, match="no column 'mood'"):
        base.column("mood")


def test_truncated_tar_gives_what_it_still_holds(base, tmp_path) -> None:
    overlay = made.targets(tmp_path / "t", base).shards
    for shards, tar, first_lost, member in (
        (base, base.addresses[2], 6, "json"),
        (overlay, overlay.addresses[0], 2, "targets.json"),
    ):
        os.truncate(tar, shards.place(first_lost, member)[0] + 1)
    again = ShardSet.open(tmp_path / "s")
    assert again.digest != base.digest
    assert set(again.lost) == {6, 7}
    assert again.lost[6].startswith(f"truncated tar: {base.addresses[2]} has ")
    assert again.read(5, "flac") == base.read(5, "flac")
    joined = Overlay.open(tmp_path / "t", again)
    assert {again.key(i) for i in joined.lost} == set(overlay.keys.to_pylist()[2:4])
    assert [joined.record(i)["targets"] for i in range(9) if i not in joined.lost]


def test_truncated_tar_of_another_index(base, tmp_path) -> None:
    tar = tmp_path / "s" / "train-000002.tar"
    left = tar.read_bytes()[: tar.stat().st_size // 2]
    tar.write_bytes(left.replace(b"k2-0.flac", b"k9-0.flac"))
    with pytest.raises(ShardError, match=r"train-000002.parquet.*train-000002.tar"):
        ShardSet.open(tmp_path / "s")
    tar.write_bytes(b"")
    with pytest.raises(ShardError, match=r"train-000002.tar has 0"):
        ShardSet.open(tmp_path / "s")
