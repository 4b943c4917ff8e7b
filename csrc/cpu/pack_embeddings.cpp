// pack_embeddings on the CPU: one pass over the positions, a row at a time through a float buffer
// that stays in the first-level cache, so that any mix of dtypes costs no more code.

#include "../common/packing.h"

#include <cmath>
#include <vector>

#include "support.h"

namespace hearken {
namespace {

template <class A>
using Load = void (*)(const void*, int64_t, A*, int64_t);
template <class A>
using Store = void (*)(const A*, void*, int64_t, int64_t);

// Rows of a tensor, read and written as A whatever their dtype.
template <class A>
class Rows {
 public:
  Rows(const Tensor& tensor, const char* argument)
      : data_(const_cast<void*>(tensor.const_data_ptr())),
        pitch_(tensor.stride(0)),
        width_(tensor.size(1)) {
    dispatch(tensor.scalar_type(), argument, [&](auto type) {
      using T = decltype(type);
      item_ = sizeof(T);
      load_ = [](const void* data, int64_t at, A* to, int64_t count) {
        convert(static_cast<const T*>(data) + at, to, count);
      };
      store_ = [](const A* from, void* data, int64_t at, int64_t count) {
        convert(from, static_cast<T*>(data) + at, count);
      };
    });
  }

  void load(int64_t row, A* to) const { load_(data_, row * pitch_, to, width_); }
  void store(int64_t row, const A* from) const { store_(from, data_, row * pitch_, width_); }
  char* bytes(int64_t row) const { return static_cast<char*>(data_) + row * pitch_ * item_; }
  int64_t row_bytes() const { return width_ * item_; }

 private:
  void* data_;
  int64_t pitch_;
  int64_t width_;
  int64_t item_;
  Load<A> load_;
  Store<A> store_;
};

// Sums over a row in 64 lanes, added by halves: a fixed order that vectorises without leave to
// reorder.
template <class A>
class LaneSum {
 public:
  // Calls term(i) for every i < count, in order, and adds what it returns.
  template <class F>
  static A of(int64_t count, const F& term) {
    LaneSum sum;
    for_lanes(count, [&](int64_t i, int64_t lane) { sum.add(lane, term(i)); });
    return sum.total();
  }

  template <class F>
  static void for_lanes(int64_t count, const F& f) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) f(i + lane, lane);
    for (; i < count; ++i) f(i, i % kLanes);
  }

  void add(int64_t lane, A value) { lanes_[lane] += value; }
  A total() {
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
      for (int64_t lane = 0; lane < half; ++lane) lanes_[lane] += lanes_[lane + half];
    return lanes_[0];
  }

 private:
  static constexpr int64_t kLanes = 64;
  A lanes_[kLanes] = {};
};

template <class A>
struct Moments {
  A mean, rstd;
};

template <class A>
Moments<A> moments(const A* row, int64_t count, double eps) {
  const A mean = LaneSum<A>::of(count, [&](int64_t i) { return row[i]; }) / A(count);
  const A variance =
      LaneSum<A>::of(count, [&](int64_t i) { return (row[i] - mean) * (row[i] - mean); }) /
      A(count);
  return {mean, A(1) / std::sqrt(variance + A(eps))};
}

template <class A>
std::vector<A> as_vector(const Tensor& tensor) {
  const Tensor converted = torch::stable::to(torch::stable::contiguous(tensor), dtype_of<A>());
  return {read<A>(converted), read<A>(converted) + converted.numel()};
}

int64_t rows_per_task(int64_t hidden) {
  return std::max<int64_t>(1, 16384 / (hidden + 1));
}

void check_sources(const int64_t* source, int64_t positions, int64_t vocabulary, int64_t rows) {
  for (int64_t t = 0; t < positions; ++t) {
    STD_TORCH_CHECK(
        source[t] < vocabulary && source[t] >= -rows, "source[", t, "] must be in [", -rows, ", ",
        vocabulary, "), but is ", source[t], ".");
  }
}

template <class A>
void layer_norm(
    A* __restrict row, const A* __restrict weight, const A* __restrict bias, int64_t count,
    double eps) {
  const Moments<A> of = moments(row, count, eps);
  for (int64_t i = 0; i < count; ++i) row[i] = (row[i] - of.mean) * of.rstd * weight[i] + bias[i];
}

// Turns a row of the gradient into that of the speech row `normed`, which becomes LayerNorm's
// output before weight and bias; adds to the row's shares of their gradients.
template <class A>
void layer_norm_backward(
    A* __restrict grad, A* __restrict normed, const A* __restrict weight,
    A* __restrict weight_share, A* __restrict bias_share, int64_t count, double eps) {
  const Moments<A> of = moments(normed, count, eps);
  LaneSum<A> sum, sum_normed;
  LaneSum<A>::for_lanes(count, [&](int64_t i, int64_t lane) {
    normed[i] = (normed[i] - of.mean) * of.rstd;
    weight_share[i] += grad[i] * normed[i];
    bias_share[i] += grad[i];
    grad[i] *= weight[i];
    sum.add(lane, grad[i]);
    sum_normed.add(lane, grad[i] * normed[i]);
  });
  const A mean = sum.total() / A(count);
  const A mean_normed = sum_normed.total() / A(count);
  for (int64_t i = 0; i < count; ++i)
    grad[i] = layer_norm_slope(grad[i], normed[i], of.rstd, mean, mean_normed);
}

template <class A>
Tensor forward(
    const Tensor& table, const Tensor& speech, const int64_t* source, int64_t positions,
    const Tensor& ln_weight, const Tensor& ln_bias, double eps, ScalarType dtype) {
  const int64_t hidden = table.size(1);
  Tensor out = allocate(table, {positions, hidden}, dtype);
  const Rows<A> text_rows(table, "table");
  const Rows<A> speech_rows(speech, "speech");
  const Rows<A> out_rows(out, "dtype");
  const std::vector<A> weight = as_vector<A>(ln_weight);
  const std::vector<A> bias = as_vector<A>(ln_bias);
  const bool as_is = table.scalar_type() == dtype;
  parallel_for(0, positions, rows_per_task(hidden), [&](int64_t first, int64_t last) {
    std::vector<A> row(hidden);
    for (int64_t t = first; t < last; ++t) {
      const Source from{source[t]};
      if (from.is_text() && as_is) {
        std::memcpy(out_rows.bytes(t), text_rows.bytes(from.text_row()), out_rows.row_bytes());
        continue;
      }
      if (from.is_text()) {
        text_rows.load(from.text_row(), row.data());
      } else {
        speech_rows.load(from.speech_row(), row.data());
        layer_norm(row.data(), weight.data(), bias.data(), hidden, eps);
      }
      out_rows.store(t, row.data());
    }
  });
  return out;
}

struct SpeechGrads {
  Tensor speech, ln_weight, ln_bias;
};

// Each block of speech rows sums its own share of LayerNorm's gradients; the shares are added in
// order, so that the number of threads does not show.
template <class A>
SpeechGrads backward_speech(
    const Tensor& grad, const Tensor& speech, const int64_t* source, const Tensor& ln_weight,
    const Tensor& ln_bias, double eps, bool need_speech) {
  const int64_t count = speech.size(0);
  const int64_t hidden = speech.size(1);
  std::vector<int64_t> position_of(count, -1);
  for (int64_t t = 0; t < grad.size(0); ++t) {
    const Source from{source[t]};
    if (from.is_text()) continue;
    int64_t& position = position_of[from.speech_row()];
    STD_TORCH_CHECK(
        position == -1, "source must name each speech row once at most, but row ",
        from.speech_row(), " stands at positions ", position, " and ", t, ".");
    position = t;
  }

  Tensor grad_speech = allocate(speech, {need_speech ? count : 0, hidden});
  const Rows<A> grad_rows(grad, "grad");
  const Rows<A> speech_rows(speech, "speech");
  const Rows<A> grad_speech_rows(grad_speech, "speech");
  const std::vector<A> weight = as_vector<A>(ln_weight);
  const int64_t per_block = std::max<int64_t>(16, (count + 63) / 64);
  const int64_t blocks = (count + per_block - 1) / per_block;
  std::vector<A> shares(blocks * 2 * hidden, A(0));
  parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    std::vector<A> normed(hidden), back(hidden);
    for (int64_t block = first; block < last; ++block) {
      A* weight_share = shares.data() + block * 2 * hidden;
      A* bias_share = weight_share + hidden;
      for (int64_t r = block * per_block; r < std::min(count, (block + 1) * per_block); ++r) {
        if (position_of[r] < 0) {
          if (!need_speech) continue;
          std::fill(back.begin(), back.end(), A(0));
          grad_speech_rows.store(r, back.data());
          continue;
        }
        speech_rows.load(r, normed.data());
        grad_rows.load(position_of[r], back.data());
        layer_norm_backward(
            back.data(), normed.data(), weight.data(), weight_share, bias_share, hidden, eps);
        if (!need_speech) continue;
        grad_speech_rows.store(r, back.data());
      }
    }
  });

  std::vector<A> totals(2 * hidden, A(0));
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < 2 * hidden; ++i) totals[i] += shares[block * 2 * hidden + i];
  Tensor grad_weight = allocate(ln_weight, {1, hidden});
  Tensor grad_bias = allocate(ln_bias, {1, hidden});
  Rows<A>(grad_weight, "ln_weight").store(0, totals.data());
  Rows<A>(grad_bias, "ln_bias").store(0, totals.data() + hidden);
  return {
      grad_speech, torch::stable::view(grad_weight, {hidden}),
      torch::stable::view(grad_bias, {hidden})};
}

// Positions sorted by their row of the table, in order of position within one: every run of equal
// rows is one sum, made by one thread in a fixed order.
template <class A>
Tensor backward_table(const Tensor& grad, const Tensor& table, const int64_t* source) {
  const int64_t hidden = table.size(1);
  std::vector<int64_t> order;
  for (int64_t t = 0; t < grad.size(0); ++t)
    if (Source{source[t]}.is_text()) order.push_back(t);
  std::stable_sort(
      order.begin(), order.end(), [&](int64_t a, int64_t b) { return source[a] < source[b]; });
  std::vector<size_t> runs;
  for (size_t i = 0; i < order.size(); ++i)
    if (i == 0 || source[order[i]] != source[order[i - 1]]) runs.push_back(i);
  runs.push_back(order.size());

  Tensor grad_table = torch::stable::new_zeros(table, {table.size(0), hidden});
  const Rows<A> grad_rows(grad, "grad");
  const Rows<A> table_rows(grad_table, "table");
  parallel_for(
      0, int64_t(runs.size()) - 1, rows_per_task(hidden), [&](int64_t first, int64_t last) {
        std::vector<A> row(hidden), sum(hidden);
        for (int64_t run = first; run < last; ++run) {
          std::fill(sum.begin(), sum.end(), A(0));
          for (size_t i = runs[run]; i < runs[run + 1]; ++i) {
            grad_rows.load(order[i], row.data());
            for (int64_t j = 0; j < hidden; ++j) sum[j] += row[j];
          }
          table_rows.store(source[order[runs[run]]], sum.data());
        }
      });
  return grad_table;
}

template <class F>
auto dispatch_sum(const Tensor& table, const Tensor& speech, F&& f) {
  const bool is_double =
      table.scalar_type() == ScalarType::Double || speech.scalar_type() == ScalarType::Double;
  return is_double ? f(double{}) : f(float{});
}

Tensor pack_embeddings(
    Tensor table, Tensor speech, Tensor source, Tensor ln_weight, Tensor ln_bias, double eps,
    ScalarType dtype) {
  const Tensor plan = torch::stable::contiguous(source);
  check_packing(table, speech, plan, ln_weight, ln_bias);
  check_sources(read<int64_t>(plan), plan.size(0), table.size(0), speech.size(0));
  return dispatch_sum(table, speech, [&](auto sum) {
    return forward<decltype(sum)>(
        with_contiguous_rows(table), with_contiguous_rows(speech), read<int64_t>(plan),
        plan.size(0), ln_weight, ln_bias, eps, dtype);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pack_embeddings_backward(
    Tensor grad, Tensor table, Tensor speech, Tensor source, Tensor ln_weight, Tensor ln_bias,
    double eps, bool need_table, bool need_speech, bool need_ln) {
  const Tensor plan = torch::stable::contiguous(source);
  check_packing(table, speech, plan, ln_weight, ln_bias);
  check_sources(read<int64_t>(plan), plan.size(0), table.size(0), speech.size(0));
  const Tensor grad_rows = with_contiguous_rows(grad);
  return dispatch_sum(table, speech, [&](auto sum) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using A = decltype(sum);
    Tensor grad_table = allocate(table, {0});
    SpeechGrads grads{allocate(speech, {0}), allocate(ln_weight, {0}), allocate(ln_bias, {0})};
    if (need_table) grad_table = backward_table<A>(grad_rows, table, read<int64_t>(plan));
    if (need_speech || need_ln) {
      grads = backward_speech<A>(
          grad_rows, with_contiguous_rows(speech), read<int64_t>(plan), ln_weight, ln_bias, eps,
          need_speech);
    }
    if (!need_speech) grads.speech = allocate(speech, {0});
    if (!need_ln) grads.ln_weight = grads.ln_bias = allocate(ln_weight, {0});
    return {grad_table, grads.speech, grads.ln_weight, grads.ln_bias};
  });
}

}  // namespace
}  // namespace hearken

STABLE_TORCH_LIBRARY_IMPL(hearken, CPU, m) {
  m.impl("pack_embeddings", TORCH_BOX(&hearken::pack_embeddings));
  m.impl("pack_embeddings_backward", TORCH_BOX(&hearken::pack_embeddings_backward));
}
