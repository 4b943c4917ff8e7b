// An implicit GEMM: sums[m, n] = sum over k of a[m, k] * b[k, n], where both operands are given by
// rows that lie anywhere in memory and of which only a part exists, the rest being zero. That is
// all a ragged convolution needs, forward and backward, see ragged_conv1d_kernels.cuh.
//
// One block makes a tile of 128 x 128 sums with 8 warps; four stages of shared memory are filled
// in the background. bf16 and fp16 go to the tensor cores, float and double to ordinary FMAs.
#pragma once

#include "../common/sum.h"
#include "device.cuh"

namespace hearken {

// A row of an operand: elements [begin, end) stand at base[begin .. end), the others are zero.
template <class T>
struct Row {
  const T* base;
  int begin;
  int end;
};

// How an operand's rows lie: along k (row i is for m or n = i), or across it (row i is for k = i).
enum class Along { k, mn };

constexpr int kTile = 128;
constexpr int kThreads = 256;
constexpr int kStages = 4;
constexpr int kTileBytes = kTile * 80;  // of an operand, in one stage, the larger of both layouts

template <class T>
constexpr int kDepth = 64 / sizeof(T);  // of a tile along k
template <class T>
constexpr int kChunk = 16 / sizeof(T);  // elements that one thread copies at a time

// Elements from one row of an operand's tile in shared memory to the next; the padding of 16 bytes
// spreads the rows over the banks.
template <class T, Along kAlong>
constexpr int kPitch = (kAlong == Along::k ? kDepth<T> : kTile) + kChunk<T>;

// Sums of one tile, in shared memory while they are written out.
template <class T>
constexpr int kSumPitch = kTile + 4;
template <class T>
constexpr int kSharedBytes = kTile * kSumPitch<T> * sizeof(Sum<T>) > 2 * kStages* kTileBytes
                                 ? kTile * kSumPitch<T> * sizeof(Sum<T>)
                                 : 2 * kStages * kTileBytes;

// Fetches the tiles of one operand; each thread brings two chunks per tile. kAligned: every row
// begins, and every begin and end falls, at a multiple of 16 bytes.
template <class T, Along kAlong, bool kAligned>
class Fetcher {
 public:
  // `row_of(i)` names row i of the operand; the tile begins at row or column `origin`.
  template <class F>
  __device__ __forceinline__ Fetcher(const F& row_of, int64_t origin) {
    origin_ = static_cast<int>(origin);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      rows_[i] = row_of(kAlong == Along::k ? origin + row_in_tile(i) : row_in_tile(i));
  }

  template <class F>
  __device__ __forceinline__ void fetch(T* tile, int64_t k, const F& row_of) {
    const int column = static_cast<int>(kAlong == Along::k ? k : origin_) + column_in_tile();
#pragma unroll
    for (int i = 0; i < 2; ++i)
      copy_chunk(tile + row_in_tile(i) * kPitch<T, kAlong> + column_in_tile(), rows_[i], column);
    if constexpr (kAlong == Along::mn) {
      // Ahead of time: naming a row may take a look into memory.
#pragma unroll
      for (int i = 0; i < 2; ++i) rows_[i] = row_of(k + kDepth<T> + row_in_tile(i));
    }
  }

 private:
  static constexpr int kChunksPerRow = (kAlong == Along::k ? kDepth<T> : kTile) / kChunk<T>;

  static __device__ __forceinline__ int row_in_tile(int i) {
    return threadIdx.x / kChunksPerRow + i * (kThreads / kChunksPerRow);
  }

  static __device__ __forceinline__ int column_in_tile() {
    return threadIdx.x % kChunksPerRow * kChunk<T>;
  }

  static __device__ __forceinline__ void copy_chunk(T* to, const Row<T>& row, int column) {
    if constexpr (kAligned) {
      copy_16_bytes(to, row.base + column, column >= row.begin && column < row.end);
    } else {
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) {
        const bool exists = column + i >= row.begin && column + i < row.end;
        to[i] = exists ? row.base[column + i] : T(0.0f);
      }
    }
  }

  Row<T> rows_[2];
  int origin_;
};

// What one thread sums up. Warps stand 2 x 4 over the tile, each over 64 x 32.
template <class T, Along kA, Along kB>
class TensorCoreSums {
 public:
  __device__ __forceinline__ void add(const T* a, const T* b) {
    const int lane = threadIdx.x % 32;
    const int low = lane % 8, middle = lane / 8 % 2, high = lane / 16;
#pragma unroll
    for (int k = 0; k < kDepth<T>; k += 16) {
      uint32_t a_parts[4][4], b_parts[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // In the order that the product wants: (m, k), (m + 8, k), (m, k + 8), (m + 8, k + 8).
        const int m = first_row() + 16 * i;
        const T* from = kA == Along::k ? a + (m + low + 8 * middle) * kPitch<T, kA> + k + 8 * high
                                       : a + (k + low + 8 * high) * kPitch<T, kA> + m + 8 * middle;
        load_matrices<kA == Along::mn>(a_parts[i], from);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        // (k, n), (k + 8, n), (k, n + 8), (k + 8, n + 8), each with n along its rows.
        const int n = first_column() + 16 * j;
        const T* from = kB == Along::k ? b + (n + low + 8 * high) * kPitch<T, kB> + k + 8 * middle
                                       : b + (k + low + 8 * middle) * kPitch<T, kB> + n + 8 * high;
        load_matrices<kB == Along::mn>(b_parts[j], from);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          multiply_add<T>(
              sums_[i][j], a_parts[i], b_parts[j / 2][j % 2 * 2], b_parts[j / 2][j % 2 * 2 + 1]);
    }
  }

  __device__ __forceinline__ void write(float* tile) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const int row = first_row() + 16 * i + lane / 4 + part / 2 * 8;
          const int column = first_column() + 8 * j + lane % 4 * 2 + part % 2;
          tile[row * kSumPitch<T> + column] = sums_[i][j][part];
        }
  }

 private:
  static __device__ __forceinline__ int first_row() { return threadIdx.x / 128 * 64; }
  static __device__ __forceinline__ int first_column() { return threadIdx.x / 32 % 4 * 32; }

  float sums_[4][4][4] = {};
};

template <class T, Along kA, Along kB>
class FmaSums {
 public:
  __device__ __forceinline__ void add(const T* a, const T* b) {
#pragma unroll 2
    for (int k = 0; k < kDepth<T>; ++k) {
      T a_parts[8], b_parts[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int m = threadIdx.x / 16 + 16 * i, n = threadIdx.x % 16 + 16 * i;
        a_parts[i] = kA == Along::k ? a[m * kPitch<T, kA> + k] : a[k * kPitch<T, kA> + m];
        b_parts[i] = kB == Along::k ? b[n * kPitch<T, kB> + k] : b[k * kPitch<T, kB> + n];
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sums_[i][j] += a_parts[i] * b_parts[j];
    }
  }

  __device__ __forceinline__ void write(T* tile) const {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j)
        tile[(threadIdx.x / 16 + 16 * i) * kSumPitch<T> + threadIdx.x % 16 + 16 * j] = sums_[i][j];
  }

 private:
  T sums_[8][8] = {};
};

// Problem: T, kA, kB; select(z) for this block's share, rows(), columns() and depth() of it;
// a(i), b(i) name rows of the operands, empty ones beyond the end; store(sums, row, column) takes
// the finished tile, all threads together.
// Grid: enough blocks in x for the tiles of the largest share, one share per z.
template <class Problem, bool kAligned>
__global__ void __launch_bounds__(kThreads, sizeof(typename Problem::T) == 2 && kAligned ? 2 : 1)
    implicit_gemm(Problem problem) {
  using T = typename Problem::T;
  constexpr Along kA = Problem::kA, kB = Problem::kB;
  extern __shared__ __align__(16) unsigned char shared[];

  problem.select(blockIdx.z);
  // Neighbouring blocks share their rows of a, which are the ones that are gathered.
  const int64_t tiles = (problem.columns() + kTile - 1) / kTile;
  const int64_t row = blockIdx.x / tiles * kTile;
  const int64_t column = blockIdx.x % tiles * kTile;
  if (row >= problem.rows()) return;

  const auto a_row = [&](int64_t i) { return problem.a(i); };
  const auto b_row = [&](int64_t i) { return problem.b(i); };
  const auto a_tile = [&](int stage) { return reinterpret_cast<T*>(shared + stage * kTileBytes); };
  const auto b_tile = [&](int stage) {
    return reinterpret_cast<T*>(shared + (kStages + stage) * kTileBytes);
  };
  Fetcher<T, kA, kAligned> a(a_row, row);
  Fetcher<T, kB, kAligned> b(b_row, column);
  std::conditional_t<sizeof(T) == 2, TensorCoreSums<T, kA, kB>, FmaSums<T, kA, kB>> sums;

  const int steps = static_cast<int>((problem.depth() + kDepth<T> - 1) / kDepth<T>);
  const auto fetch = [&](int step) {
    if (step < steps) {
      a.fetch(a_tile(step % kStages), int64_t(step) * kDepth<T>, a_row);
      b.fetch(b_tile(step % kStages), int64_t(step) * kDepth<T>, b_row);
    }
    close_copy_group();  // an empty one too, so that the count of groups tells which stage is in
  };
  for (int step = 0; step < kStages - 1; ++step) fetch(step);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // all have seen this stage arrive, and none still reads the one before it
    fetch(step + kStages - 1);
    sums.add(a_tile(step % kStages), b_tile(step % kStages));
  }
  wait_for_copies<0>();
  __syncthreads();
  auto* tile = reinterpret_cast<Sum<T>*>(shared);
  sums.write(tile);
  __syncthreads();
  problem.store(tile, row, column);
}

}  // namespace hearken
