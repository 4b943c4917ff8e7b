// Launches on the current stream of a tensor's device, and what they report is looked at.
// The guard has a name because tests/ops/emulator stands in for this file.
#ifndef HEARKEN_CUDA_LAUNCH
#define HEARKEN_CUDA_LAUNCH

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

namespace hearken {

using torch::stable::Tensor;

// Makes the tensor's device the current one for a while; launches go to its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // Launches nothing for an empty grid, which CUDA would refuse.
  template <class... Parameters, class... Arguments>
  void launch(
      void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
      Arguments... arguments) const {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    if (shared_bytes > 48 * 1024) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(
          reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
          shared_bytes));
    }
    kernel<<<grid, threads, shared_bytes, stream_>>>(Parameters(arguments)...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Sorts a vector, equal keys in their order: (keys, where they stood).
inline std::pair<Tensor, Tensor> sort(const Tensor& vector) {
  AtenTensorHandle keys, order;
  int32_t stable = 1;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_sort_stable(vector.get(), &stable, 0, 0, &keys, &order));
  return {Tensor(keys), Tensor(order)};
}

}  // namespace hearken

#endif
