"""`configs/slurm.sbatch` as a cluster runs it, with stand-ins for srun and scontrol."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.launch import ROOT

# Start n trains to the step of line n in `plan`, and ends with the status behind it.
_SRUN = r"""
case "$*" in
    *train/preflight.py*) exit $PREFLIGHT;;
    *train/main.py*configs.yaml*) ;;
    *) exit 9;;
esac
echo >> starts
set -- $(sed -n "$(wc -l < starts)p" plan)
mkdir -p run
echo '{"step": '$(($1 - 1))', "at": 1, "metrics": {}}' >> run/metrics.jsonl
[ $2 -eq 137 ] && kill -9 $$
exit $2
"""
_SCONTROL = 'case $1 in show) echo node1;; requeue) echo "$2" >> requeued;; esac\n'


def queued(root: Path, *plan: tuple[int, int], preflight: int = 0) -> tuple[int, int, str]:
    """A job whose starts end so, until Slurm is not asked to queue it again.

    Returns the starts of train/main.py, the last exit status, and what was printed.
    """
    for name, script in (
        ("bin/srun", _SRUN), ("bin/scontrol", _SCONTROL),
        (".venv/bin/python", f'exec {sys.executable} "$@"\n'),
    ):  # fmt: skip
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}")
        path.chmod(0o755)
    (root / "plan").write_text("".join(f"{step} {status}\n" for step, status in plan))
    (root / "starts").touch()
    config = tiny.write_config(root / "configs.yaml", tiny.config(root))
    environment = os.environ | {
        "PATH": f"{root}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "PREFLIGHT": str(preflight), "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[1-2]",
    }  # fmt: skip
    said = ""
    for _ in range(len(plan) + 5):
        (root / "requeued").unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", str(ROOT / "configs/slurm.sbatch"), str(config)], cwd=root, env=environment,
            text=True, timeout=400, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        said += done.stdout
        if not (root / "requeued").exists():
            return len((root / "starts").read_text()), done.returncode, said
        assert (root / "requeued").read_text() == "17\n"
    raise AssertionError(f"queued again for ever\n{said}")


def test_a_job_is_queued_again_until_it_no_longer_moves(tmp_path: Path) -> None:
    plan = [(3, 137), (5, 1), (5, 75), (5, 75), (5, 75), (5, 75)]
    starts, status, said = queued(tmp_path, *plan)
    assert (starts, status) == (4, 75), said
    assert "supervisor: exit status 137 after step 3; queueing it again" in said
    assert "supervisor: exit status 75 after step 5, 3 times in a row; given up" in said


@pytest.mark.parametrize(("status", "preflight", "starts"), [(0, 0, 1), (2, 0, 1), (0, 2, 0)])
def test_what_is_done_or_to_be_mended_is_not_queued_again(
    tmp_path: Path, status: int, preflight: int, starts: int
) -> None:
    assert queued(tmp_path, (4, status), preflight=preflight)[:2] == (starts, status or preflight)
