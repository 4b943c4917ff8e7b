"""Loads what setup.py built of csrc/, and says which implementation of an op is used."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Literal, get_args

import torch

Impl = Literal["auto", "fused", "reference"]

log = logging.getLogger(__name__)

FIX = "run `pip install --no-build-isolation -e .` in the checkout"


def _load(name: str) -> str | None:
    """Loads one library of csrc/; returns why it could not be, or None."""
    path = Path(__file__).with_name(f"{name}.abi3.so")
    if not path.exists():
        return f"{path.name} is not built: {FIX}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load ({error}): {FIX}"
    return None


# The CPU library holds the schemas, so nothing is fused anywhere without it.
_MISSING: dict[str, str | None] = {"cpu": _load("_cpu")}
_MISSING["cuda"] = _MISSING["cpu"] or _load("_cuda")


def missing(device_type: str) -> str | None:
    """Why the fused ops are not there for this kind of device, or None when they are."""
    return _MISSING.get(device_type, f"csrc/ has no kernels for {device_type!r}")


@torch.compiler.assume_constant_result
def use_fused(op: str, impl: Impl, device_type: str) -> bool:
    """Decides between the kernels and the twin; `auto` says once in the log what it chose.

    Raises ValueError for an unknown `impl`, RuntimeError when `fused` is asked for and missing.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, but is {impl!r}.")
    if impl == "reference":
        return False
    why = missing(device_type)
    if impl == "auto":
        _say(op, device_type, why)
    elif why is not None:
        raise RuntimeError(f"{op}: impl='fused' was asked for, but {why}.")
    return why is None


@functools.cache
def _say(op: str, device_type: str, why: str | None) -> None:
    if why is None:
        log.info("%s on %s: fused", op, device_type)
    else:
        log.warning("%s on %s: reference, because %s", op, device_type, why)
