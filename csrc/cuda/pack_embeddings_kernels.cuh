// The kernels of pack_embeddings. A block makes one row at a time, its threads taking 8 columns by
// turns; the row stays in shared memory while LayerNorm looks at it. Dtypes are told at run time:
// the branch is the same for all threads, and there is time for it between two memory accesses.
#pragma once

#include "../common/packing.h"
#include "../common/sum.h"
#include "device.cuh"

namespace hearken {

enum class Kind { f32, bf16, f16, f64 };

constexpr int kVector = 8;  // columns that a thread takes at a time

// Rows of a tensor of any floating dtype. `aligned`: 8 columns may be accessed at once.
struct AnyRows {
  void* data;
  Kind kind;
  int64_t pitch;
  int width;
  bool aligned;

  template <class A>
  __device__ __forceinline__ void load(int64_t row, int column, A (&to)[kVector]) const {
    switch (kind) {
      case Kind::f32:
        return load_as<float>(row, column, to);
      case Kind::bf16:
        return load_as<BFloat16>(row, column, to);
      case Kind::f16:
        return load_as<Half>(row, column, to);
      case Kind::f64:
        return load_as<double>(row, column, to);
    }
  }

  template <class A>
  __device__ __forceinline__ void store(int64_t row, int column, const A (&from)[kVector]) const {
    switch (kind) {
      case Kind::f32:
        return store_as<float>(row, column, from);
      case Kind::bf16:
        return store_as<BFloat16>(row, column, from);
      case Kind::f16:
        return store_as<Half>(row, column, from);
      case Kind::f64:
        return store_as<double>(row, column, from);
    }
  }

 private:
  template <class T>
  struct alignas(16) Vector {
    T values[kVector];
  };

  template <class T, class A>
  __device__ __forceinline__ void load_as(int64_t row, int column, A (&to)[kVector]) const {
    const T* from = static_cast<const T*>(data) + row * pitch + column;
    if (aligned) {
      const Vector<T> vector = *reinterpret_cast<const Vector<T>*>(from);
#pragma unroll
      for (int i = 0; i < kVector; ++i) to[i] = A(static_cast<Sum<T>>(vector.values[i]));
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        to[i] = column + i < width ? A(static_cast<Sum<T>>(from[i])) : A(0);
    }
  }

  template <class T, class A>
  __device__ __forceinline__ void store_as(
      int64_t row, int column, const A (&from)[kVector]) const {
    T* to = static_cast<T*>(data) + row * pitch + column;
    if (aligned) {
      Vector<T> vector;
#pragma unroll
      for (int i = 0; i < kVector; ++i) vector.values[i] = T(static_cast<Sum<T>>(from[i]));
      *reinterpret_cast<Vector<T>*>(to) = vector;
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (column + i < width) to[i] = T(static_cast<Sum<T>>(from[i]));
    }
  }
};

// The sum over all threads of a block, in a fixed order; every thread gets it. of_warps: shared.
constexpr int kMaxWarps = 8;

template <class A>
__device__ __forceinline__ A sum_over_block(A value, A* of_warps) {
  value = sum_over_warp(value);
  __syncthreads();  // of_warps may still be read from the sum before
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  A sum = 0;
  for (int warp = 0; warp < blockDim.x / 32; ++warp) sum += of_warps[warp];
  return sum;
}

template <class A>
struct Moments {
  A mean, rstd;
};

// Fills `row` in shared memory; each thread later reads only the columns that it wrote.
template <class A>
__device__ __forceinline__ Moments<A> load_and_measure(
    const AnyRows& rows, int64_t from, double eps, A* row, A* of_warps) {
  const int width = rows.width;
  A sum = 0;
  for (int column = threadIdx.x * kVector; column < width; column += blockDim.x * kVector) {
    A values[kVector];
    rows.load(from, column, values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (column + i >= width) break;
      row[column + i] = values[i];
      sum += values[i];
    }
  }
  const A mean = sum_over_block(sum, of_warps) / A(width);
  A squares = 0;
  for (int column = threadIdx.x * kVector; column < width; column += blockDim.x * kVector)
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (column + i < width) squares += (row[column + i] - mean) * (row[column + i] - mean);
  return {mean, rsqrt(sum_over_block(squares, of_warps) / A(width) + A(eps))};
}

// Grid: one block per position. Shared: kMaxWarps and a row of A.
template <class A>
__global__ void pack(
    AnyRows table, AnyRows speech, const int64_t* source, const A* ln_weight, const A* ln_bias,
    double eps, AnyRows out) {
  extern __shared__ __align__(16) unsigned char shared[];
  A* of_warps = reinterpret_cast<A*>(shared);
  A* row = of_warps + kMaxWarps;
  const int64_t position = blockIdx.x;
  const Source from{source[position]};
  A values[kVector];
  if (from.is_text()) {
    for (int column = threadIdx.x * kVector; column < out.width; column += blockDim.x * kVector) {
      table.load(from.text_row(), column, values);
      out.store(position, column, values);
    }
    return;
  }
  const Moments<A> of = load_and_measure(speech, from.speech_row(), eps, row, of_warps);
  for (int column = threadIdx.x * kVector; column < out.width; column += blockDim.x * kVector) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const int at = column + i < out.width ? column + i : column;
      values[i] = (row[at] - of.mean) * of.rstd * ln_weight[at] + ln_bias[at];
    }
    out.store(position, column, values);
  }
}

// position_of must hold -1 everywhere before. Each speech row stands at one position at most.
static __global__ void find_positions(
    const int64_t* source, int64_t positions, int64_t* position_of) {
  const int64_t position = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (position >= positions) return;
  const Source from{source[position]};
  if (!from.is_text()) position_of[from.speech_row()] = position;
}

// Block b takes speech rows b, b + grid, ... and sums its share of LayerNorm's gradients.
// shares: [grid, 2, H]. Shared: kMaxWarps and three rows of A. grad_speech.data may be null.
template <class A>
__global__ void pack_backward(
    AnyRows grad, AnyRows speech, const int64_t* position_of, int64_t rows, const A* ln_weight,
    double eps, AnyRows grad_speech, A* shares) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int width = speech.width;
  A* of_warps = reinterpret_cast<A*>(shared);
  A* normed = of_warps + kMaxWarps;
  A* weight_share = normed + width;
  A* bias_share = weight_share + width;
  // Every column belongs to one thread throughout, so the shares need no barrier.
  const auto for_columns = [&](const auto& f) {
    for (int column = threadIdx.x * kVector; column < width; column += blockDim.x * kVector)
      f(column);
  };
  for_columns([&](int column) {
    for (int i = column; i < column + kVector && i < width; ++i)
      weight_share[i] = bias_share[i] = A(0);
  });
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const int64_t position = position_of[r];
    if (position < 0) {
      if (grad_speech.data == nullptr) continue;
      const A zeros[kVector] = {};
      for_columns([&](int column) { grad_speech.store(r, column, zeros); });
      continue;
    }
    const Moments<A> of = load_and_measure(speech, r, eps, normed, of_warps);
    A sum = 0, sum_normed = 0;
    for_columns([&](int column) {
      A back[kVector];
      grad.load(position, column, back);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (column + i >= width) break;
        const A value = (normed[column + i] - of.mean) * of.rstd;
        const A weighted = back[i] * ln_weight[column + i];
        normed[column + i] = value;
        weight_share[column + i] += back[i] * value;
        bias_share[column + i] += back[i];
        sum += weighted;
        sum_normed += weighted * value;
      }
    });
    if (grad_speech.data == nullptr) continue;
    const A mean = sum_over_block(sum, of_warps) / A(width);
    const A mean_normed = sum_over_block(sum_normed, of_warps) / A(width);
    for_columns([&](int column) {
      A back[kVector];
      grad.load(position, column, back);  // again; it is in the cache
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const int at = column + i < width ? column + i : column;
        back[i] = layer_norm_slope(back[i] * ln_weight[at], normed[at], of.rstd, mean, mean_normed);
      }
      grad_speech.store(r, column, back);
    });
  }
  for_columns([&](int column) {
    A* to = shares + int64_t(blockIdx.x) * 2 * width;
    for (int i = column; i < column + kVector && i < width; ++i) {
      to[i] = weight_share[i];
      to[width + i] = bias_share[i];
    }
  });
}

// totals[i] = sum of shares[:, i], in order. totals: one row of 2 * H columns' worth of A.
template <class A>
__global__ void add_pack_shares(const A* shares, int64_t count, int width, A* totals) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= width) return;
  A sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += shares[i * width + column];
  totals[column] = sum;
}

// keys: the plan, sorted; order: the positions that it came from, ascending for equal keys. The
// block at the head of a run of equal keys sums the run, in order: grid (positions, columns / 256).
template <class A>
__global__ void table_backward(
    AnyRows grad, const int64_t* keys, const int64_t* order, int64_t positions,
    AnyRows grad_table) {
  const int64_t head = blockIdx.x;
  const Source from{keys[head]};
  if (!from.is_text() || (head > 0 && keys[head - 1] == keys[head])) return;
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * kVector;
  if (column >= grad.width) return;
  A sums[kVector] = {};
  for (int64_t i = head; i < positions && keys[i] == keys[head]; ++i) {
    A values[kVector];
    grad.load(order[i], column, values);
#pragma unroll
    for (int j = 0; j < kVector; ++j) sums[j] += values[j];
  }
  grad_table.store(from.text_row(), column, sums);
}

}  // namespace hearken
