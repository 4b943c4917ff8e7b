"""Prints what every CUDA kernel takes of a multiprocessor: `python csrc/resources.py`.

Registers and spills are ptxas's own words from the last build; it ends with status 1 when a kernel
spills registers to memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BUILD = Path(__file__).resolve().parents[1] / "build" / "csrc"


@dataclass(frozen=True)
class Kernel:
    name: str
    arch: str
    registers: int
    spilled_bytes: int


def kernels() -> list[Kernel]:
    """Every kernel of the last build; raises FileNotFoundError where CUDA was not built."""
    logs = sorted(BUILD.glob("cuda/*.log"))
    if not logs:
        raise FileNotFoundError("the CUDA library is not built: run `python csrc/build.py`")
    found = []
    for log in logs:
        for block in log.read_text().split("Compiling entry function ")[1:]:
            entry = re.match(r"'(\S+)' for '(\S+)'", block)
            registers = re.search(r"Used (\d+) registers", block)
            spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", block)
            if not (entry and registers and spills):
                raise ValueError(f"{log} is not what ptxas -v writes: {block[:80]!r}")
            spilled = int(spills[1]) + int(spills[2])
            found.append(Kernel(entry[1], entry[2], int(registers[1]), spilled))
    names = _demangled([kernel.name for kernel in found])
    return [
        Kernel(name, kernel.arch, kernel.registers, kernel.spilled_bytes)
        for name, kernel in zip(names, found, strict=True)
    ]


def _demangled(names: list[str]) -> list[str]:
    """Readable names where the binutils are there to make them."""
    try:
        done = subprocess.run(
            ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
        )
    except FileNotFoundError:
        return names
    readable = done.stdout.splitlines()
    short = [re.sub(r"hearken::|c10::|void |\(anonymous namespace\)::", "", n) for n in readable]
    return [name.split("(")[0] for name in short]


def main() -> int:
    found = sorted(kernels(), key=lambda kernel: (kernel.name, kernel.arch))
    width = max(len(kernel.name) for kernel in found)
    print(f"{'kernel':{width}}  arch   registers  spilled bytes")
    for kernel in found:
        print(
            f"{kernel.name:{width}}  {kernel.arch}  {kernel.registers:9d}  "
            f"{kernel.spilled_bytes:13d}"
        )
    return 1 if any(kernel.spilled_bytes for kernel in found) else 0


if __name__ == "__main__":
    sys.exit(main())
