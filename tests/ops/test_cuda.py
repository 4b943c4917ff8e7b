"""The CUDA kernels against the CPU's: on a GPU where one is asked for (`-m gpu`), and always
thread by thread on the CPU, see emulator/emulator.h."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from csrc import build as csrc
from tests.ops.oracles import worst
from tests.ops.test_pack_embeddings import plan
from train.ops import Segments

HERE = Path(__file__).parent
ACTIVATIONS = {"none": 0, "gelu": 1, "glu": 2}


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA library as compiled for the emulator: its ops are torch.ops.emulated."""
    library = tmp_path_factory.mktemp("emulator") / "emulated.so"
    torch_root = Path(torch.__file__).parent
    flags = "-x c++ -std=c++20 -O1 -shared -fPIC -fvisibility=hidden -Wno-unknown-pragmas"
    command = [os.environ.get("CXX", "g++"), *flags.split(), csrc.ABI, "-o", str(library)]
    command += ["-isystem", str(torch_root / "include"), str(HERE / "emulator" / "emulated.cpp")]
    command += [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    torch.ops.load_library(library)
    return library


Both = Callable[..., list[tuple[Tensor, Tensor]]]


@pytest.fixture(params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def both(request: pytest.FixtureRequest) -> Both:
    """Calls an op; gives what the CUDA kernels make of it, beside what the CPU kernels do."""
    on_gpu = request.param == "gpu"
    if not on_gpu:
        request.getfixturevalue("emulated")

    def call(op: str, *arguments: Any) -> list[tuple[Tensor, Tensor]]:
        truth = getattr(torch.ops.hearken, op)(*arguments)
        if on_gpu:
            moved = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
            found = getattr(torch.ops.hearken, op)(*moved)
        else:
            found = getattr(torch.ops.emulated, op)(*arguments)
        if isinstance(found, Tensor):
            return [(found.cpu(), truth)]
        return [(got.cpu(), want) for got, want in zip(found, truth, strict=True)]

    return call


def agree(pairs: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    for got, want in pairs:
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        assert got.isfinite().all()
        # Rounded once, so a unit or two in the last place; in float the order of the sums shows.
        units = 16 if dtype in (torch.float32, torch.float64) else 2
        assert worst(got, want) <= units * torch.finfo(dtype).eps


LAYOUTS = {
    "packed": Segments.packed([5, 0, 1, 150, 129, 2, 0]),
    "padded": Segments.padded([5, 0, 1, 37, 40], 43),
    "empty": Segments.packed([0, 0]),
    "none": Segments.packed([]),
}


@pytest.mark.parametrize(
    ("dtype", "channels", "out", "conv", "activation", "layout"),
    [
        (torch.bfloat16, 24, 136, (5, 2, 2), "gelu", "packed"),
        (torch.bfloat16, 24, 160, (5, 2, 2), "glu", "padded"),
        (torch.bfloat16, 8, 24, (3, 1, 0), "none", "padded"),
        (torch.bfloat16, 16, 8, (2, 5, 1), "none", "packed"),
        (torch.bfloat16, 7, 10, (4, 3, 5), "glu", "packed"),
        (torch.bfloat16, 8, 16, (5, 2, 2), "glu", "empty"),
        (torch.bfloat16, 8, 16, (5, 2, 2), "gelu", "none"),
        (torch.float16, 24, 40, (5, 2, 2), "gelu", "padded"),
        (torch.float16, 5, 6, (1, 1, 0), "none", "padded"),
        (torch.float32, 12, 132, (5, 2, 2), "glu", "packed"),
        (torch.float32, 3, 5, (4, 3, 5), "gelu", "padded"),
        (torch.float64, 6, 36, (5, 2, 2), "glu", "padded"),
        (torch.float64, 3, 5, (3, 4, 0), "gelu", "padded"),
    ],
)
@pytest.mark.parametrize("biased", [True, False])
def test_ragged_conv1d(
    both: Both,
    dtype: torch.dtype,
    channels: int,
    out: int,
    conv: tuple[int, int, int],
    activation: str,
    layout: str,
    biased: bool,
) -> None:
    torch.manual_seed(0)
    kernel, stride, padding = conv
    segments = LAYOUTS[layout]
    packed = segments.conv(kernel, stride, padding)
    groups = Segments.packed([-(-n // stride) for n in segments.host_lengths])
    x = torch.randn(segments.rows, channels).to(dtype)
    weight = (torch.randn(out, kernel, channels) / (kernel * channels) ** 0.5).to(dtype)
    bias = torch.randn(out).to(dtype) if biased else None
    starts = (segments.starts, segments.lengths, packed.starts, groups.starts)
    geometry = (stride, padding, ACTIVATIONS[activation])
    made = both(
        "ragged_conv1d", x, weight, bias, *starts, packed.rows, groups.rows, *geometry, True
    )
    agree(made, dtype)
    y, sums = made[0][1], made[1][1]
    grad = torch.randn(y.shape).to(dtype)
    agree(
        both(
            "ragged_conv1d_backward",
            *(grad, x, weight, sums, *starts, groups.rows, *geometry),
            *(True, True, biased),
        ),
        dtype,
    )


@pytest.mark.parametrize(
    ("table_dtype", "speech_dtype", "dtype", "hidden"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, 64),
        (torch.float32, torch.bfloat16, torch.bfloat16, 264),
        (torch.bfloat16, torch.float16, torch.float32, 37),
        (torch.float32, torch.float32, torch.float32, 2312),
        (torch.float64, torch.float64, torch.float64, 12),
    ],
)
@pytest.mark.parametrize(
    ("text", "heard", "rows"), [(20, 9, 11), (0, 3, 3), (5, 0, 0), (0, 0, 0), (3, 0, 4)]
)
def test_pack_embeddings(
    both: Both,
    table_dtype: torch.dtype,
    speech_dtype: torch.dtype,
    dtype: torch.dtype,
    hidden: int,
    text: int,
    heard: int,
    rows: int,
) -> None:
    torch.manual_seed(0)
    table = torch.randn(7, hidden).to(table_dtype)
    speech = torch.randn(rows, hidden).to(speech_dtype)
    ln_weight, ln_bias = torch.randn(2, hidden).to(speech_dtype)
    source = plan(text, heard, 7, rows)
    packed = (table, speech, source, ln_weight, ln_bias, 1e-5)
    coarsest = max((table_dtype, speech_dtype, dtype), key=lambda kind: torch.finfo(kind).eps)
    agree(both("pack_embeddings", *packed, dtype), coarsest)
    grad = torch.randn(text + heard, hidden).to(dtype)
    agree(both("pack_embeddings_backward", grad, *packed, True, True, True), coarsest)
