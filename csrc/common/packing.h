// What stands at a position of a packed batch, for CPU and CUDA alike.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace hearken {

// One number of the collator's plan: v >= 0 is row v of the embedding table, v < 0 is row -v - 1
// of the speech.
struct Source {
  int64_t value;

  HEARKEN_HD bool is_text() const { return value >= 0; }
  HEARKEN_HD int64_t text_row() const { return value; }
  HEARKEN_HD int64_t speech_row() const { return -value - 1; }
};

// The gradient of one element through LayerNorm: `normed` is the element as LayerNorm made it
// before its weight, `grad` what comes back times the weight, and the means are over the row.
template <class A>
HEARKEN_HD A layer_norm_slope(A grad, A normed, A rstd, A mean_grad, A mean_grad_normed) {
  return rstd * (grad - mean_grad - normed * mean_grad_normed);
}

}  // namespace hearken
