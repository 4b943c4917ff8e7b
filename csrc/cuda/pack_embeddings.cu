// pack_embeddings on CUDA: the entry points. Nothing here waits for the device.

#include "pack_embeddings_kernels.cuh"
#include "support.cuh"

namespace hearken {
namespace {

// Blocks that share the speech rows of the backward: a few for each multiprocessor, and a fixed
// number, as the order of the sums depends on it.
constexpr int64_t kShares = 512;

AnyRows rows_of(const Tensor& tensor, const char* argument) {
  return dispatch(tensor.scalar_type(), argument, [&](auto type) {
    using T = decltype(type);
    constexpr Kind kind = std::is_same_v<T, float>      ? Kind::f32
                          : std::is_same_v<T, BFloat16> ? Kind::bf16
                          : std::is_same_v<T, Half>     ? Kind::f16
                                                        : Kind::f64;
    const int64_t width = tensor.size(1);
    return AnyRows{
        const_cast<void*>(tensor.const_data_ptr()), kind, tensor.stride(0), int(width),
        width % kVector == 0 && tensor.stride(0) % kVector == 0 && is_aligned(tensor)};
  });
}

Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

template <class A>
Tensor as_sums(const Tensor& tensor) {
  return torch::stable::to(torch::stable::contiguous(tensor), dtype_of<A>());
}

int threads_for(int64_t hidden) {
  const int64_t wanted = (hidden + kVector * 32 - 1) / (kVector * 32) * 32;
  return int(wanted < 32 ? 32 : (wanted > 32 * kMaxWarps ? 32 * kMaxWarps : wanted));
}

template <class F>
auto dispatch_sum(const Tensor& table, const Tensor& speech, F&& f) {
  const bool is_double =
      table.scalar_type() == ScalarType::Double || speech.scalar_type() == ScalarType::Double;
  return is_double ? f(double{}) : f(float{});
}

// A shared-memory row per `rows`; what a GPU offers ends at about 16,000 columns of three.
template <class A>
int shared_bytes(int64_t hidden, int rows) {
  const int64_t bytes = (kMaxWarps + hidden * rows) * int64_t(sizeof(A));
  STD_TORCH_CHECK(
      bytes <= 220 * 1024, "table must have at most ", 220 * 1024 / (rows * int(sizeof(A))),
      " columns, but has ", hidden, ".");
  return int(bytes);
}

Tensor pack_embeddings(
    Tensor table, Tensor speech, Tensor source, Tensor ln_weight, Tensor ln_bias, double eps,
    ScalarType dtype) {
  source = torch::stable::contiguous(source);
  check_packing(table, speech, source, ln_weight, ln_bias);
  table = with_contiguous_rows(table);
  speech = with_contiguous_rows(speech);
  const OnDevice device(table);
  const int64_t hidden = table.size(1);
  Tensor out = torch::stable::new_empty(table, {source.size(0), hidden}, dtype);
  if (hidden == 0) return out;
  dispatch_sum(table, speech, [&](auto sum) {
    using A = decltype(sum);
    const Tensor weight = as_sums<A>(ln_weight);
    const Tensor bias = as_sums<A>(ln_bias);
    device.launch(
        pack<A>, dim3(blocks_for(source.size(0), 1)), threads_for(hidden),
        shared_bytes<A>(hidden, 1), rows_of(table, "table"), rows_of(speech, "speech"),
        read<int64_t>(source), read<A>(weight), read<A>(bias), eps, rows_of(out, "dtype"));
  });
  return out;
}

Tensor backward_table(
    const OnDevice& device, const Tensor& grad, const Tensor& table, const Tensor& source,
    bool as_double) {
  const std::pair<Tensor, Tensor> sorted = sort(source);
  Tensor grad_table = torch::stable::new_zeros(table, {table.size(0), table.size(1)});
  const dim3 grid(blocks_for(source.size(0), 1), blocks_for(table.size(1), 32 * kVector));
  const auto run = [&](auto kernel) {
    device.launch(
        kernel, grid, 32, 0, rows_of(grad, "grad"), read<int64_t>(sorted.first),
        read<int64_t>(sorted.second), source.size(0), rows_of(grad_table, "table"));
  };
  as_double ? run(table_backward<double>) : run(table_backward<float>);
  return grad_table;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pack_embeddings_backward(
    Tensor grad, Tensor table, Tensor speech, Tensor source, Tensor ln_weight, Tensor ln_bias,
    double eps, bool need_table, bool need_speech, bool need_ln) {
  source = torch::stable::contiguous(source);
  check_packing(table, speech, source, ln_weight, ln_bias);
  grad = with_contiguous_rows(grad);
  speech = with_contiguous_rows(speech);
  const OnDevice device(table);
  const int64_t hidden = table.size(1), rows = speech.size(0), positions = source.size(0);
  STD_TORCH_CHECK(
      grad.dim() == 2 && grad.size(0) == positions && grad.size(1) == hidden, "grad must be [",
      positions, ", ", hidden, "].");
  return dispatch_sum(table, speech, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using A = decltype(zero);
    Tensor grad_table = torch::stable::new_empty(table, {0});
    if (need_table)
      grad_table = backward_table(device, grad, table, source, std::is_same_v<A, double>);
    Tensor grad_speech = torch::stable::new_empty(speech, {0});
    Tensor grad_weight = torch::stable::new_empty(ln_weight, {0});
    Tensor grad_bias = torch::stable::new_empty(ln_bias, {0});
    if (!need_speech && !need_ln) return {grad_table, grad_speech, grad_weight, grad_bias};

    Tensor position_of = torch::stable::new_empty(speech, {rows}, ScalarType::Long);
    torch::stable::fill_(position_of, -1);
    device.launch(
        find_positions, dim3(blocks_for(positions, 256)), 256, 0, read<int64_t>(source), positions,
        write<int64_t>(position_of));
    AnyRows grad_speech_rows{};
    if (need_speech) {
      grad_speech = torch::stable::new_empty(speech, {rows, hidden});
      grad_speech_rows = rows_of(grad_speech, "speech");
    }
    const int64_t count = rows < kShares ? rows : kShares;
    Tensor shares = torch::stable::new_empty(speech, {count, 2, hidden}, dtype_of<A>());
    const Tensor weight = as_sums<A>(ln_weight);
    if (hidden > 0) {
      device.launch(
          pack_backward<A>, dim3(blocks_for(count, 1)), threads_for(hidden),
          shared_bytes<A>(hidden, 3), rows_of(grad, "grad"), rows_of(speech, "speech"),
          read<int64_t>(position_of), rows, read<A>(weight), eps, grad_speech_rows,
          write<A>(shares));
    }
    if (need_ln) {
      Tensor totals = torch::stable::new_empty(speech, {2, hidden}, dtype_of<A>());
      device.launch(
          add_pack_shares<A>, dim3(blocks_for(2 * hidden, 128)), 128, 0, read<A>(shares), count,
          int(2 * hidden), write<A>(totals));
      grad_weight = torch::stable::to(
          torch::stable::select(totals, 0, 0), ln_weight.scalar_type(), std::nullopt, std::nullopt,
          std::nullopt, false, /*copy=*/true);
      grad_bias = torch::stable::to(
          torch::stable::select(totals, 0, 1), ln_bias.scalar_type(), std::nullopt, std::nullopt,
          std::nullopt, false, /*copy=*/true);
    }
    return {grad_table, grad_speech, grad_weight, grad_bias};
  });
}

}  // namespace
}  // namespace hearken

STABLE_TORCH_LIBRARY_IMPL(hearken, CUDA, m) {
  m.impl("pack_embeddings", TORCH_BOX(&hearken::pack_embeddings));
  m.impl("pack_embeddings_backward", TORCH_BOX(&hearken::pack_embeddings_backward));
}
