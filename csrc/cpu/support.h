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

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

// An uninitialised tensor. Large ones are fresh from the kernel each time, and faulting them in
// page by page costs several times what filling them does: where the system leaves huge pages to
// madvise, ask for them.
inline Tensor allocate(
    const Tensor& like, std::initializer_list<int64_t> sizes,
    std::optional<ScalarType> dtype = std::nullopt) {
  Tensor tensor = torch::stable::new_empty(like, sizes, dtype);
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t end = begin + tensor.numel() * tensor.element_size();
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = end / kHugePage * kHugePage;
  // Advice: where it is not taken, nothing is lost.
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

// Rows may lie at any distance; what stands in a row must be contiguous.
inline Tensor with_contiguous_rows(const Tensor& tensor) {
  const bool good = tensor.size(1) <= 1 || tensor.stride(1) == 1;
  return good ? tensor : torch::stable::contiguous(tensor);
}

// bf16 rounded by hand: PyTorch's conversion branches on NaN, which keeps a loop from being
// vectorised.
inline BFloat16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  return BFloat16(uint16_t(is_nan ? 0x7fc0 : rounded), BFloat16::from_bits());
}

// Sums to what a tensor holds.
template <class To, class From>
To rounded(From value) {
  if constexpr (std::is_same_v<To, BFloat16>) {
    return to_bf16(float(value));
  } else {
    return To(value);
  }
}

template <class To, class From>
void convert(const From* __restrict from, To* __restrict to, int64_t count) {
  if constexpr (std::is_same_v<To, From>) {
    std::memcpy(to, from, count * sizeof(To));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = rounded<To>(static_cast<Sum<From>>(from[i]));
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
