"""The ledger: what it says was walked is exactly that, whenever the process was killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import walk
from data.ledger import Ledger, LedgerError, committed
from data.shards import ShardSet
from tests.data import made

BUDGET = ("--seconds-per-bin", "2", "--bins-per-step", "3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("walk")
    made.shards(folder, [11, 8, 0, 13])
    return folder


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def run(*arguments: object) -> int:
    return walk.main([*map(str, arguments), *BUDGET])


def test_every_world_walks_the_same_steps(folder, capsys) -> None:
    seen = []
    for world in (1, 2, 5):
        assert run(folder, "--world", world) == 0
        found = lines(capsys)
        assert [line["rank"] for line in found[:world]] == list(range(world))
        steps: dict[int, set] = {}
        for line in found:
            steps.setdefault(line["step"], set()).update(line["keys"])
        seen.append(steps)
    assert seen[0] == seen[1] == seen[2]
    assert sum(map(len, seen[0].values())) == 32


def test_state_continues_and_ledger_tells(folder, tmp_path, capsys) -> None:
    state = tmp_path / "state"
    for world in (1, 4, 2):
        assert run(folder, "--world", world, "--steps", 1, "--state", state) == 0
    assert run(folder, "--state", state) == 0
    walked: dict[int, list] = {}
    for line in lines(capsys):
        walked.setdefault(line["step"], []).extend(line["keys"])
    assert run("--ledger", "--state", state) == 0
    told = lines(capsys)
    assert [(line["epoch"], line["step"]) for line in told] == [(0, n) for n in range(len(walked))]
    assert all(sorted(line["keys"]) == sorted(walked[line["step"]]) for line in told)
    assert run(folder, "--state", state) == 0
    assert lines(capsys) == []
    assert run(folder, "--state", state, "--epoch", 2) == 1
    assert run(folder, "--state", state, "--epoch", 1, "--steps", 1) == 0
    assert lines(capsys)[0]["epoch"] == 1


def test_another_order_does_not_continue_a_ledger(folder, tmp_path, capsys) -> None:
    state = tmp_path / "state"
    assert run(folder, "--steps", 1, "--state", state) == 0
    assert run(folder, "--steps", 1, "--state", state, "--seed", 1) == 1
    assert "begun with {'seed': 0}, but now it is {'seed': 1}" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_half_a_line_is_no_line(tmp_path, cut) -> None:
    ledger = Ledger(tmp_path / "l", {"a": 1})
    ledger.commit(["x"])
    ledger.commit(["y" * 30])
    ledger.close()
    os.truncate(tmp_path / "l", (tmp_path / "l").stat().st_size - cut)
    assert [line["keys"] for line in committed(tmp_path / "l")] == [["x"]]
    again = Ledger(tmp_path / "l", {"a": 1})
    assert (again.epoch, again.step) == (0, 1)
    again.commit(["z"])
    assert [line["keys"] for line in committed(tmp_path / "l")] == [["x"], ["z"]]


@pytest.mark.parametrize("left", [0, 1, 7])
def test_ledger_killed_at_its_first_line_begins_anew(tmp_path, left) -> None:
    Ledger(tmp_path / "l", {"a": 1}).close()
    os.truncate(tmp_path / "l", left)
    ledger = Ledger(tmp_path / "l", {"a": 1})
    ledger.commit(["x"])
    assert [line["keys"] for line in committed(tmp_path / "l")] == [["x"]]


def test_long_lines_and_one_writer(tmp_path) -> None:
    ledger = Ledger(tmp_path / "l", {})
    for n in range(3):
        ledger.commit([f"{n}" * 200_000])
    with pytest.raises(LedgerError, match="another process"):
        Ledger(tmp_path / "l", {})
    ledger.close()
    assert Ledger(tmp_path / "l", {}).step == 3


def test_no_ledger(tmp_path, capsys) -> None:
    assert run("--ledger", "--state", tmp_path / "none") == 1
    assert "no such ledger" in capsys.readouterr().err
    (tmp_path / "bad").write_text("{}\nnot json\n")
    assert run("--ledger", "--state", tmp_path / "bad") == 1


def test_killed_fifty_times_the_ledger_is_the_corpus(tmp_path, capsys) -> None:
    made.shards(tmp_path / "s", [70, 0, 90, 80], longest=4000)
    shards, state, draw = str(tmp_path / "s"), str(tmp_path / "state"), random.Random(0)
    budget = ("--seconds-per-bin", "0.5", "--bins-per-step", "1")
    kills, pace = 0, 0.06
    while kills < 50:
        arguments = [shards, "--world", str(draw.randint(1, 16)), "--state", state, *budget]
        child = os.fork()
        if not child:
            slowly(arguments)
        time.sleep(draw.random() * pace)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        kills += 1
        killed_at = len(list(committed(Path(state)))) if Path(state).is_file() else 0
        if 3 * killed_at < kills:  # a busy machine needs longer for as much
            pace *= 1.1
    assert walk.main([shards, "--state", state, *budget]) == 0
    lines(capsys)
    assert walk.main([shards, *budget]) == 0
    walked = [line["keys"] for line in lines(capsys)]
    assert 10 < killed_at < len(walked)
    told = list(committed(Path(state)))
    assert [line["step"] for line in told] == list(range(len(told)))
    assert [line["keys"] for line in told] == walked
    keys = sorted(key for keys in walked for key in keys)
    assert keys == sorted(ShardSet.open(shards).keys.to_pylist())


def slowly(arguments: list[str]) -> None:
    """The walk, with a pause after each line, so that there is something to kill; never returns."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    walk._print = lambda line: time.sleep(0.002)
    try:
        os._exit(walk.main(arguments))
    finally:
        os._exit(1)


def test_killed_as_a_command(folder, tmp_path, capsys) -> None:
    state = tmp_path / "state"
    command = [sys.executable, "-m", "data.walk", str(folder), "--state", str(state), *BUDGET]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    process.kill()
    process.wait()
    assert run(folder, "--state", state) == 0
    lines(capsys)
    keys = [key for line in committed(state) for key in line["keys"]]
    assert sorted(keys) == sorted(ShardSet.open(folder).keys.to_pylist())
