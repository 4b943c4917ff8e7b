// What both kinds of kernels ask of the arguments of an op, before they touch any memory.
// train/ops/ says the same to users; this holds for whoever calls the ops directly.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>

#include "activation.h"

namespace hearken {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls f with a value of the C++ type of `dtype`.
template <class F>
auto dispatch(ScalarType dtype, const char* argument, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    case ScalarType::Double:
      return f(double{});
    default:
      STD_TORCH_CHECK(false, argument, " must be float32, bfloat16, float16 or float64.");
      return f(float{});
  }
}

inline void check_same(const Tensor& x, const Tensor& other, const char* argument) {
  STD_TORCH_CHECK(
      other.scalar_type() == x.scalar_type() && other.is_cuda() == x.is_cuda() &&
          other.get_device_index() == x.get_device_index(),
      argument, " must be of the dtype and on the device of x.");
}

// A list of one number per segment.
inline void check_plan(
    const Tensor& data, const Tensor& plan, int64_t count, const char* argument) {
  STD_TORCH_CHECK(
      plan.dim() == 1 && plan.size(0) == count && plan.scalar_type() == ScalarType::Long &&
          plan.is_contiguous() && plan.is_cuda() == data.is_cuda() &&
          plan.get_device_index() == data.get_device_index(),
      argument, " must be a contiguous int64 tensor of ", count, " numbers on the data's device.");
}

inline void check_conv(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride,
    int64_t padding, int64_t activation) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be [rows, channels], but has ", x.dim(), " dimensions.");
  STD_TORCH_CHECK(
      weight.dim() == 3 && weight.size(1) > 0 && weight.size(2) == x.size(1),
      "weight must be [channels out, kernel, ", x.size(1), "].");
  STD_TORCH_CHECK(
      weight.size(1) * weight.size(2) <= std::numeric_limits<int32_t>::max() &&
          weight.size(1) * weight.size(0) <= std::numeric_limits<int32_t>::max(),
      "weight must have fewer than 2^31 taps times channels.");
  check_same(x, weight, "weight");
  if (bias.has_value()) {
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == weight.size(0), "bias must be [", weight.size(0),
        "].");
    check_same(x, *bias, "bias");
  }
  STD_TORCH_CHECK(stride >= 1, "stride must be at least 1, but is ", stride, ".");
  STD_TORCH_CHECK(padding >= 0, "padding must not be negative, but is ", padding, ".");
  STD_TORCH_CHECK(
      activation >= 0 && activation <= int64_t(Activation::glu), "activation must be 0, 1 or 2.");
  STD_TORCH_CHECK(
      Activation(activation) != Activation::glu || weight.size(0) % 2 == 0,
      "weight must have an even number of channels out for glu, but has ", weight.size(0), ".");
}

inline void check_conv_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& sums,
    int64_t activation) {
  const int64_t channels = weight.size(0);
  const bool halved = Activation(activation) == Activation::glu;
  STD_TORCH_CHECK(
      grad.dim() == 2 && grad.size(1) == (halved ? channels / 2 : channels), "grad must be [rows, ",
      halved ? channels / 2 : channels, "].");
  check_same(x, grad, "grad");
  check_same(x, sums, "sums");
  STD_TORCH_CHECK(
      Activation(activation) == Activation::none ||
          (sums.dim() == 2 && sums.size(0) == grad.size(0) && sums.size(1) == channels &&
           sums.is_contiguous()),
      "sums must be [", grad.size(0), ", ", channels,
      "]: run the forward with keep_sums for a gradient through an activation.");
}

inline void check_packing(
    const Tensor& table, const Tensor& speech, const Tensor& source, const Tensor& ln_weight,
    const Tensor& ln_bias) {
  STD_TORCH_CHECK(table.dim() == 2, "table must be [vocabulary, hidden].");
  const int64_t hidden = table.size(1);
  STD_TORCH_CHECK(
      speech.dim() == 2 && speech.size(1) == hidden, "speech must be [rows, ", hidden, "].");
  check_plan(table, source, source.dim() == 1 ? source.size(0) : -1, "source");
  for (const auto& [tensor, name] :
       {std::pair{&ln_weight, "ln_weight"}, std::pair{&ln_bias, "ln_bias"}}) {
    STD_TORCH_CHECK(
        tensor->dim() == 1 && tensor->size(0) == hidden, name, " must be [", hidden, "].");
  }
  for (const Tensor* tensor : {&speech, &ln_weight, &ln_bias}) {
    STD_TORCH_CHECK(
        tensor->is_cuda() == table.is_cuda() &&
            tensor->get_device_index() == table.get_device_index(),
        "table, speech, ln_weight and ln_bias must be on one device.");
  }
}

}  // namespace hearken
