// What the CUDA entry points share: allocation, typed views of tensors, sizes of grids.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>

#include "../common/checks.h"
#include "../common/sum.h"
#include "device.cuh"
#include "launch.cuh"

namespace hearken {

// Blocks of `size` for `count` items, as a grid's extent.
inline unsigned int blocks_for(int64_t count, int64_t size) {
  const int64_t blocks = (count + size - 1) / size;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), count, " items are too many.");
  return static_cast<unsigned int>(blocks);
}

template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
constexpr ScalarType dtype_of() {
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, BFloat16>) return ScalarType::BFloat16;
  if constexpr (std::is_same_v<T, Half>) return ScalarType::Half;
}

inline bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

}  // namespace hearken
