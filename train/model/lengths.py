"""Waveform samples → encoder frames → adapter slots: the arithmetic, written once.

The planner, the collator, the adapter and the aligner all ask here, so a slot that the plan
counts is a slot that the adapter makes.
"""

from __future__ import annotations

from dataclasses import dataclass

from train.ops.segments import Lengths, conv_length


@dataclass(frozen=True)
class Conv:
    """A 1-D convolution's geometry; lengths in its own input's units."""

    kernel: int
    stride: int
    padding: int = 0

    def out(self, length: Lengths) -> Lengths:
        """Output length, 0 where no output fits. Elementwise on ints and int64 arrays."""
        return conv_length(length, self.kernel, self.stride, self.padding)


@dataclass(frozen=True)
class LengthRule:
    """How many encoder frames and LLM slots a clip of 16 kHz samples becomes."""

    front_end: tuple[Conv, ...]
    adapter: tuple[Conv, ...]

    def frames(self, num_samples: Lengths) -> Lengths:
        """Valid encoder frames of a clip."""
        for conv in self.front_end:
            num_samples = conv.out(num_samples)
        return num_samples

    def slots(self, num_samples: Lengths) -> Lengths:
        """LLM positions that a clip takes."""
        length = self.frames(num_samples)
        for conv in self.adapter:
            length = conv.out(length)
        return length

    def slots_before(self, sample: Lengths) -> Lengths:
        """How many slots are centred before a sample; a clip's end may leave it fewer.

        A slot stands for the middle of the samples that it sees, so that what is said before
        `sample` is in these slots and what follows in the others.
        """
        hop, middle = 1, 0  # of slot 0, in half samples
        for conv in (*self.front_end, *self.adapter):
            middle += hop * (conv.kernel - 1 - 2 * conv.padding)
            hop *= conv.stride
        count = -((middle - 2 * sample) // (2 * hop))
        return count * (count > 0)
