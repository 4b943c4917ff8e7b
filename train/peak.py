"""How fast a device multiplies at best, and how much memory a process has taken at most."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import torch

# Dense products with float32 sums, operations a second, as the makers state them (no sparsity):
# bf16, and float32 through the matrix units (TF32). The first name that the device's holds counts.
_STATED = {
    "B200": (2250e12, 1125e12),
    "H200": (989e12, 495e12),
    "H100 PCIe": (756e12, 378e12),
    "H100": (989e12, 495e12),
    "A100": (312e12, 156e12),
    "L40S": (362e12, 183e12),
    "RTX 4090": (165e12, 83e12),
}


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float | None:
    """Operations a second, that MFU is a share of; None for a GPU that is not known.

    A GPU's as its maker states it; a CPU's as measured here and now by a large product on this
    process's threads (a quarter of a second).
    """
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        tf32 = torch.backends.cuda.matmul.allow_tf32
        for known, (half, single) in _STATED.items():
            if known in name:
                if dtype == torch.float32:
                    return single if tf32 else None
                return half
        return None
    return measured_flops(device, dtype)


def measured_flops(device: torch.device | str, dtype: torch.dtype, size: int = 1024) -> float:
    """The best rate of products of square matrices, in operations a second."""
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < 0.25 or best == float("inf"):
        start = time.perf_counter()
        a @ b
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_bytes(device: torch.device | str) -> int:
    """The most memory so far: of a GPU what its allocator gave out, else the resident set."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes(key: str = "VmRSS") -> int:
    """The resident set of this process; with `VmHWM` its peak since `reset_peak` (Linux).

    Raises:
        RuntimeError: the system does not say.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def reset_peak(device: torch.device | str = "cpu") -> None:
    """Let the peak begin at what is held now (Linux, or CUDA's allocator)."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
