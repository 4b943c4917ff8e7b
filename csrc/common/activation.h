// Bias-added sums in, activations and their slopes out; float or double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace hearken {

enum class Activation : int64_t { none = 0, gelu = 1, glu = 2 };

#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float exp_of(float x) {
  return expf(x);
}
__device__ __forceinline__ double exp_of(double x) {
  return exp(x);
}
// Of the standard normal distribution.
__device__ __forceinline__ float cdf_of(float x) {
  return normcdff(x);
}
__device__ __forceinline__ double cdf_of(double x) {
  return normcdf(x);
}
#else
inline double exp_of(double x) {
  return std::exp(x);
}
inline double cdf_of(double x) {
  return 0.5 * std::erfc(-x * M_SQRT1_2);
}

// libm's expf is a call, which keeps a loop from being vectorised; this is 1 ulp or so.
inline float exp_of(float x) {
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float n = std::nearbyintf(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &exponent, sizeof(scale));
  return p * scale;
}

// Abramowitz and Stegun 7.1.26, absolute error below 1e-7.
inline float cdf_of(float x) {
  const float z = std::fabs(x) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.3275911f * z);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float tail = 0.5f * p * t * exp_of(-z * z);
  return x < 0 ? tail : 1.0f - tail;
}
#endif

template <class A>
HEARKEN_HD A gelu(A x) {
  return x * cdf_of(x);
}

template <class A>
HEARKEN_HD A gelu_slope(A x) {
  return cdf_of(x) + x * A(0.3989422804014327) * exp_of(A(-0.5) * x * x);
}

template <class A>
HEARKEN_HD A sigmoid(A x) {
  return A(1) / (A(1) + exp_of(-x));
}

}  // namespace hearken
