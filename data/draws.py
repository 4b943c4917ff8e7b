"""Random numbers by address: the same (seed, epoch, stream) gives the same ones anywhere."""

import numpy as np

# Streams below 2**31 are the plan's windows; these are the others'.
TARGETS = 2**31


def draws(n: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """[n] uint64, uniform: the raw output of Philox, which no NumPy release may change."""
    key = np.array([seed, (epoch << 32) + stream], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(n)
