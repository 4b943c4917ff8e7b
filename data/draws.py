"""Random numbers by address: the same (seed, epoch, stream) gives the same ones anywhere."""

import numpy as np

# Streams below 2**31 are the plan's windows; these are the others'.
TARGETS = 2**31
SPEEDS = 2**31 + 1
NOISE = 2**31 + 2
MASKS = 2**31 + 3
INTERLEAVED = 2**31 + 4
SPANS = 2**31 + 5


def draws(n: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """[n] uint64, uniform: the raw output of Philox, which no NumPy release may change."""
    return np.random.Philox(key=_key(seed, epoch, stream)).random_raw(n)


def draws_of(i: int, n: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """[n] uint64 of sample i alone, whatever is drawn for the others."""
    key = _key(seed, epoch, stream)
    return np.random.Philox(key=key, counter=[0, i, 0, 0]).random_raw(n)


def _key(seed: int, epoch: int, stream: int) -> np.ndarray:
    return np.array([seed, (epoch << 32) + stream], dtype=np.uint64)
