// ragged_conv1d on the CPU: windows are gathered, block by block, into a panel whose every row is
// what one row of the result meets, and one GEMM over all taps does the rest, so that low precision
// is rounded once. Gathering K * C values costs little beside the K * C * D products made of them.

#include "../common/activation.h"
#include "../common/ragged.h"
#include "support.h"

namespace hearken {
namespace {

// Big enough to keep the GEMM at its full rate, small enough to stay in the last-level cache.
constexpr int64_t kPanelBytes = 8 << 20;
// The gradient of the weight wants all rows at once; beyond this, it takes fewer taps at a time.
constexpr int64_t kTapPanelBytes = 64 << 20;

// One side of the convolution: rows of a flat tensor, and the segments that they lie in.
template <class T>
struct Rows {
  const T* data;
  int64_t pitch;
  int64_t channels;
  const int64_t* starts;
  const int64_t* lengths;
};

// Copies a window of a segment, as the GEMM's type; zeros stand for what is beyond the borders.
template <class T, class G>
void copy_window(const Rows<T>& from, int64_t segment, Window window, G* to) {
  const int64_t length = from.lengths[segment];
  const int64_t begin = std::clamp<int64_t>(-window.first, 0, window.count);
  const int64_t end = std::clamp<int64_t>(length - window.first, begin, window.count);
  const int64_t channels = from.channels;
  std::fill(to, to + begin * channels, G(0.0f));
  const T* row = from.data + (from.starts[segment] + window.first + begin) * from.pitch;
  if (from.pitch == channels) {
    convert(row, to + begin * channels, (end - begin) * channels);
  } else {
    for (int64_t i = begin; i < end; ++i, row += from.pitch)
      convert(row, to + i * channels, channels);
  }
  std::fill(to + end * channels, to + window.count * channels, G(0.0f));
}

// Fills rows [begin, end) of a panel; `window_of(position)` names the window of a row, `row_starts`
// says which segment the row is in and at which position.
template <class T, class G, class F>
void gather(
    const Rows<T>& from, const int64_t* row_starts, int64_t segments, int64_t begin, int64_t end,
    int64_t width, G* panel, const F& window_of) {
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, width));
  parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    int64_t segment = segment_of(row_starts, segments, first);
    for (int64_t row = first; row < last; ++row) {
      while (segment + 1 < segments && row_starts[segment + 1] <= row) ++segment;
      copy_window(
          from, segment, window_of(row - row_starts[segment]), panel + (row - begin) * width);
    }
  });
}

int64_t rows_per_panel(int64_t width, int64_t item_bytes, int64_t limit_bytes) {
  return std::max<int64_t>(64, limit_bytes / std::max<int64_t>(1, width * item_bytes));
}

template <class T>
void activate(const T* sums, T* y, int64_t channels, Activation activation) {
  using A = Sum<T>;
  if (activation == Activation::gelu) {
    for (int64_t i = 0; i < channels; ++i) y[i] = T(gelu(A(sums[i])));
  } else {
    const int64_t half = channels / 2;
    for (int64_t i = 0; i < half; ++i) y[i] = T(A(sums[i]) * sigmoid(A(sums[half + i])));
  }
}

// The gradient of one row's sums, as the GEMM's type.
template <class T, class G>
void activate_backward(
    const T* grad, const T* sums, G* out, int64_t channels, Activation activation) {
  using A = Sum<T>;
  if (activation == Activation::none) {
    convert(grad, out, channels);
  } else if (activation == Activation::gelu) {
    for (int64_t i = 0; i < channels; ++i) out[i] = G(A(grad[i]) * gelu_slope(A(sums[i])));
  } else {
    const int64_t half = channels / 2;
    for (int64_t i = 0; i < half; ++i) {
      const A gate = sigmoid(A(sums[half + i]));
      const A by_gate = A(grad[i]) * gate;
      out[i] = G(by_gate);
      out[half + i] = G(by_gate * (A(1) - gate) * A(sums[i]));
    }
  }
}

// T is the type of the tensors, G that of the GEMM.
template <class T, class G>
std::tuple<Tensor, Tensor> forward(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& starts,
    const Tensor& lengths, const Tensor& out_starts, int64_t out_rows, const Conv& conv,
    Activation activation, bool keep) {
  const int64_t out_channels = weight.size(0);
  const int64_t width = conv.kernel * x.size(1);
  const int64_t y_channels = activation == Activation::glu ? out_channels / 2 : out_channels;
  const Rows<T> from{
      read<T>(x), x.stride(0), x.size(1), read<int64_t>(starts), read<int64_t>(lengths)};

  Tensor y = torch::stable::new_empty(x, {out_rows, y_channels});
  Tensor kept = torch::stable::new_empty(x, {keep ? out_rows : 0, out_channels});
  const int64_t block = std::min(rows_per_panel(width, sizeof(G), kPanelBytes), out_rows);
  Tensor panel = torch::stable::new_empty(x, {block, width}, dtype_of<G>());
  Tensor sums = torch::stable::new_empty(x, {block, out_channels}, dtype_of<G>());
  const Tensor weight_g = torch::stable::to(weight, dtype_of<G>());
  const Matrix weight_matrix{read<G>(weight_g), dtype_of<G>(), out_channels, width, width};
  const Tensor bias_g = torch::stable::to(bias.value_or(kept), dtype_of<G>());

  for (int64_t begin = 0; begin < out_rows; begin += block) {
    const int64_t rows = std::min(block, out_rows - begin);
    gather(
        from, read<int64_t>(out_starts), out_starts.size(0), begin, begin + rows, width,
        write<G>(panel), [&](int64_t position) { return conv.inputs(position, 0, conv.kernel); });
    // Where the sums are wanted as they are, they go there at once.
    T* kept_rows = write<T>(kept) + (keep ? begin * out_channels : 0);
    T* y_rows = write<T>(y) + begin * y_channels;
    G* sum_rows = write<G>(sums);
    if constexpr (std::is_same_v<T, G>) {
      if (activation == Activation::none) {
        sum_rows = y_rows;
      } else if (keep) {
        sum_rows = kept_rows;
      }
    }
    // The bias goes in first, so that the GEMM adds to it before it rounds.
    if (bias.has_value()) {
      parallel_for(0, rows, 256, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row)
          convert(read<G>(bias_g), sum_rows + row * out_channels, out_channels);
      });
    }
    multiply(
        {write<G>(panel), dtype_of<G>(), rows, width, width}, weight_matrix.transposed(),
        {sum_rows, dtype_of<G>(), rows, out_channels, out_channels}, bias.has_value());
    parallel_for(0, rows, 16, [&](int64_t first, int64_t last) {
      std::vector<T> rounded(std::is_same_v<T, G> ? 0 : out_channels);
      for (int64_t row = first; row < last; ++row) {
        const G* from_row = sum_rows + row * out_channels;
        if constexpr (!std::is_same_v<T, G>) {
          if (keep) convert(from_row, kept_rows + row * out_channels, out_channels);
          if (activation == Activation::none) {
            convert(from_row, y_rows + row * y_channels, y_channels);
            continue;
          }
          // Through T and back, so that forward and backward see the same sums.
          convert(from_row, rounded.data(), out_channels);
          activate(rounded.data(), y_rows + row * y_channels, out_channels, activation);
        } else if (activation != Activation::none) {
          activate(from_row, y_rows + row * y_channels, out_channels, activation);
        }
      }
    });
  }
  return {y, kept};
}

// Column sums in two stages over blocks that do not depend on the number of threads.
template <class T, class G>
Tensor column_sums(const Tensor& like, const G* rows, int64_t count, int64_t channels) {
  using A = Sum<T>;
  constexpr int64_t kBlock = 256;
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  Tensor partial = torch::stable::new_zeros(like, {blocks, channels}, dtype_of<A>());
  parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      A* sum = write<A>(partial) + block * channels;
      for (int64_t row = block * kBlock; row < std::min(count, (block + 1) * kBlock); ++row)
        for (int64_t i = 0; i < channels; ++i) sum[i] += A(rows[row * channels + i]);
    }
  });
  Tensor total = torch::stable::new_zeros(like, {channels}, dtype_of<A>());
  A* sum = write<A>(total);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < channels; ++i) sum[i] += read<A>(partial)[block * channels + i];
  return torch::stable::to(total, dtype_of<T>());
}

// Input rows of one phase meet the same taps, so each phase is a GEMM of its own, over windows of
// the gradient's rows.
template <class T, class G>
Tensor backward_x(
    const Tensor& x, const Tensor& weight_g, const Rows<G>& grad, const Tensor& starts,
    const Tensor& lengths, const Tensor& group_starts, int64_t groups, const Conv& conv) {
  const int64_t channels = x.size(1);
  const int64_t out_channels = grad.channels;
  const int64_t segments = starts.size(0);
  Tensor grad_x = torch::stable::new_zeros(x, {x.size(0), channels});
  for (int64_t phase = 0; phase < conv.stride; ++phase) {
    const int64_t taps = conv.taps(phase);
    const int64_t width = taps * out_channels;
    if (taps == 0 || groups == 0) continue;
    // [taps, D, C], in the order in which a window meets them.
    Tensor taps_g = torch::stable::new_empty(weight_g, {taps, out_channels, channels});
    parallel_for(0, width, 64, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t tap = conv.tap_of_output(phase, i / out_channels);
        const int64_t from = ((i % out_channels) * conv.kernel + tap) * channels;
        convert(read<G>(weight_g) + from, write<G>(taps_g) + i * channels, channels);
      }
    });
    const int64_t block = std::min(rows_per_panel(width, sizeof(G), kPanelBytes), groups);
    Tensor panel = torch::stable::new_empty(weight_g, {block, width});
    Tensor product = torch::stable::new_empty(weight_g, {block, channels});
    for (int64_t begin = 0; begin < groups; begin += block) {
      const int64_t rows = std::min(block, groups - begin);
      gather(
          grad, read<int64_t>(group_starts), segments, begin, begin + rows, width, write<G>(panel),
          [&](int64_t group) { return conv.outputs(group * conv.stride + phase); });
      multiply(
          {write<G>(panel), dtype_of<G>(), rows, width, width},
          {read<G>(taps_g), dtype_of<G>(), width, channels, channels},
          {write<G>(product), dtype_of<G>(), rows, channels, channels});
      parallel_for(0, rows, 64, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
          const int64_t segment = segment_of(read<int64_t>(group_starts), segments, begin + row);
          const int64_t group = begin + row - read<int64_t>(group_starts)[segment];
          const int64_t position = group * conv.stride + phase;
          if (position >= read<int64_t>(lengths)[segment]) continue;
          const int64_t to = read<int64_t>(starts)[segment] + position;
          convert(read<G>(product) + row * channels, write<T>(grad_x) + to * channels, channels);
        }
      });
    }
  }
  return grad_x;
}

template <class T, class G>
Tensor backward_weight(
    const Rows<T>& from, const Tensor& weight, const G* grad, const Tensor& out_starts,
    int64_t out_rows, const Conv& conv) {
  const int64_t channels = from.channels;
  const int64_t out_channels = weight.size(0);
  const int64_t width = conv.kernel * channels;
  if (out_rows == 0) return torch::stable::new_zeros(weight, {out_channels, conv.kernel, channels});
  Tensor grad_weight =
      torch::stable::new_empty(weight, {out_channels, conv.kernel, channels}, dtype_of<G>());
  const int64_t tap_bytes = std::max<int64_t>(1, out_rows * channels * sizeof(G));
  const int64_t taps = std::clamp<int64_t>(kTapPanelBytes / tap_bytes, 1, conv.kernel);
  Tensor panel = torch::stable::new_empty(weight, {out_rows, taps * channels}, dtype_of<G>());
  for (int64_t tap = 0; tap < conv.kernel; tap += taps) {
    const int64_t count = std::min(taps, conv.kernel - tap);
    gather(
        from, read<int64_t>(out_starts), out_starts.size(0), 0, out_rows, count * channels,
        write<G>(panel), [&](int64_t position) { return conv.inputs(position, tap, count); });
    const Matrix grad_matrix{grad, dtype_of<G>(), out_rows, out_channels, out_channels};
    multiply(
        grad_matrix.transposed(),
        {read<G>(panel), dtype_of<G>(), out_rows, count * channels, count * channels},
        {write<G>(grad_weight) + tap * channels, dtype_of<G>(), out_channels, count * channels,
         width});
  }
  return torch::stable::to(grad_weight, dtype_of<T>());
}

template <class T, class G>
std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& kept,
    const Tensor& starts, const Tensor& lengths, const Tensor& out_starts,
    const Tensor& group_starts, int64_t groups, const Conv& conv, Activation activation,
    bool need_x, bool need_weight, bool need_bias) {
  const int64_t out_channels = weight.size(0);
  const int64_t out_rows = grad_y.size(0);
  const Tensor y_rows = torch::stable::contiguous(grad_y);

  // The gradient of the sums: where no activation stands between, it is the one that came in.
  const G* grad;
  Tensor grad_sums;
  if (std::is_same_v<T, G> && activation == Activation::none) {
    grad = read<G>(y_rows);
  } else {
    grad_sums = torch::stable::new_empty(x, {out_rows, out_channels}, dtype_of<G>());
    parallel_for(0, out_rows, 16, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        activate_backward(
            read<T>(y_rows) + row * grad_y.size(1), read<T>(kept) + row * kept.size(1),
            write<G>(grad_sums) + row * out_channels, out_channels, activation);
      }
    });
    grad = read<G>(grad_sums);
  }

  Tensor grad_x = torch::stable::new_empty(x, {0});
  Tensor grad_weight = torch::stable::new_empty(x, {0});
  Tensor grad_bias = torch::stable::new_empty(x, {0});
  if (need_x) {
    std::vector<int64_t> out_lengths(lengths.size(0));
    for (size_t i = 0; i < out_lengths.size(); ++i)
      out_lengths[i] = conv.output_length(read<int64_t>(lengths)[i]);
    const Rows<G> rows{
        grad, out_channels, out_channels, read<int64_t>(out_starts), out_lengths.data()};
    grad_x = backward_x<T, G>(
        x, torch::stable::to(weight, dtype_of<G>()), rows, starts, lengths, group_starts, groups,
        conv);
  }
  if (need_weight) {
    const Rows<T> rows{
        read<T>(x), x.stride(0), x.size(1), read<int64_t>(starts), read<int64_t>(lengths)};
    grad_weight = backward_weight<T, G>(rows, weight, grad, out_starts, out_rows, conv);
  }
  if (need_bias) grad_bias = column_sums<T, G>(x, grad, out_rows, out_channels);
  return {grad_x, grad_weight, grad_bias};
}

// bf16 products are taken where the machine has instructions for them; fp16 has none worth using
// on most CPUs, so it is multiplied as float, which is exact.
bool has_bf16_products() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return true;
#endif
}

template <class F>
auto dispatch_conv(ScalarType dtype, F&& f) {
  return dispatch(dtype, "x", [&](auto type) {
    using T = decltype(type);
    if constexpr (std::is_same_v<T, Half>) {
      return f(T{}, float{});
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      return has_bf16_products() ? f(T{}, T{}) : f(T{}, float{});
    } else {
      return f(T{}, T{});
    }
  });
}

// The device knows the segments only as numbers: on the CPU, reading them is free, so what would
// read or write outside x is refused here too.
void check_segments(
    const Tensor& x, const Tensor& starts, const Tensor& lengths, const Tensor& out_starts,
    int64_t out_rows, const Conv& conv) {
  int64_t out = 0;
  for (int64_t i = 0; i < starts.size(0); ++i) {
    const int64_t start = read<int64_t>(starts)[i];
    const int64_t length = read<int64_t>(lengths)[i];
    STD_TORCH_CHECK(
        start >= 0 && length >= 0 && start + length <= x.size(0), "segments must lie in the ",
        x.size(0), " rows of x, but segment ", i, " is rows ", start, " to ", start + length, ".");
    STD_TORCH_CHECK(
        read<int64_t>(out_starts)[i] == out, "out_starts[", i, "] must be ", out, ", but is ",
        read<int64_t>(out_starts)[i], ".");
    out += conv.output_length(length);
  }
  STD_TORCH_CHECK(out == out_rows, "out_rows must be ", out, ", but is ", out_rows, ".");
}

std::tuple<Tensor, Tensor> ragged_conv1d(
    Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor starts, Tensor lengths,
    Tensor out_starts, Tensor, int64_t out_rows, int64_t, int64_t stride, int64_t padding,
    int64_t activation, bool keep) {
  const Conv conv{weight.size(1), stride, padding};
  check_segments(x, starts, lengths, out_starts, out_rows, conv);
  const Tensor rows = with_contiguous_rows(x);
  return dispatch_conv(x.scalar_type(), [&](auto t, auto g) {
    return forward<decltype(t), decltype(g)>(
        rows, torch::stable::contiguous(weight), bias, starts, lengths, out_starts, out_rows, conv,
        Activation(activation), keep);
  });
}

std::tuple<Tensor, Tensor, Tensor> ragged_conv1d_backward(
    Tensor grad, Tensor x, Tensor weight, Tensor kept, Tensor starts, Tensor lengths,
    Tensor out_starts, Tensor group_starts, int64_t groups, int64_t stride, int64_t padding,
    int64_t activation, bool need_x, bool need_weight, bool need_bias) {
  const Conv conv{weight.size(1), stride, padding};
  check_segments(x, starts, lengths, out_starts, grad.size(0), conv);
  const Tensor rows = with_contiguous_rows(x);
  return dispatch_conv(x.scalar_type(), [&](auto t, auto g) {
    return backward<decltype(t), decltype(g)>(
        grad, rows, torch::stable::contiguous(weight), kept, starts, lengths, out_starts,
        group_starts, groups, conv, Activation(activation), need_x, need_weight, need_bias);
  });
}

}  // namespace
}  // namespace hearken

STABLE_TORCH_LIBRARY_IMPL(hearken, CPU, m) {
  m.impl("ragged_conv1d", TORCH_BOX(&hearken::ragged_conv1d));
  m.impl("ragged_conv1d_backward", TORCH_BOX(&hearken::ragged_conv1d_backward));
}
