// ragged_conv1d on the CPU: windows are gathered, block by block, into a panel whose every row is
// what one row of the result meets, and one GEMM over all taps does the rest, so that low precision
// is rounded once. Gathering K * C values costs little beside the K * C * D products made of them.

#include "../common/activation.h"
#include "../common/ragged.h"
#include "support.h"

namespace hearken {
namespace {

// A panel has rows enough to keep the GEMM at its full rate, and where its rows are short, as many
// as stay in the second-level cache.
constexpr int64_t kPanelRows = 1024;
constexpr int64_t kPanelBytes = 2 << 20;
// The gradient of the weight wants all rows at once; beyond this, it takes fewer taps at a time.
constexpr int64_t kTapPanelBytes = 64 << 20;

// Copies the window's rows as the GEMM's type; zeros stand for those that do not exist.
template <class T, class G>
void copy_window(const T* data, int64_t channels, const Window& window, int64_t count, G* to) {
  std::fill(to, to + window.begin * channels, G(0.0f));
  convert(
      data + (window.row + window.begin) * channels, to + window.begin * channels,
      (window.end - window.begin) * channels);
  std::fill(to + window.end * channels, to + count * channels, G(0.0f));
}

// Fills a panel of `rows` windows of `count` rows each; `window_of(i)` names the i-th.
template <class T, class G, class F>
void gather(
    const T* data, int64_t channels, int64_t rows, int64_t count, G* panel, const F& window_of) {
  const int64_t width = count * channels;
  parallel_for(0, rows, 65536 / (width + 1) + 1, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      copy_window(data, channels, window_of(row), count, panel + row * width);
    }
  });
}

int64_t rows_per_panel(int64_t width, int64_t item_bytes, int64_t rows) {
  return std::min(rows, std::max(kPanelRows, kPanelBytes / (width * item_bytes + 1)));
}

template <class T>
void activate(const T* __restrict sums, T* __restrict y, int64_t channels, Activation activation) {
  using A = Sum<T>;
  if (activation == Activation::gelu) {
    for (int64_t i = 0; i < channels; ++i) y[i] = rounded<T>(gelu(A(sums[i])));
  } else {
    const int64_t half = channels / 2;
    for (int64_t i = 0; i < half; ++i) y[i] = rounded<T>(A(sums[i]) * sigmoid(A(sums[half + i])));
  }
}

// The gradient of one row's sums, as the GEMM's type.
template <class T, class G>
void activate_backward(
    const T* __restrict grad, const T* __restrict sums, G* __restrict out, int64_t channels,
    Activation activation) {
  using A = Sum<T>;
  if (activation == Activation::none) {
    convert(grad, out, channels);
  } else if (activation == Activation::gelu) {
    for (int64_t i = 0; i < channels; ++i) out[i] = rounded<G>(A(grad[i]) * gelu_slope(A(sums[i])));
  } else {
    const int64_t half = channels / 2;
    for (int64_t i = 0; i < half; ++i) {
      const A gate = sigmoid(A(sums[half + i]));
      const A by_gate = A(grad[i]) * gate;
      out[i] = rounded<G>(by_gate);
      out[half + i] = rounded<G>(by_gate * (A(1) - gate) * A(sums[i]));
    }
  }
}

// T is the type of the tensors, G that of the GEMM.
template <class T, class G>
std::tuple<Tensor, Tensor> forward(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
    const Segments& segments, int64_t out_rows, const Conv& conv, Activation activation,
    bool keep) {
  const int64_t channels = x.size(1);
  const int64_t out_channels = weight.size(0);
  const int64_t width = conv.kernel * channels;
  const int64_t y_channels = activation == Activation::glu ? out_channels / 2 : out_channels;
  const int64_t block = rows_per_panel(width, sizeof(G), out_rows);

  Tensor y = allocate(x, {out_rows, y_channels});
  Tensor kept = allocate(x, {keep ? out_rows : 0, out_channels});
  Tensor panel = allocate(x, {block, width}, dtype_of<G>());
  Tensor sums = allocate(x, {block, out_channels}, dtype_of<G>());
  const Tensor weight_g = torch::stable::to(weight, dtype_of<G>());
  const Matrix weight_matrix{read<G>(weight_g), dtype_of<G>(), out_channels, width, width};
  const Tensor bias_g = torch::stable::to(bias.value_or(kept), dtype_of<G>());

  for (int64_t begin = 0; begin < out_rows; begin += block) {
    const int64_t rows = std::min(block, out_rows - begin);
    gather(read<T>(x), channels, rows, conv.kernel, write<G>(panel), [&](int64_t row) {
      return conv.inputs(segments, begin + row);
    });
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
    if (std::is_same_v<T, G> && activation == Activation::none) continue;
    parallel_for(0, rows, 16, [&](int64_t first, int64_t last) {
      // Rounded to T before the activation, as the backward will see them.
      std::vector<T> as_kept(out_channels);
      for (int64_t row = first; row < last; ++row) {
        const G* from = sum_rows + row * out_channels;
        T* to = y_rows + row * y_channels;
        if constexpr (std::is_same_v<T, G>) {
          activate(from, to, out_channels, activation);
        } else {
          convert(from, as_kept.data(), out_channels);
          if (keep) convert(as_kept.data(), kept_rows + row * out_channels, out_channels);
          if (activation == Activation::none) {
            convert(as_kept.data(), to, out_channels);
          } else {
            activate(as_kept.data(), to, out_channels, activation);
          }
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

// The taps of one phase in the order in which a window meets them: [taps, D, C] of [D, K, C].
template <class G>
Tensor taps_of_phase(const Tensor& weight, const Conv& conv, int64_t phase) {
  const int64_t out_channels = weight.size(0);
  const int64_t channels = weight.size(2);
  Tensor taps = allocate(weight, {conv.taps(phase), out_channels, channels});
  parallel_for(0, taps.size(0) * out_channels, 64, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t tap = conv.tap_of(phase, i / out_channels);
      const int64_t from = ((i % out_channels) * conv.kernel + tap) * channels;
      convert(read<G>(weight) + from, write<G>(taps) + i * channels, channels);
    }
  });
  return taps;
}

// Input rows of one phase meet the same taps, so each phase is a GEMM of its own, over windows of
// the gradient's rows.
template <class T, class G>
Tensor backward_x(
    const Tensor& x, const Tensor& weight, const G* grad, const Segments& segments, int64_t groups,
    const Conv& conv) {
  const int64_t channels = x.size(1);
  const int64_t out_channels = weight.size(0);
  const Tensor weight_g = torch::stable::to(weight, dtype_of<G>());
  Tensor grad_x = torch::stable::new_zeros(x, {x.size(0), channels});
  for (int64_t phase = 0; phase < conv.stride; ++phase) {
    const int64_t taps = conv.taps(phase);
    const int64_t width = taps * out_channels;
    if (taps == 0) continue;
    const Tensor phase_weight = taps_of_phase<G>(weight_g, conv, phase);
    const int64_t block = rows_per_panel(width, sizeof(G), groups);
    Tensor panel = allocate(weight_g, {block, width});
    Tensor product = allocate(weight_g, {block, channels});
    for (int64_t begin = 0; begin < groups; begin += block) {
      const int64_t rows = std::min(block, groups - begin);
      gather(grad, out_channels, rows, taps, write<G>(panel), [&](int64_t row) {
        return conv.outputs(segments, phase, begin + row);
      });
      multiply(
          {write<G>(panel), dtype_of<G>(), rows, width, width},
          {read<G>(phase_weight), dtype_of<G>(), width, channels, channels},
          {write<G>(product), dtype_of<G>(), rows, channels, channels});
      parallel_for(0, rows, 64, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
          const int64_t target = conv.outputs(segments, phase, begin + row).target;
          if (target < 0) continue;
          convert(
              read<G>(product) + row * channels, write<T>(grad_x) + target * channels, channels);
        }
      });
    }
  }
  return grad_x;
}

template <class T, class G>
Tensor backward_weight(
    const Tensor& x, const Tensor& weight, const G* grad, const Segments& segments,
    int64_t out_rows, const Conv& conv) {
  const int64_t channels = x.size(1);
  const int64_t out_channels = weight.size(0);
  const int64_t width = conv.kernel * channels;
  if (out_rows == 0) return torch::stable::new_zeros(weight, {out_channels, conv.kernel, channels});
  Tensor grad_weight = allocate(weight, {out_channels, conv.kernel, channels}, dtype_of<G>());
  const int64_t tap_bytes = out_rows * channels * sizeof(G) + 1;
  const int64_t taps = std::clamp<int64_t>(kTapPanelBytes / tap_bytes, 1, conv.kernel);
  Tensor panel = allocate(weight, {out_rows, taps * channels}, dtype_of<G>());
  const Matrix grad_matrix{grad, dtype_of<G>(), out_rows, out_channels, out_channels};
  for (int64_t tap = 0; tap < conv.kernel; tap += taps) {
    const int64_t count = std::min(taps, conv.kernel - tap);
    gather(read<T>(x), channels, out_rows, count, write<G>(panel), [&](int64_t row) {
      // The part [tap, tap + count) of the row's window.
      const Window whole = conv.inputs(segments, row);
      const int64_t begin = clamp_to(whole.begin - tap, 0, count);
      const int64_t end = clamp_to(whole.end - tap, begin, count);
      return Window{whole.row + tap, row, int32_t(begin), int32_t(end)};
    });
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
    const Segments& segments, int64_t groups, const Conv& conv, Activation activation, bool need_x,
    bool need_weight, bool need_bias) {
  const int64_t out_channels = weight.size(0);
  const int64_t out_rows = grad_y.size(0);

  // The gradient of the sums: where no activation stands between, it is the one that came in.
  Tensor grad_sums = grad_y;
  if (!std::is_same_v<T, G> || activation != Activation::none) {
    grad_sums = allocate(x, {out_rows, out_channels}, dtype_of<G>());
    parallel_for(0, out_rows, 16, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        activate_backward(
            read<T>(grad_y) + row * grad_y.size(1),
            activation == Activation::none ? nullptr : read<T>(kept) + row * out_channels,
            write<G>(grad_sums) + row * out_channels, out_channels, activation);
      }
    });
  }
  const G* grad = read<G>(grad_sums);

  Tensor grad_x = allocate(x, {0});
  Tensor grad_weight = allocate(x, {0});
  Tensor grad_bias = allocate(x, {0});
  if (need_x) grad_x = backward_x<T, G>(x, weight, grad, segments, groups, conv);
  if (need_weight) grad_weight = backward_weight<T, G>(x, weight, grad, segments, out_rows, conv);
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

// On the CPU, reading the segments is free, so what would reach outside x is refused.
Segments check_segments(
    const Tensor& x, const Tensor& starts, const Tensor& lengths, const Tensor& out_starts,
    const Tensor& group_starts, int64_t out_rows, int64_t groups, const Conv& conv) {
  const int64_t count = starts.dim() == 1 ? starts.size(0) : -1;
  check_plan(x, starts, count, "starts");
  check_plan(x, lengths, count, "lengths");
  check_plan(x, out_starts, count, "out_starts");
  check_plan(x, group_starts, count, "group_starts");
  const Segments segments{
      read<int64_t>(starts), read<int64_t>(lengths), read<int64_t>(out_starts),
      read<int64_t>(group_starts), count};
  int64_t out = 0;
  int64_t group = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = segments.starts[i];
    const int64_t length = segments.lengths[i];
    STD_TORCH_CHECK(
        start >= 0 && length >= 0 && start + length <= x.size(0), "segments must lie in the ",
        x.size(0), " rows of x, but segment ", i, " is rows ", start, " to ", start + length, ".");
    STD_TORCH_CHECK(
        segments.out_starts[i] == out && segments.group_starts[i] == group, "out_starts[", i,
        "] and group_starts[", i, "] must be ", out, " and ", group, ".");
    out += conv.output_length(length);
    group += conv.groups(length);
  }
  STD_TORCH_CHECK(out == out_rows, "out_rows must be ", out, ", but is ", out_rows, ".");
  STD_TORCH_CHECK(group == groups, "groups must be ", group, ", but is ", groups, ".");
  return segments;
}

std::tuple<Tensor, Tensor> ragged_conv1d(
    Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor starts, Tensor lengths,
    Tensor out_starts, Tensor group_starts, int64_t out_rows, int64_t groups, int64_t stride,
    int64_t padding, int64_t activation, bool keep) {
  check_conv(x, weight, bias, stride, padding, activation);
  const Conv conv{weight.size(1), stride, padding};
  const Segments segments =
      check_segments(x, starts, lengths, out_starts, group_starts, out_rows, groups, conv);
  return dispatch_conv(x.scalar_type(), [&](auto t, auto g) {
    return forward<decltype(t), decltype(g)>(
        torch::stable::contiguous(x), torch::stable::contiguous(weight), bias, segments, out_rows,
        conv, Activation(activation), keep && Activation(activation) != Activation::none);
  });
}

std::tuple<Tensor, Tensor, Tensor> ragged_conv1d_backward(
    Tensor grad, Tensor x, Tensor weight, Tensor sums, Tensor starts, Tensor lengths,
    Tensor out_starts, Tensor group_starts, int64_t groups, int64_t stride, int64_t padding,
    int64_t activation, bool need_x, bool need_weight, bool need_bias) {
  check_conv(x, weight, std::nullopt, stride, padding, activation);
  check_conv_backward(grad, x, weight, sums, activation);
  const Conv conv{weight.size(1), stride, padding};
  const Segments segments =
      check_segments(x, starts, lengths, out_starts, group_starts, grad.size(0), groups, conv);
  return dispatch_conv(x.scalar_type(), [&](auto t, auto g) {
    return backward<decltype(t), decltype(g)>(
        torch::stable::contiguous(grad), torch::stable::contiguous(x),
        torch::stable::contiguous(weight), sums, segments, groups, conv, Activation(activation),
        need_x, need_weight, need_bias);
  });
}

}  // namespace
}  // namespace hearken

STABLE_TORCH_LIBRARY_IMPL(hearken, CPU, m) {
  m.impl("ragged_conv1d", TORCH_BOX(&hearken::ragged_conv1d));
  m.impl("ragged_conv1d_backward", TORCH_BOX(&hearken::ragged_conv1d_backward));
}
