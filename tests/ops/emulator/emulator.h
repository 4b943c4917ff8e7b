// Runs CUDA kernels on the CPU, so that what they compute can be tested where there is no GPU.
//
// Every thread of a block is a fiber; they take turns at barriers and at what a warp does
// together, in an order that is shuffled each time, and now one warp, now another is held back for
// as long as the rest can go on without it, so that a missing barrier shows. Background copies
// really come late: when they are waited for. Shared memory begins as NaN.
//
// Stands in for csrc/cuda/device.cuh and launch.cuh. The instructions do here what the PTX manual
// says of them; how fast they are, and whether a GPU agrees, only a GPU can tell.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#define HEARKEN_CUDA_DEVICE
#define HEARKEN_CUDA_LAUNCH
#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned int x, y, z;
  dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

namespace hearken {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::stable::Tensor;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
alignas(16) inline unsigned char shared[256 * 1024];

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
  std::deque<std::vector<std::function<void()>>> copies;  // closed groups, oldest first
  std::vector<std::function<void()>> open_group;
  static constexpr size_t kStack = 128 * 1024;
};

// Fibers that wait for one another: a block or a warp.
struct Barrier {
  int size = 0, arrived = 0, generation = 0;
};

struct Block {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<std::array<uint64_t, 8>> published;  // per thread, what its warp may read
  std::function<void()> kernel;
  int current = 0;
  int progress = 0;  // barriers passed and fibers ended
};

inline Block* block = nullptr;

inline void wait_at(Barrier& barrier) {
  const int generation = barrier.generation;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++block->progress;
  }
  while (barrier.generation == generation) {
    const int self = block->current;
    swapcontext(&block->fibers[self].context, &block->scheduler);
  }
}

inline void __syncthreads() {
  wait_at(block->all);
}
inline void sync_warp() {
  wait_at(block->warps[threadIdx.x / 32]);
}

inline void fiber_main() {
  block->kernel();
  block->fibers[block->current].done = true;
  ++block->progress;
  swapcontext(&block->fibers[block->current].context, &block->scheduler);
}

inline void run_block(int threads, const std::function<void()>& kernel) {
  Block now;
  block = &now;
  now.kernel = kernel;
  now.fibers.resize(threads);
  now.published.resize(threads);
  now.all.size = threads;
  now.warps.resize(threads / 32);
  for (Barrier& warp : now.warps) warp.size = 32;
  std::memset(shared, 0xff, sizeof(shared));
  for (Fiber& fiber : now.fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStack;
    fiber.context.uc_link = &now.scheduler;
    makecontext(&fiber.context, fiber_main, 0);
  }
  static std::mt19937 draw(0);
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = i;
  int left = threads;
  const auto run_round = [&](int held_back) {
    std::shuffle(order.begin(), order.end(), draw);
    for (int i : order) {
      if (now.fibers[i].done || i / 32 == held_back) continue;
      now.current = i;
      threadIdx = dim3(i, 0, 0);
      swapcontext(&now.scheduler, &now.fibers[i].context);
      left -= now.fibers[i].done;
    }
  };
  while (left > 0) {
    const int held_back = int(draw() % (threads / 32));
    for (int before = -1; before != now.progress;) {
      before = now.progress;
      run_round(held_back);
    }
    run_round(-1);
  }
  block = nullptr;
}

class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}

  template <class... Parameters, class... Arguments>
  void launch(
      void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
      Arguments... arguments) const {
    STD_TORCH_CHECK(threads % 32 == 0 && shared_bytes <= int(sizeof(shared)), "bad launch");
    gridDim = grid;
    blockDim = dim3(threads);
    for (unsigned int z = 0; z < grid.z; ++z)
      for (unsigned int y = 0; y < grid.y; ++y)
        for (unsigned int x = 0; x < grid.x; ++x) {
          blockIdx = dim3(x, y, z);
          run_block(threads, [&] { kernel(Parameters(arguments)...); });
        }
  }
};

inline std::pair<Tensor, Tensor> sort(const Tensor& vector) {
  AtenTensorHandle keys, order;
  int32_t stable = 1;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_sort_stable(vector.get(), &stable, 0, 0, &keys, &order));
  return {Tensor(keys), Tensor(order)};
}

inline float rsqrt(float x) {
  return 1.0f / std::sqrt(x);
}
inline double rsqrt(double x) {
  return 1.0 / std::sqrt(x);
}

inline void copy_16_bytes(void* to, const void* from, bool exists) {
  block->fibers[block->current].open_group.push_back([=] {
    if (exists) {
      std::memcpy(to, from, 16);
    } else {
      std::memset(to, 0, 16);
    }
  });
}

inline void close_copy_group() {
  Fiber& fiber = block->fibers[block->current];
  fiber.copies.push_back(std::move(fiber.open_group));
  fiber.open_group.clear();
}

template <int kPending>
void wait_for_copies() {
  auto& copies = block->fibers[block->current].copies;
  for (; copies.size() > kPending; copies.pop_front())
    for (const auto& copy : copies.front()) copy();
}

// What lane `lane` of this thread's warp published.
inline std::array<uint64_t, 8>& published(int lane) {
  return block->published[threadIdx.x / 32 * 32 + lane];
}

template <bool kTransposed>
void load_matrices(uint32_t (&to)[4], const void* from) {
  const int lane = threadIdx.x % 32;
  published(lane)[0] = reinterpret_cast<uint64_t>(from);
  sync_warp();
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int row = kTransposed ? lane % 4 * 2 + i : lane / 4;
      const int column = kTransposed ? lane / 4 : lane % 4 * 2 + i;
      const uint64_t address = published(8 * matrix + row)[0];
      STD_TORCH_CHECK(address % 16 == 0, "rows of a matrix must lie at multiples of 16 bytes");
      pair[i] = reinterpret_cast<const uint16_t*>(address)[column];
    }
    to[matrix] = pair[0] | uint32_t(pair[1]) << 16;
  }
  sync_warp();
}

template <class T>
float half_of(uint64_t pair, int index) {
  const uint16_t bits = uint16_t(pair >> (16 * index));
  T value;
  std::memcpy(&value, &bits, 2);
  return float(value);
}

template <class T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = threadIdx.x % 32;
  published(lane) = {a[0], a[1], a[2], a[3], b0, b1};
  sync_warp();
  for (int part = 0; part < 4; ++part) {
    const int row = lane / 4 + part / 2 * 8, column = lane % 4 * 2 + part % 2;
    for (int k = 0; k < 16; ++k) {
      const int owner = k % 8 / 2;
      const int a_part = row / 8 + k / 8 * 2, b_part = 4 + k / 8;
      sums[part] += half_of<T>(published(row % 8 * 4 + owner)[a_part], k % 2) *
                    half_of<T>(published(column * 4 + owner)[b_part], k % 2);
    }
  }
  sync_warp();
}

template <class A>
A sum_over_warp(A value) {
  const int lane = threadIdx.x % 32;
  for (int offset = 16; offset > 0; offset /= 2) {
    std::memcpy(&published(lane)[0], &value, sizeof(A));
    sync_warp();
    A other;
    std::memcpy(&other, &published(lane ^ offset)[0], sizeof(A));
    sync_warp();
    value += other;
  }
  return value;
}

}  // namespace hearken
