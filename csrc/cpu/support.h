// What the CPU kernels share: typed views of tensors, GEMM on raw memory, dispatch over dtypes.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/checks.h"
#include "../common/sum.h"

namespace hearken {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::stable::parallel_for;

template <class T>
constexpr ScalarType dtype_of() {
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, BFloat16>) return ScalarType::BFloat16;
  if constexpr (std::is_same_v<T, Half>) return ScalarType::Half;
}

template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Rows may lie at any distance; what stands in a row must be contiguous.
inline Tensor with_contiguous_rows(const Tensor& tensor) {
  const bool good = tensor.size(1) <= 1 || tensor.stride(1) == 1;
  return good ? tensor : torch::stable::contiguous(tensor);
}

template <class To, class From>
void convert(const From* from, To* to, int64_t count) {
  if constexpr (std::is_same_v<To, From>) {
    std::memcpy(to, from, count * sizeof(To));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(static_cast<Sum<From>>(from[i]));
  }
}

// A matrix in memory that something else owns. Row i, column j is at data[i * row + j * column].
struct Matrix {
  const void* data;
  ScalarType dtype;
  int64_t rows;
  int64_t columns;
  int64_t row;
  int64_t column = 1;

  Matrix transposed() const { return {data, dtype, columns, rows, column, row}; }

  Tensor tensor() const {
    return torch::stable::from_blob(
        const_cast<void*>(data), {rows, columns}, {row, column},
        torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
  }
};

// out = a @ b, or out + a @ b; PyTorch's own (MKL or oneDNN), which no kernel of ours would beat.
inline void multiply(const Matrix& a, const Matrix& b, const Matrix& out, bool add = false) {
  if (out.rows == 0 || out.columns == 0) return;
  const Tensor target = out.tensor();
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(
      target.get(), target.get(), a.tensor().get(), b.tensor().get(), add ? 1.0 : 0.0, 1.0));
}

}  // namespace hearken
