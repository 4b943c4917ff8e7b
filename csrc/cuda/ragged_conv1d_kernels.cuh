// The three products of ragged_conv1d as problems for implicit_gemm, and the small kernels around
// them. Nothing here knows PyTorch.
#pragma once

#include "../common/activation.h"
#include "../common/ragged.h"
#include "gemm.cuh"

namespace hearken {

// Where every row of a product reads and writes, looked up once instead of in every tile.
// windows: [rows], or [phases, rows] with kBackward.
template <bool kBackward>
__global__ void find_windows(Segments segments, Conv conv, int64_t rows, Window* windows) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t phase = blockIdx.z;
  if (row >= rows) return;
  windows[phase * rows + row] =
      kBackward ? conv.outputs(segments, phase, row) : conv.inputs(segments, row);
}

// A window of rows of `channels` values, one after another: one row of an operand.
template <class T>
__device__ __forceinline__ Row<T> row_of_window(const T* data, int channels, const Window& window) {
  return {data + window.row * channels, window.begin * channels, window.end * channels};
}

// y = activation(windows of x @ weight^T + bias)
template <class Element>
struct ForwardProblem {
  using T = Element;
  static constexpr Along kA = Along::k, kB = Along::k;

  const T* x;
  const T* weight;
  const T* bias;  // or null
  const Window* windows;
  T* y;
  T* sums;  // or null
  int64_t out_rows;
  int channels, out_channels, taps;
  Activation activation;

  __device__ void select(int) {}
  __device__ int64_t rows() const { return out_rows; }
  // With glu a tile holds blocks of 16 channels of both halves by turns, so that the block that
  // has the value has its gate as well.
  __device__ int64_t columns() const {
    return is_glu() ? (int64_t(half()) + 15) / 16 * 32 : out_channels;
  }
  __device__ int64_t depth() const { return int64_t(taps) * channels; }

  __device__ Row<T> a(int64_t row) const {
    if (row >= out_rows) return {x, 0, 0};
    return row_of_window(x, channels, windows[row]);
  }

  __device__ Row<T> b(int64_t column) const {
    const int channel = channel_of(column);
    if (channel < 0) return {weight, 0, 0};
    return {weight + int64_t(channel) * taps * channels, 0, taps * channels};
  }

  __device__ void store(const Sum<T>* tile, int64_t row, int64_t column) const {
    const int width = is_glu() ? kTile / 2 : kTile;
    for (int i = threadIdx.x; i < kTile * width; i += kThreads) {
      const int64_t to = row + i / width;
      if (to >= out_rows) continue;
      const int j = is_glu() ? i % width / 16 * 32 + i % 16 : i % width;
      const int channel = channel_of(column + j);
      if (channel < 0) continue;
      const Sum<T>* at = tile + (i / width) * kSumPitch<T> + j;
      const Sum<T> sum = keep(at[0], to, channel);
      if (is_glu()) {
        const Sum<T> gate = keep(at[16], to, channel + half());
        y[to * half() + channel] = T(sum * sigmoid(gate));
      } else {
        y[to * out_channels + channel] = T(activation == Activation::gelu ? gelu(sum) : sum);
      }
    }
  }

 private:
  __device__ bool is_glu() const { return activation == Activation::glu; }
  __device__ int half() const { return out_channels / 2; }

  // The channel of a column of the product, -1 beyond the last.
  __device__ int channel_of(int64_t column) const {
    if (!is_glu()) return column < out_channels ? static_cast<int>(column) : -1;
    const int within = static_cast<int>(column / 32 * 16 + column % 16);
    if (within >= half()) return -1;
    return within + (column / 16 % 2 ? half() : 0);
  }

  // Adds the bias, and rounds as the backward will see it.
  __device__ Sum<T> keep(Sum<T> sum, int64_t row, int channel) const {
    const T rounded = T(sum + (bias ? Sum<T>(bias[channel]) : Sum<T>(0)));
    if (sums) sums[row * out_channels + channel] = rounded;
    return Sum<T>(rounded);
  }
};

// grad_x = windows of grad @ weight, a share per phase, whose rows all meet the same taps.
template <class Element>
struct InputGradProblem {
  using T = Element;
  static constexpr Along kA = Along::k, kB = Along::mn;

  const T* grad;
  const T* weight;
  const Window* windows;  // [phases, groups]
  T* grad_x;
  int64_t groups;
  int channels, out_channels;
  Conv conv;
  int phase = 0, phase_taps = 0;

  __device__ void select(int z) {
    phase = z;
    phase_taps = static_cast<int>(conv.taps(z));
    windows += z * groups;
  }
  __device__ int64_t rows() const { return groups; }
  __device__ int64_t columns() const { return channels; }
  __device__ int64_t depth() const { return int64_t(phase_taps) * out_channels; }

  __device__ Row<T> a(int64_t row) const {
    if (row >= groups) return {grad, 0, 0};
    return row_of_window(grad, out_channels, windows[row]);
  }

  // Row (j, d) is what channel d of the output has for the j-th tap of the window.
  __device__ Row<T> b(int64_t k) const {
    const int j = static_cast<int>(k) / out_channels, channel = static_cast<int>(k) % out_channels;
    if (j >= phase_taps) return {weight, 0, 0};
    const int64_t tap = conv.tap_of(phase, j);
    return {weight + (channel * conv.kernel + tap) * channels, 0, channels};
  }

  __device__ void store(const Sum<T>* tile, int64_t row, int64_t column) const {
    for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
      const int64_t from = row + i / kTile, channel = column + i % kTile;
      if (from >= groups || channel >= channels) continue;
      const int64_t to = windows[from].target;
      if (to >= 0) grad_x[to * channels + channel] = T(tile[i / kTile * kSumPitch<T> + i % kTile]);
    }
  }
};

// grad_weight = grad^T @ windows of x: the sum over all rows stays in one block, so that its order
// is fixed.
template <class Element>
struct WeightGradProblem {
  using T = Element;
  static constexpr Along kA = Along::mn, kB = Along::mn;

  const T* grad;
  const T* x;
  const Window* windows;
  T* grad_weight;
  int64_t out_rows;
  int channels, out_channels, taps;

  __device__ void select(int) {}
  __device__ int64_t rows() const { return out_channels; }
  __device__ int64_t columns() const { return int64_t(taps) * channels; }
  __device__ int64_t depth() const { return out_rows; }

  __device__ Row<T> a(int64_t k) const {
    if (k >= out_rows) return {grad, 0, 0};
    return {grad + k * out_channels, 0, out_channels};
  }

  __device__ Row<T> b(int64_t k) const {
    if (k >= out_rows) return {x, 0, 0};
    return row_of_window(x, channels, windows[k]);
  }

  __device__ void store(const Sum<T>* tile, int64_t row, int64_t column) const {
    for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
      const int64_t channel = row + i / kTile, at = column + i % kTile;
      if (channel >= out_channels || at >= columns()) continue;
      grad_weight[channel * columns() + at] = T(tile[i / kTile * kSumPitch<T> + i % kTile]);
    }
  }
};

constexpr int kRowsPerShare = 128;

// The gradient of the sums, and each share of rows' part of the bias's: a thread has one channel.
// grad_sums may be null (no activation), shares may be null (no bias).
template <class T>
__global__ void activation_backward(
    const T* grad, const T* sums, int64_t rows, int out_channels, Activation activation,
    T* grad_sums, Sum<T>* shares) {
  using A = Sum<T>;
  const int channel = blockIdx.y * blockDim.x + threadIdx.x;
  if (channel >= out_channels) return;
  const int half = out_channels / 2;
  const int within = channel < half ? channel : channel - half;
  const int64_t begin = int64_t(blockIdx.x) * kRowsPerShare;
  const int64_t end = begin + kRowsPerShare < rows ? begin + kRowsPerShare : rows;
  A share = 0;
  for (int64_t row = begin; row < end; ++row) {
    A back;
    if (activation == Activation::glu) {
      const A value = A(sums[row * out_channels + within]);
      const A gate = sigmoid(A(sums[row * out_channels + half + within]));
      const A by_gate = A(grad[row * half + within]) * gate;
      back = channel < half ? by_gate : by_gate * (A(1) - gate) * value;
    } else {
      back = A(grad[row * out_channels + channel]);
      if (activation == Activation::gelu) back *= gelu_slope(A(sums[row * out_channels + channel]));
    }
    if (grad_sums) {
      const T rounded = T(back);
      grad_sums[row * out_channels + channel] = rounded;
      back = A(rounded);
    }
    share += back;
  }
  if (shares) shares[blockIdx.x * int64_t(out_channels) + channel] = share;
}

// Adds up the shares [count, channels] in order.
template <class T>
__global__ void add_shares(const Sum<T>* shares, int64_t count, int channels, T* total) {
  const int channel = blockIdx.x * blockDim.x + threadIdx.x;
  if (channel >= channels) return;
  Sum<T> sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += shares[i * channels + channel];
  total[channel] = T(sum);
}

}  // namespace hearken
