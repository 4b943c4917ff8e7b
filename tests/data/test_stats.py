"""Figures of a corpus against the same, counted by hand."""

from pathlib import Path

import numpy as np

from data import stats
from data.archive import write_shard
from data.plan import Plan
from data.stats import measure_packing
from tests.data import made


def corpus(folder: Path) -> Path:
    """Two languages: 1, 2 and 3 s of one, 4 s of another."""
    rows = [made.row(f"k{n}", 16_000 * n) for n in (1, 2, 3, 4)]
    rows[3].columns["language"] = "fr"
    write_shard(folder / "train-000000.tar", rows, made.FIELDS, {})
    return folder


def test_figures(tmp_path, capsys) -> None:
    histogram = tmp_path / "plots" / "lengths.png"
    arguments = [str(corpus(tmp_path / "s")), "--seconds-per-bin", "5", "--bins-per-step", "1"]
    assert stats.main([*arguments, "--histogram", str(histogram)]) == 0
    lines = [
        [cell.strip() for cell in line.strip("│ ").split("│")]
        for line in capsys.readouterr().out.splitlines()
    ]
    assert ["en", "3", "0.00", "1.00", "1.10", "2.00", "2.90", "3.00"] in lines
    assert ["fr", "1", "0.00", "4.00", "4.00", "4.00", "4.00", "4.00"] in lines
    assert ["all", "4", "0.00", "1.00", "1.15", "2.50", "3.85", "4.00"] in lines
    assert ["steps an epoch", "2"] in lines
    assert ["bins filled to", "100.00%"] in lines
    assert ["the same batches, padded", "71.43%"] in lines  # 10 s of 2 * 4 + 2 * 3
    assert ["samples that do not fit", "0"] in lines
    assert histogram.read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_named(tmp_path, capsys) -> None:
    assert stats.main([str(corpus(tmp_path / "s")), "--seconds-per-bin", "3.5"]) == 0
    found = capsys.readouterr()
    assert "does not fit: k4: seconds 4 over the budget of 3.5 per bin" in found.err


def test_one_line_for_what_is_not_there(tmp_path, capsys) -> None:
    assert stats.main([str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_packing_of_a_known_plan() -> None:
    costs = np.array([4, 3, 3, 2])
    plan = Plan(
        np.zeros(4, int), costs, np.ones(4, int),
        seed=0, tokens_per_bin=6, seconds_per_bin=1, bins_per_step=2,
    )  # fmt: skip
    found = measure_packing(plan, costs, 6)
    assert (found.steps, found.efficiency, found.max_imbalance) == (1, 1.0, 0.0)
    assert found.padded_efficiency == 12 / (2 * 4 + 2 * 3)
    uneven = measure_packing(plan, np.array([6, 3, 3, 3]), 9)
    assert uneven.max_imbalance == uneven.mean_imbalance == 9 / 7.5 - 1
