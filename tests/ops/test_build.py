from __future__ import annotations

import subprocess
import sys

import pytest

from csrc import build, resources


def test_builds_and_has_nothing_left_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every source compiles, CUDA's too where nvcc is; what is built is not built again."""
    if build.cuda_missing() is None:
        monkeypatch.setenv("HEARKEN_CUDA", "1")  # a kernel that does not compile is an error here
    for library in build.build():
        before = library.stat().st_mtime_ns
        build.build()
        assert library.stat().st_mtime_ns == before


def test_cuda_kernels_for_both_architectures_do_not_spill() -> None:
    if (why := build.cuda_missing()) is not None:
        pytest.skip(why)
    kernels = resources.kernels()
    assert {kernel.arch for kernel in kernels} == {"sm_80", "sm_90"}
    assert [kernel for kernel in kernels if kernel.spilled_bytes] == []
    done = subprocess.run(
        [sys.executable, resources.__file__], capture_output=True, text=True, check=True
    )
    assert "implicit_gemm" in done.stdout


def test_a_library_without_cuda_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert build.cuda_missing() == "nvcc was not found on PATH or in CUDA_HOME"
    monkeypatch.setenv("HEARKEN_CUDA", "0")
    assert build.cuda_missing() == "HEARKEN_CUDA=0"
