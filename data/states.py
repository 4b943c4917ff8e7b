"""The record of a frozen encoder: what it makes of an utterance, kept instead of made again.

`KEY.states.safetensors` is one tensor `states`, [frames, width], in the precision in which the
encoder ran.
"""

import numpy as np
import safetensors
import safetensors.torch
import torch

from data.archive import ContentError
from data.lengths import LengthRule

MEMBER = "states.safetensors"


def states_record(states_FE: torch.Tensor) -> bytes:
    """The bytes of one utterance's states, a CPU tensor."""
    return safetensors.torch.save({"states": states_FE.contiguous()})


def parse_states(data: bytes, frames: int) -> np.ndarray:
    """float32 [width, frames], time last as in all features of a clip.

    Raises `ContentError` where it is no such record, or not of so many frames.
    """
    try:
        found = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise ContentError(f"{MEMBER} is not safetensors: {error}") from None
    states = found.get("states")
    if states is None or not states.is_floating_point():
        raise ContentError(f"{MEMBER} has no floating-point tensor 'states'")
    if states.dim() != 2 or len(states) != frames:
        raise ContentError(f"states are {list(states.shape)}, expected {frames} frames")
    return states.T.float().contiguous().numpy()


class Silence:
    """In place of a featurizer where states are stored: for the silent clip of a dummy batch."""

    def __init__(self, rule: LengthRule, width: int):
        self.rule, self.width = rule, width

    def __call__(self, wave: np.ndarray) -> np.ndarray:
        """float32 [S] -> zeros, float32 [width, frames]."""
        return np.zeros((self.width, int(self.rule.frames(len(wave)))), np.float32)
