import pytest
import torch
import torch.nn.functional as F

from train.ops import Segments


def test_packed_lies_without_gaps() -> None:
    segments = Segments.packed([3, 0, 4])
    assert segments.starts.tolist() == [0, 3, 3]
    assert segments.lengths.tolist() == [3, 0, 4]
    assert (segments.rows, segments.total, len(segments)) == (7, 7, 3)
    assert segments.starts.dtype == segments.lengths.dtype == torch.int64


def test_padded_lies_at_a_pitch() -> None:
    segments = Segments.padded([3, 0, 4], 5)
    assert segments.starts.tolist() == [0, 5, 10]
    assert (segments.rows, segments.total) == (15, 7)


def test_no_segments() -> None:
    segments = Segments.packed([])
    assert (segments.rows, segments.total, len(segments)) == (0, 0, 0)
    assert segments.starts.shape == (0,)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(5, 2, 2), (3, 3, 0), (1, 1, 0), (4, 3, 5)]
)
def test_lengths_are_those_of_conv1d(kernel: int, stride: int, padding: int) -> None:
    lengths = list(range(1, 40))
    found = Segments.packed(lengths).conv(kernel, stride, padding).host_lengths
    for length, out in zip(lengths, found, strict=True):
        if length + 2 * padding < kernel:
            assert out == 0
        else:
            x = torch.zeros(1, 1, length)
            truth = F.conv1d(x, torch.zeros(1, 1, kernel), stride=stride, padding=padding)
            assert out == truth.shape[-1]
    assert Segments.packed([0]).conv(kernel, stride, padding).host_lengths == (0,)


def test_errors_name_the_length() -> None:
    with pytest.raises(ValueError, match=r"lengths\[1\] must not be negative, but is -2"):
        Segments.packed([1, -2])
    with pytest.raises(ValueError, match=r"lengths\[1\] must be at most pitch = 3, but is 4"):
        Segments.padded([3, 4], 3)
