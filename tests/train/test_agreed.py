"""All ranks of a start go on from one checkpoint, or none of them goes on."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch import ROOT, command, environment
from tests.ranks import on_threads
from tests.train.test_checkpoint import save
from train import checkpoint as ckpt
from train.main import agreed
from train.stopping import RESUMABLE, Stopped


def outcomes(folder: Path, look: Callable[[int], ckpt.Checkpoint | None]) -> list[str]:
    """What becomes of each of three ranks: the step that it goes on from, or what ends it."""
    found = ["" for _ in range(3)]

    def rank(here: object) -> None:
        number = here.rank  # type: ignore[attr-defined]
        try:
            agreed_on = agreed(here, folder, lambda: look(number))  # type: ignore[arg-type]
            found[number] = str(agreed_on and agreed_on.state.step)
        except (Stopped, ckpt.CheckpointError) as error:
            found[number] = f"{type(error).__name__}: {error}"

    on_threads(3, rank)
    return found


@pytest.fixture
def views(tmp_path: Path) -> list[Path]:
    """What three ranks see of one folder: all of it, all of it, and all but the newest."""
    save(tmp_path / "0", 4)
    save(tmp_path / "0", 8)
    for rank in "12":
        shutil.copytree(tmp_path / "0", tmp_path / rank)
    shutil.rmtree(tmp_path / "2" / ckpt.name_of(8))
    return [tmp_path / str(rank) for rank in range(3)]


def test_ranks_that_find_the_same_go_on_from_it(views: list[Path], tmp_path: Path) -> None:
    assert outcomes(tmp_path, lambda rank: ckpt.newest(views[0])) == ["8"] * 3
    assert outcomes(tmp_path, lambda rank: ckpt.newest(tmp_path / "none")) == ["None"] * 3


def test_a_stale_listing_on_one_rank_ends_all(views: list[Path], tmp_path: Path) -> None:
    said = outcomes(tmp_path, lambda rank: ckpt.newest(views[rank]))
    assert len(set(said)) == 1
    assert said[0].startswith(f"Stopped: the ranks found different checkpoints in {tmp_path}: ")
    assert "step 8 (plan plan) on rank 0, 1; step 4 (plan plan) on rank 2; look at" in said[0]


def test_a_damaged_read_on_one_rank_ends_all(views: list[Path], tmp_path: Path) -> None:
    path = views[1] / ckpt.name_of(8) / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    said = outcomes(tmp_path, lambda rank: ckpt.newest(views[min(rank, 1)], lambda text: None))
    assert all("step 8 (plan plan) on rank 0; step 4 (plan plan) on rank 1, 2" in s for s in said)


def test_of_two_plans_at_one_step_both_are_named(views: list[Path], tmp_path: Path) -> None:
    other = ckpt.load(views[0] / ckpt.name_of(8))
    state = ckpt.State(**{**vars(other.state), "plan": "another"})
    ckpt.write(views[2] / ckpt.name_of(8), state, other.weights, other.moments)
    said = outcomes(tmp_path, lambda rank: ckpt.newest(views[rank]))
    assert all(
        "step 8 (plan plan) on rank 0, 1; step 8 (plan another) on rank 2" in s for s in said
    )


def test_weights_to_begin_with_that_one_rank_does_not_see(
    views: list[Path], tmp_path: Path
) -> None:
    nothing = tmp_path / "nothing"
    said = outcomes(tmp_path, lambda rank: ckpt.find(views[0] if rank else nothing))
    assert all(s.startswith("Stopped: ") for s in said)
    assert "none on rank 0; step 8 (plan plan) on rank 1, 2" in said[0]
    said = outcomes(tmp_path, lambda rank: ckpt.find(nothing))
    assert all("CheckpointError: no checkpoint in" in s for s in said)


@pytest.mark.slow
def test_the_launcher_ends_resumably_with_them(views: list[Path], tmp_path: Path) -> None:
    shutil.rmtree(views[1])
    done = subprocess.run(
        command("tests/train/disagreeing_on_ranks.py", tmp_path, ranks=2),
        cwd=ROOT, env=environment(), text=True, timeout=120,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == RESUMABLE, done.stdout[-4000:]
    line = "step 8 (plan plan) on rank 0; none on rank 1; look at the disk"
    assert done.stdout.count(line) == 2  # each rank says it, and leaves
    assert "Traceback" not in done.stdout
    assert "all the same" not in done.stdout
