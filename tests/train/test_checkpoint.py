from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from train import checkpoint as ckpt


def state(step: int) -> ckpt.State:
    return ckpt.State(
        step, 0, step, 8, "plan", "run", {"a": 1}, "rev", [{"key": "k", "reason": "r"}]
    )


def save(folder: Path, step: int, keep: int = 2) -> Path:
    tensors = {"w": torch.arange(5.0) + step}
    moments = {"exp_avg/w": torch.ones(5) * step}
    return ckpt.save(folder, state(step), tensors, moments, keep)


def test_round_trip_to_the_bit(tmp_path: Path) -> None:
    found = ckpt.load(save(tmp_path, 3))
    assert found.state == state(3)
    assert torch.equal(found.weights["w"], torch.arange(5.0) + 3)
    assert torch.equal(found.moments["exp_avg/w"], torch.full((5,), 3.0))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 10, 12):
        save(tmp_path, step)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000010", "step-00000012"]


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[-4 if name != "state.json" else 0] ^= 0x55
        path.write_bytes(data)
    said: list[str] = []
    found = ckpt.newest(tmp_path, said.append)
    assert found is not None
    assert found.state.step == 1
    assert len(said) == 1
    assert "step-00000002" in said[0]


@pytest.mark.parametrize(
    ("good", "bad"),
    [('"step": 12', '"step": 13'), ('"trained": 8', '"trained": 9'), ('"a": 1', '"a": 2')],
)
def test_a_flipped_digit_of_the_state_is_damage(tmp_path: Path, good: str, bad: str) -> None:
    save(tmp_path, 4)
    path = save(tmp_path, 12) / "state.json"
    text = path.read_text()
    assert text.count(good) == 1
    path.write_text(text.replace(good, bad))
    said: list[str] = []
    found = ckpt.newest(tmp_path, said.append)
    assert found is not None
    assert found.state == state(4)
    assert "step-00000012: state.json has checksum" in said[0]


def test_a_state_of_before_it_had_a_checksum_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 12) / "state.json"
    tree = json.loads(path.read_text())
    del tree["checksums"]["state.json"]
    path.write_text(json.dumps(tree))
    assert ckpt.load(path.parent).state == state(12)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_newer_one_does_not_count_as_one_to_keep(tmp_path: Path, keep: int) -> None:
    save(tmp_path, 8, keep)
    (save(tmp_path, 20, 2) / "state.json").write_text("damaged")
    for step in (10, 12):  # the run has gone back
        save(tmp_path, step, keep)
    good = [10, 12][-keep:]
    assert ckpt.steps_of(tmp_path) == [*good, 20]
    found = ckpt.newest(tmp_path, lambda text: None)
    assert found is not None
    assert found.state.step == 12
    save(tmp_path, 20, keep)  # and has come to it again
    assert ckpt.steps_of(tmp_path) == [*good, 20][-keep:]


def test_a_partial_one_is_not_seen(tmp_path: Path) -> None:
    save(tmp_path, 1).rename(tmp_path / ".partial-step-00000009")
    assert ckpt.newest(tmp_path) is None


def test_where_there_is_none_it_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ckpt.CheckpointError, match=r"expected state\.json"):
        ckpt.find(tmp_path)
