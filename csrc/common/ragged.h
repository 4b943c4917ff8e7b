// The index arithmetic of ragged_conv1d, for CPU and CUDA alike.
//
// A convolution and both its gradients read the same kind of thing: for one row of a product, a
// window of consecutive rows of one segment, of which those beyond the segment's borders count as
// zero. Only where the window begins, and which taps it meets, differs.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace hearken {

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

// Rows [first, first + count) of a segment; first may be negative, the end beyond the segment.
struct Window {
  int64_t first;
  int64_t count;
};

struct Conv {
  int64_t kernel;
  int64_t stride;
  int64_t padding;

  // The input rows that taps [tap, tap + count) of output row `position` meet.
  HEARKEN_HD Window inputs(int64_t position, int64_t tap, int64_t count) const {
    return {position * stride - padding + tap, count};
  }

  // Input rows of one phase (position % stride) meet the same taps: every stride-th one, from
  // first_tap(phase) on, taps(phase) of them, maybe none.
  HEARKEN_HD int64_t first_tap(int64_t phase) const { return (phase + padding) % stride; }

  HEARKEN_HD int64_t taps(int64_t phase) const {
    const int64_t first = first_tap(phase);
    return first < kernel ? (kernel - first + stride - 1) / stride : 0;
  }

  // The output rows that input row `position` takes part in, ascending; the j-th of them meets it
  // with tap tap_of_output(phase, j), so the taps descend.
  HEARKEN_HD Window outputs(int64_t position) const {
    const int64_t phase = position % stride;
    const int64_t count = taps(phase);
    const int64_t last_tap = first_tap(phase) + (count - 1) * stride;
    return {(position + padding - last_tap) / stride, count};  // exact, also where negative
  }

  HEARKEN_HD int64_t tap_of_output(int64_t phase, int64_t j) const {
    return first_tap(phase) + (taps(phase) - 1 - j) * stride;
  }

  HEARKEN_HD int64_t output_length(int64_t length) const {
    const int64_t reach = length + 2 * padding - kernel;
    return length == 0 || reach < 0 ? 0 : reach / stride + 1;
  }

  // Input rows are worked on in groups of `stride`, one row of each phase.
  HEARKEN_HD int64_t groups(int64_t length) const { return (length + stride - 1) / stride; }
};

}  // namespace hearken
