"""Builds csrc/ with ninja: `python csrc/build.py`, or through `pip install -e .`.

The CPU library is always built, the CUDA library wherever nvcc is found, whether there is a GPU
or not. Both are linked beside train/ops/*.py. What did not change is not built again.

Environment:
    HEARKEN_CUDA    0 leaves the CUDA library out; 1 makes it an error that it cannot be built
    HEARKEN_ARCHS   CUDA architectures, "80;90" where not set
    HEARKEN_MARCH   what the CPU kernels are compiled for: "native" where not set, as a checkout
                    is built where it runs; set it where machines of several kinds share one
    CXX, CUDA_HOME  where the compilers are
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "csrc"
PACKAGE = ROOT / "train" / "ops"
CPU = PACKAGE / "_cpu.abi3.so"
CUDA = PACKAGE / "_cuda.abi3.so"

# The stable ABI as of torch 2.11: the oldest release that was installed and run.
ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"

RULES = """\
ninja_required_version = 1.5
builddir = {build}
rule cxx
  command = {cxx} -MMD -MF $out.d {cxx_flags} -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = c++ $in
rule nvcc
  command = {nvcc} -MD -MF $out.d {nvcc_flags} -c $in -o $out $
    > $out.log 2>&1 || (cat $out.log && false)
  depfile = $out.d
  deps = gcc
  description = nvcc $in
rule link
  command = {cxx} -shared $in -o $out $libraries
  description = link $out
"""


def build() -> list[Path]:
    """Builds what can be built here, says what was and why the rest was not.

    Returns the libraries. Raises RuntimeError when the CPU library does not build, or the CUDA
    library under HEARKEN_CUDA=1.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    why_not = cuda_missing()
    (BUILD / "build.ninja").write_text(_ninja_file(with_cuda=why_not is None))
    _ninja(CPU)
    built = [CPU]
    if why_not is None:
        try:
            _ninja(CUDA)
            built.append(CUDA)
        except RuntimeError:
            if os.environ.get("HEARKEN_CUDA") == "1":
                raise
            why_not = "it did not compile; `python csrc/build.py` shows the errors again"
    elif os.environ.get("HEARKEN_CUDA") == "1":
        raise RuntimeError(f"HEARKEN_CUDA=1, but the CUDA library cannot be built: {why_not}.")
    if why_not is not None:
        CUDA.unlink(missing_ok=True)
    verdict = f"for sm_{', sm_'.join(_archs())}" if why_not is None else f"no ({why_not})"
    print(f"csrc: CPU library built for {_march()}; CUDA library: {verdict}", flush=True)
    return built


def cuda_missing() -> str | None:
    """Why the CUDA library cannot be built here, or None."""
    import torch

    if os.environ.get("HEARKEN_CUDA") == "0":
        return "HEARKEN_CUDA=0"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    nvcc = find_nvcc()
    if nvcc is None:
        return "nvcc was not found on PATH or in CUDA_HOME"
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    major = torch.version.cuda.split(".")[0]
    if f"release {major}." not in release:
        return f"torch is built for CUDA {torch.version.cuda}, but {nvcc} is another major version"
    return None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def _archs() -> list[str]:
    return os.environ.get("HEARKEN_ARCHS", "80;90").split(";")


def _march() -> str:
    return os.environ.get("HEARKEN_MARCH", "native")


def _ninja_file(with_cuda: bool) -> str:
    import torch

    torch_root = Path(torch.__file__).parent
    includes = [torch_root / "include"]
    libraries = [torch_root / "lib"]
    cxx = os.environ.get("CXX", "g++")
    cxx_flags = [
        "-std=c++20",
        "-O3",
        f"-march={_march()}",
        # Both let loops over exp, rint and comparisons be vectorised; NaN and Inf stay exact.
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        ABI,
    ]
    if sysconfig.get_platform().startswith("macosx"):
        raise RuntimeError("csrc/ is built on Linux only")
    nvcc_flags: list[str] = []
    if with_cuda:
        # The pip packages of the CUDA toolkit hold headers that a bare nvcc may lack.
        pip_cuda = torch_root.parent / "nvidia" / f"cu{torch.version.cuda.split('.')[0]}"
        includes.append(pip_cuda / "include")
        libraries.append(pip_cuda / "lib")
        nvcc_flags = [
            "-std=c++20",
            "-O3",
            "--expt-relaxed-constexpr",
            "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
            "-Xptxas=-v,--warn-on-spills",
            *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in _archs()),
            "-DUSE_CUDA",
            ABI,
        ]
    include_flags = [f"-isystem {path}" for path in includes]
    text = RULES.format(
        build=BUILD,
        cxx=cxx,
        nvcc=find_nvcc() or "nvcc",
        cxx_flags=" ".join(cxx_flags + include_flags),
        nvcc_flags=" ".join(nvcc_flags + include_flags),
    )
    search = " ".join(f"-L{path} -Wl,-rpath,{path}" for path in libraries)
    cpu_sources = [CSRC / "ops.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
    text += _library(CPU, "cxx", cpu_sources, f"{search} -ltorch_cpu -lc10")
    if with_cuda:
        runtime = f"-l:libcudart.so.{torch.version.cuda.split('.')[0]}"
        cuda_sources = sorted((CSRC / "cuda").glob("*.cu"))
        text += _library(CUDA, "nvcc", cuda_sources, f"{search} -ltorch_cuda -ltorch_cpu {runtime}")
    return text


def _library(target: Path, rule: str, sources: list[Path], libraries: str) -> str:
    text, objects = "", []
    for source in sources:
        objects.append(str(BUILD / source.relative_to(CSRC).with_suffix(source.suffix + ".o")))
        text += f"build {objects[-1]}: {rule} {source}\n"
    return text + f"build {target}: link {' '.join(objects)}\n  libraries = {libraries}\n"


def _ninja(target: Path) -> None:
    command = [sys.executable, "-m", "ninja", "-C", str(BUILD), str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"building {target.name} failed:\n{result.stdout}{result.stderr}")


if __name__ == "__main__":
    build()
