// The index arithmetic of ragged_conv1d, for CPU and CUDA alike.
//
// A convolution and both its gradients read the same kind of thing: for one row of a product, a
// window of consecutive rows of one segment, of which those beyond the segment's borders count as
// zero. With channels last such a window is one contiguous piece of memory. Only where it begins,
// and which taps it meets, differs.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace hearken {

struct Segments {
  const int64_t* starts;
  const int64_t* lengths;
  const int64_t* out_starts;
  const int64_t* group_starts;
  int64_t count;
};

// The last segment that begins at or before `row`; in packed segments it is the one that holds
// `row`, as an empty segment begins where the next one does. starts[0] is 0.
HEARKEN_HD int64_t segment_of(const int64_t* starts, int64_t count, int64_t row) {
  int64_t low = 0;
  int64_t high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (starts[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// What one row of a product reads: `row` is the flat row at which its window begins, perhaps
// outside the segment; of its rows only [begin, end) exist. The result goes to row `target`,
// nowhere if that is negative.
struct Window {
  int64_t row;
  int64_t target;
  int32_t begin;
  int32_t end;
};

HEARKEN_HD int64_t clamp_to(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : (value > high ? high : value);
}

// Rows [first, first + count) of a segment that lies at `start` and has `length` rows.
HEARKEN_HD Window
place(int64_t first, int64_t count, int64_t start, int64_t length, int64_t target) {
  const int64_t begin = clamp_to(-first, 0, count);
  const int64_t end = clamp_to(length - first, begin, count);
  return {start + first, target, static_cast<int32_t>(begin), static_cast<int32_t>(end)};
}

struct Conv {
  int64_t kernel;
  int64_t stride;
  int64_t padding;

  HEARKEN_HD int64_t output_length(int64_t length) const {
    const int64_t reach = length + 2 * padding - kernel;
    return length == 0 || reach < 0 ? 0 : reach / stride + 1;
  }

  // The rows of x that output row `row` is made of.
  HEARKEN_HD Window inputs(const Segments& segments, int64_t row) const {
    const int64_t segment = segment_of(segments.out_starts, segments.count, row);
    const int64_t first = (row - segments.out_starts[segment]) * stride - padding;
    return place(first, kernel, segments.starts[segment], segments.lengths[segment], row);
  }

  // Input rows are worked on in groups of `stride`, one row of each phase. The rows of one phase
  // (position % stride) meet the same taps: every stride-th one from first_tap(phase) on,
  // taps(phase) of them, maybe none.
  HEARKEN_HD int64_t groups(int64_t length) const { return (length + stride - 1) / stride; }

  HEARKEN_HD int64_t first_tap(int64_t phase) const { return (phase + padding) % stride; }

  HEARKEN_HD int64_t taps(int64_t phase) const {
    const int64_t first = first_tap(phase);
    return first < kernel ? (kernel - first + stride - 1) / stride : 0;
  }

  // The output rows that the phase's row of a group takes part in, ascending; the j-th of them
  // meets it with tap tap_of(phase, j), so the taps descend.
  HEARKEN_HD Window outputs(const Segments& segments, int64_t phase, int64_t group) const {
    const int64_t segment = segment_of(segments.group_starts, segments.count, group);
    const int64_t position = (group - segments.group_starts[segment]) * stride + phase;
    const int64_t length = segments.lengths[segment];
    const int64_t count = taps(phase);
    const int64_t first = (position + padding - tap_of(phase, 0)) / stride;  // exact
    const int64_t target = position < length ? segments.starts[segment] + position : -1;
    return place(first, count, segments.out_starts[segment], output_length(length), target);
  }

  HEARKEN_HD int64_t tap_of(int64_t phase, int64_t j) const {
    return first_tap(phase) + (taps(phase) - 1 - j) * stride;
  }
};

}  // namespace hearken
