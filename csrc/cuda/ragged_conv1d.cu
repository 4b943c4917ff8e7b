// ragged_conv1d on CUDA: the entry points. Nothing here waits for the device.

#include "ragged_conv1d_kernels.cuh"
#include "support.cuh"

namespace hearken {
namespace {

template <class Problem>
void run(
    const OnDevice& device, const Problem& problem, int64_t rows, int64_t columns, int64_t shares,
    bool aligned) {
  const dim3 grid(
      blocks_for(int64_t(blocks_for(rows, kTile)) * blocks_for(columns, kTile), 1), 1, shares);
  constexpr int kShared = kSharedBytes<typename Problem::T>;
  if (aligned) {
    device.launch(implicit_gemm<Problem, true>, grid, kThreads, kShared, problem);
  } else {
    device.launch(implicit_gemm<Problem, false>, grid, kThreads, kShared, problem);
  }
}

Segments segments_of(
    const Tensor& x, const Tensor& starts, const Tensor& lengths, const Tensor& out_starts,
    const Tensor& group_starts) {
  const int64_t count = starts.dim() == 1 ? starts.size(0) : -1;
  check_plan(x, starts, count, "starts");
  check_plan(x, lengths, count, "lengths");
  check_plan(x, out_starts, count, "out_starts");
  check_plan(x, group_starts, count, "group_starts");
  return {
      read<int64_t>(starts), read<int64_t>(lengths), read<int64_t>(out_starts),
      read<int64_t>(group_starts), count};
}

// Windows [shares, rows] in a tensor of bytes.
template <bool kBackward>
Tensor windows_of(
    const OnDevice& device, const Tensor& like, const Segments& segments, const Conv& conv,
    int64_t rows, int64_t shares) {
  Tensor windows =
      torch::stable::new_empty(like, {shares * rows * int64_t(sizeof(Window))}, ScalarType::Byte);
  device.launch(
      find_windows<kBackward>, dim3(blocks_for(rows, 256), 1, shares), 256, 0, segments, conv, rows,
      write<Window>(windows));
  return windows;
}

template <class T>
bool whole_chunks(int64_t channels) {
  return channels * sizeof(T) % 16 == 0;
}

template <class T>
std::tuple<Tensor, Tensor> forward(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
    const Segments& segments, int64_t out_rows, const Conv& conv, Activation activation,
    bool keep) {
  const OnDevice device(x);
  const int64_t channels = x.size(1), out_channels = weight.size(0);
  const int64_t y_channels = activation == Activation::glu ? out_channels / 2 : out_channels;
  Tensor y = torch::stable::new_empty(x, {out_rows, y_channels});
  Tensor sums = torch::stable::new_empty(x, {keep ? out_rows : 0, out_channels});
  const Tensor windows = windows_of<false>(device, x, segments, conv, out_rows, 1);
  const ForwardProblem<T> problem{
      read<T>(x),
      read<T>(weight),
      bias.has_value() ? read<T>(*bias) : nullptr,
      read<Window>(windows),
      write<T>(y),
      keep ? write<T>(sums) : nullptr,
      out_rows,
      int(channels),
      int(out_channels),
      int(conv.kernel),
      activation};
  const int64_t columns =
      activation == Activation::glu ? (y_channels + 15) / 16 * 32 : out_channels;
  run(device, problem, out_rows, columns, 1,
      whole_chunks<T>(channels) && is_aligned(x) && is_aligned(weight));
  return {y, sums};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& sums,
    const Segments& segments, int64_t groups, const Conv& conv, Activation activation, bool need_x,
    bool need_weight, bool need_bias) {
  const OnDevice device(x);
  const int64_t channels = x.size(1), out_channels = weight.size(0), out_rows = grad_y.size(0);
  Tensor grad_x = torch::stable::new_empty(x, {0});
  Tensor grad_weight = torch::stable::new_empty(x, {0});
  Tensor grad_bias = torch::stable::new_empty(x, {0});

  // The gradient of the sums, and on the way that of the bias.
  const bool activated = activation != Activation::none;
  const int64_t share_count = (out_rows + kRowsPerShare - 1) / kRowsPerShare;
  Tensor grad = grad_y;
  if (activated) grad = torch::stable::new_empty(x, {out_rows, out_channels});
  Tensor shares =
      torch::stable::new_empty(x, {need_bias ? share_count : 0, out_channels}, dtype_of<Sum<T>>());
  if (activated || need_bias) {
    device.launch(
        activation_backward<T>,
        dim3(blocks_for(out_rows, kRowsPerShare), blocks_for(out_channels, 128)), 128, 0,
        read<T>(grad_y), activated ? read<T>(sums) : nullptr, out_rows, int(out_channels),
        activation, activated ? write<T>(grad) : nullptr,
        need_bias ? write<Sum<T>>(shares) : nullptr);
  }
  if (need_bias) {
    grad_bias = torch::stable::new_empty(x, {out_channels});
    device.launch(
        add_shares<T>, dim3(blocks_for(out_channels, 128)), 128, 0, read<Sum<T>>(shares),
        share_count, int(out_channels), write<T>(grad_bias));
  }

  const bool aligned = whole_chunks<T>(channels) && whole_chunks<T>(out_channels) &&
                       is_aligned(x) && is_aligned(weight) && is_aligned(grad);
  if (need_x) {
    grad_x = torch::stable::new_zeros(x, {x.size(0), channels});
    const Tensor windows = windows_of<true>(device, x, segments, conv, groups, conv.stride);
    const InputGradProblem<T> problem{
        read<T>(grad), read<T>(weight), read<Window>(windows), write<T>(grad_x),
        groups,        int(channels),   int(out_channels),     conv};
    run(device, problem, groups, channels, conv.stride, aligned);
  }
  if (need_weight) {
    grad_weight = torch::stable::new_empty(weight, {out_channels, conv.kernel, channels});
    const Tensor windows = windows_of<false>(device, x, segments, conv, out_rows, 1);
    const WeightGradProblem<T> problem{
        read<T>(grad), read<T>(x),    read<Window>(windows), write<T>(grad_weight),
        out_rows,      int(channels), int(out_channels),     int(conv.kernel)};
    run(device, problem, out_channels, conv.kernel * channels, 1, aligned);
  }
  return {grad_x, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor> ragged_conv1d(
    Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor starts, Tensor lengths,
    Tensor out_starts, Tensor group_starts, int64_t out_rows, int64_t, int64_t stride,
    int64_t padding, int64_t activation, bool keep) {
  check_conv(x, weight, bias, stride, padding, activation);
  const Segments segments = segments_of(x, starts, lengths, out_starts, group_starts);
  const Conv conv{weight.size(1), stride, padding};
  if (bias.has_value()) bias = torch::stable::contiguous(*bias);
  return dispatch(x.scalar_type(), "x", [&](auto type) {
    return forward<decltype(type)>(
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
  const Segments segments = segments_of(x, starts, lengths, out_starts, group_starts);
  const Conv conv{weight.size(1), stride, padding};
  return dispatch(x.scalar_type(), "x", [&](auto type) {
    return backward<decltype(type)>(
        torch::stable::contiguous(grad), torch::stable::contiguous(x),
        torch::stable::contiguous(weight), sums, segments, groups, conv, Activation(activation),
        need_x, need_weight, need_bias);
  });
}

}  // namespace
}  // namespace hearken

STABLE_TORCH_LIBRARY_IMPL(hearken, CUDA, m) {
  m.impl("ragged_conv1d", TORCH_BOX(&hearken::ragged_conv1d));
  m.impl("ragged_conv1d_backward", TORCH_BOX(&hearken::ragged_conv1d_backward));
}
